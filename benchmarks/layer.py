"""Times one decoder layer of the 30B shape end to end, dense beside sparse, and says where the time goes.

    python -m benchmarks.layer [--contexts 32768 131072 262144] [--training-contexts 32768 131072] [--check-only]

Answering: norm, projections, norms with rotary and cache writes, selection, attention, output projection and experts of the
last 8,192 tokens of a context whose earlier tokens lie in the caches. Training: forward and backward of the same tokens, with
gradients of all weights but the indexer's (its own loss is not part of it) and of all keys and values of the context. Weights
and tokens are random. Random indexers choose alike for no two neighbours, so attention takes lists as trained indexers choose
them (`benchmarks.kernels.pooled_lists`; --lists own: those selected), while the selection that is timed is the layer's own.

--check-only compares the layer with `openkeye.model`'s own on the same weights, forward and backward, at a tiny size; on a CPU
with TRITON_INTERPRET=1.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import Shape, compare, pooled_lists
from openkeye.kernels.norm_rotary import add_rms_norm, index_norm_rotary_write, norm_rotary_write, rms_norm
from openkeye.kernels.quantize import quantize_vectors
from openkeye.model.attention import RotaryTables
from openkeye.model.config import IndexerConfig, KeyeConfig
from openkeye.model.decoder import DecoderLayer
from openkeye.model.past import IndexerOutput, PlainPast
from openkeye.model.published import published_config
from openkeye.model.rotary import mrope_table

MODES = ("dense", "sparse")


@dataclass(frozen=True)
class Operations:
    """What serves between the projections; `operations` is the one place to exchange it."""

    select: Callable[..., Tensor]
    attend_sparsely: Callable[..., Tensor]
    attend_sparsely_learning: Callable[..., Tensor]
    attend_densely: Callable[..., Tensor]
    experts: Callable[..., Tensor]


def operations() -> Operations:
    from openkeye.kernels.dense_attention import dense_attention
    from openkeye.kernels.experts import experts
    from openkeye.kernels.indexer_select import indexer_select
    from openkeye.kernels.sparse_attention import sparse_attention
    from openkeye.kernels.sparse_attention_backward import SparseAttention

    def attend_sparsely_learning(query: Tensor, key: Tensor, value: Tensor, lists: Tensor, scale: float) -> Tensor:
        return SparseAttention.apply(query, key, value, lists, scale, False)

    return Operations(indexer_select, sparse_attention, attend_sparsely_learning, dense_attention, experts)


class Clock:
    """Where the time of one pass goes: device events at the borders of its parts."""

    def __init__(self, device: str) -> None:
        self.is_running = device == "cuda"
        self.borders: list[tuple[str, torch.cuda.Event]] = []

    def begin(self, part: str) -> None:
        """The part before ends here; an empty name ends the pass."""
        if self.is_running:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.borders.append((part, event))

    def milliseconds(self) -> dict[str, float]:
        pairs = zip(self.borders, self.borders[1:], strict=False)
        return {part: start.elapsed_time(end) for (part, start), (_, end) in pairs}


@dataclass
class Caches:
    """Keys, values and index keys of a context, one slot a token in order."""

    keys_SGD: Tensor
    values_SGD: Tensor
    index_keys_SI: Tensor
    index_scales_S: Tensor | None
    # where index keys are e4m3


def make_caches(config: KeyeConfig, num_keys: int, is_e4m3: bool, dtype: torch.dtype, device: str) -> Caches:
    """Random contents, as if the context had been read."""
    shape = (num_keys, config.num_key_value_heads, config.head_dim)
    keys, values = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    index_keys, scales = torch.randn(num_keys, config.indexer.head_dim, device=device, dtype=dtype), None
    if is_e4m3:
        index_keys, scales = quantize_vectors(index_keys)
    return Caches(keys, values, index_keys, scales)


def rotary_tables(config: KeyeConfig, positions_T: Tensor) -> RotaryTables:
    """Of text: the three axes run together."""
    axes = positions_T.expand(3, -1)
    tables = (mrope_table(axes, sections, config.rope_theta) for sections in (config.mrope_section, config.index_mrope_section))
    return RotaryTables(*(table for pair in tables for table in pair))


class AnsweringLayer:
    """The forward pass over caches, with one joint projection."""

    def __init__(self, layer: DecoderLayer, config: KeyeConfig, serve: Operations) -> None:
        self.layer, self.config, self.serve = layer, config, serve
        attention, indexer = layer.self_attn, layer.self_attn.sa_indexer
        # Dense attention takes the rows before the indexer's.
        parts = (attention.q_proj, attention.k_proj, attention.v_proj, indexer.q_proj, indexer.k_proj)
        self.joint = torch.cat([part.weight for part in parts]).detach()
        self.widths = [part.weight.shape[0] for part in parts]

    @torch.no_grad()
    def forward(
        self,
        x_TD: Tensor,
        rotary: RotaryTables,
        caches: Caches,
        positions_T: Tensor,
        mode: str,
        lists: Tensor | None,
        clock: Clock,
    ) -> Tensor:
        """[T, hidden] -> [T, hidden] for the tokens at the end of a context; their slots are their positions."""
        layer, attention, indexer = self.layer, self.layer.self_attn, self.layer.self_attn.sa_indexer
        norm, scale = layer.input_layernorm, self.config.head_dim**-0.5
        widths = self.widths if mode == "sparse" else self.widths[:3]
        clock.begin("norm, projections")
        hidden = rms_norm(x_TD, norm.weight, norm.eps)
        query, key, value, *index = F.linear(hidden, self.joint[: sum(widths)]).split(widths, dim=1)
        clock.begin("norms, rotary, cache")
        weights = (attention.q_norm.weight, attention.k_norm.weight)
        tables, eps = (rotary.cos, rotary.sin), attention.q_norm.eps
        query = norm_rotary_write(query, key, value, *weights, *tables, eps, positions_T, caches.keys_SGD, caches.values_SGD)
        if mode == "sparse":
            index_weights = (indexer.q_norm.weight, indexer.k_norm.weight, indexer.k_norm.bias)
            tables = (rotary.index_cos, rotary.index_sin)
            index_query, gates = index_norm_rotary_write(
                *index, *index_weights, *tables, indexer.q_norm.eps, positions_T, caches.index_keys_SI, caches.index_scales_S
            )
            clock.begin("selection")
            selected = self.serve.select(
                index_query,
                gates,
                caches.index_keys_SI,
                self.config.indexer.top_k,
                positions_T,
                key_scales_S=caches.index_scales_S,
            )
            clock.begin("attention")
            lists = selected if lists is None else lists
            attended = self.serve.attend_sparsely(query, caches.keys_SGD, caches.values_SGD, lists, scale)
        else:
            clock.begin("attention")
            attended = self.serve.attend_densely(query, caches.keys_SGD, caches.values_SGD, positions_T, scale)
        clock.begin("output projection, norm")
        norm = layer.post_attention_layernorm
        x_TD, hidden = add_rms_norm(x_TD, F.linear(attended.flatten(1), attention.o_proj.weight), norm.weight, norm.eps)
        clock.begin("experts")
        x_TD = x_TD + mix_experts(layer, hidden, self.serve)
        clock.begin("")
        return x_TD


def mix_experts(layer: DecoderLayer, hidden_TD: Tensor, serve: Operations) -> Tensor:
    """`MixtureOfExperts.forward` with the experts that serve here."""
    mlp = layer.mlp
    weights, expert_ids = mlp.gate(hidden_TD).float().softmax(dim=-1).topk(mlp.num_experts_per_tok, dim=-1)
    if mlp.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return serve.experts(hidden_TD, mlp.experts.gate_up_proj, mlp.experts.down_proj, weights.to(hidden_TD.dtype), expert_ids)


class LearningLayer:
    """Forward and backward, part by part: each part's graph ends at tensors of its own, so that its time can be told."""

    def __init__(self, layer: DecoderLayer, config: KeyeConfig, serve: Operations, is_compiled: bool) -> None:
        self.layer, self.config, self.serve = layer, config, serve
        layer.self_attn.sa_indexer.requires_grad_(False)
        self.begin: Callable[..., tuple[Tensor, Tensor, Tensor, IndexerOutput | None]] = layer.begin
        self.norm: Callable[..., Tensor] = layer.post_attention_layernorm
        if is_compiled:
            self.begin, self.norm = (torch.compile(part, dynamic=False) for part in (self.begin, self.norm))

    def step(
        self,
        x_TD: Tensor,
        rotary: RotaryTables,
        past: Caches,
        gradient_TD: Tensor,
        mode: str,
        lists: Tensor | None,
        clock: Clock,
    ) -> tuple[Tensor, list[Tensor]]:
        """Output, then gradients of x, of the past keys and values and of `weights()`, in order."""
        layer, scale = self.layer, self.config.head_dim**-0.5
        x, past_keys, past_values = leaves(x_TD, past.keys_SGD, past.values_SGD)
        clock.begin("norms, projections, rotary")
        query, key, value, index = self.begin(x, rotary, mode == "sparse")
        keys, values = torch.cat([past_keys, key]), torch.cat([past_values, value])
        positions = torch.arange(past_keys.shape[0], keys.shape[0], device=x.device)
        query_leaf, keys_leaf, values_leaf = leaves(query, keys, values)
        if mode == "sparse":
            clock.begin("selection")
            assert index is not None
            selected = self.select(index, past, positions)
            lists = selected if lists is None else lists
            clock.begin("attention")
            attended = self.serve.attend_sparsely_learning(query_leaf, keys_leaf, values_leaf, lists, scale)
        else:
            clock.begin("attention")
            attended = self.serve.attend_densely(query_leaf, keys_leaf, values_leaf, positions, scale)
        clock.begin("output projection, norm")
        x_leaf, attended_leaf = leaves(x_TD, attended)
        y = x_leaf + layer.self_attn(attended_leaf)
        hidden = self.norm(y)
        clock.begin("experts")
        y_leaf, hidden_leaf = leaves(y, hidden)
        output = y_leaf + mix_experts(layer, hidden_leaf, self.serve)
        begin, after, experts = self.weights()
        clock.begin("experts, backward")
        grad_y, grad_hidden, *expert_grads = torch.autograd.grad(output, [y_leaf, hidden_leaf, *experts], gradient_TD)
        clock.begin("output projection, norm, backward")
        grad_x, grad_attended, *after_grads = torch.autograd.grad(
            [y, hidden], [x_leaf, attended_leaf, *after], [grad_y, grad_hidden]
        )
        clock.begin("attention, backward")
        grads = torch.autograd.grad(attended, [query_leaf, keys_leaf, values_leaf], grad_attended)
        clock.begin("norms, projections, rotary, backward")
        own_grad_x, *begin_grads = torch.autograd.grad(
            [query, keys, values], [x, past_keys, past_values, *begin], grads, materialize_grads=True
        )
        grad_x = grad_x + own_grad_x
        clock.begin("")
        return output.detach(), [grad_x, *begin_grads, *after_grads, *expert_grads]

    def weights(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of the parts before, right after and long after attention; the indexer learns elsewhere."""
        layer, attention = self.layer, self.layer.self_attn
        projections = [part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        begin = [layer.input_layernorm.weight, *projections, attention.q_norm.weight, attention.k_norm.weight]
        after = [attention.o_proj.weight, layer.post_attention_layernorm.weight]
        return begin, after, [layer.mlp.gate.weight, layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj]

    @torch.no_grad()
    def select(self, index: IndexerOutput, past: Caches, positions_T: Tensor) -> Tensor:
        """Positions of the context; new index keys are quantised where those of the past are."""
        keys, scales = index.key_TI.detach(), None
        if past.index_scales_S is not None:
            keys, scales = quantize_vectors(keys)
            scales = torch.cat([past.index_scales_S, scales])
            # Bytes, because not every device joins e4m3.
            joined = torch.cat([past.index_keys_SI.view(torch.uint8), keys.view(torch.uint8)])
            keys = joined.view(torch.float8_e4m3fn)
        else:
            keys = torch.cat([past.index_keys_SI, keys])
        return self.serve.select(
            index.query_TJI.detach(), index.gates_TJ.detach(), keys, self.config.indexer.top_k, positions_T, key_scales_S=scales
        )


def leaves(*tensors: Tensor) -> list[Tensor]:
    """The same values as beginnings of a graph."""
    return [tensor.detach().requires_grad_() for tensor in tensors]


def random_layer(config: KeyeConfig, dtype: torch.dtype, device: str) -> DecoderLayer:
    """Matrices that keep the size of what goes through them, norms near one."""
    with torch.device("meta"):
        layer = DecoderLayer(config, 0).to(dtype)
    layer = layer.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.1)
            else:
                # Experts are input-major: their depth is the middle one.
                depth = parameter.shape[1]
                parameter.normal_(0.0, depth**-0.5)
    return layer


def check(device: str) -> None:
    """Both passes in both modes against the model's layer, in float32 at a tiny size; leaves where they differ."""
    config = KeyeConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, vocab_size=8, rope_theta=1e6, mrope_section=(8, 12, 12),
        indexer=IndexerConfig(num_heads=4, head_dim=32, top_k=16), vision=None,
    )  # fmt: skip
    torch.manual_seed(0)
    num_keys, num_past = 49, 30
    layer, serve = random_layer(config, torch.float32, device), operations()
    x = torch.randn(num_keys, config.hidden_size, device=device)
    positions = torch.arange(num_keys, device=device)
    for mode in MODES:
        wide = x.clone().requires_grad_()
        expected = layer(wide, rotary_tables(config, positions), PlainPast(config.indexer.top_k, mode))
        answering = AnsweringLayer(layer, config, serve)
        caches = make_caches(config, num_keys, False, torch.float32, device)
        outputs = []
        for part in (slice(0, num_past), slice(num_past, num_keys)):
            # The caches end where the chunk ends, as they do for dense attention of the last queries.
            seen = replace(
                caches,
                keys_SGD=caches.keys_SGD[: part.stop],
                values_SGD=caches.values_SGD[: part.stop],
                index_keys_SI=caches.index_keys_SI[: part.stop],
            )
            rotary = rotary_tables(config, positions[part])
            outputs.append(answering.forward(x[part], rotary, seen, positions[part], mode, None, Clock(device)))
        compare(f"{mode} forward in chunks", torch.cat(outputs), expected.detach(), 1e-4)
        learning = LearningLayer(layer, config, serve, is_compiled=False)
        gradient = torch.randn_like(x)
        nothing = make_caches(config, 0, False, torch.float32, device)
        output, grads = learning.step(x, rotary_tables(config, positions), nothing, gradient, mode, None, Clock(device))
        compare(f"{mode} forward to learn", output, expected.detach(), 1e-4)
        weights = [weight for part in learning.weights() for weight in part]
        for number, theirs in enumerate(torch.autograd.grad(expected, [wide, *weights], gradient)):
            compare(f"{mode} gradient {number}", grads[number + 2 if number else 0], theirs, 1e-4)
        print(f"{mode}: the layer agrees with the model's, forward in chunks and backward")
        if mode == "dense":
            # With all keys picked, whatever the index keys say.
            everything = replace(config, indexer=replace(config.indexer, top_k=num_keys))
            caches = make_caches(config, num_keys, True, torch.float32, device)
            answering = AnsweringLayer(layer, everything, serve)
            output = answering.forward(x, rotary_tables(config, positions), caches, positions, "sparse", None, Clock(device))
            compare("sparse forward with all keys picked and index keys in e4m3", output, expected.detach(), 1e-4)


def measure(run: Callable[[Clock], object], num_repeats: int) -> dict[str, float]:
    """Median milliseconds of every part; the host never waits between passes, so that it stays ahead of the device."""
    for _ in range(2):
        run(Clock("cuda"))
    clocks = [Clock("cuda") for _ in range(num_repeats)]
    for clock in clocks:
        run(clock)
    torch.cuda.synchronize()
    times = [clock.milliseconds() for clock in clocks]
    return {part: statistics.median(time[part] for time in times) for part in times[0]}


def print_table(title: str, times: dict[str, dict[str, float]]) -> None:
    """Parts of both modes side by side, then their sums and the ratio."""
    print(f"\n| {title} | dense ms | sparse ms |\n|---|---|---|")
    for part in times["sparse"]:
        print(f"| {part} | " + " | ".join(f"{times[mode][part]:.2f}" if part in times[mode] else "" for mode in MODES) + " |")
    dense, sparse = (sum(times[mode].values()) for mode in MODES)
    print(f"| sum | {dense:.2f} | {sparse:.2f} |\n| dense / sparse | | {dense / sparse:.2f} |", flush=True)


class Bench:
    """One layer, timed at several contexts."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.config = published_config("keye-vl-2.0-30b-a3b")
        self.layer = random_layer(self.config, torch.bfloat16, "cuda")
        self.x = torch.randn(arguments.queries, self.config.hidden_size, device="cuda", dtype=torch.bfloat16)
        self.is_e4m3 = arguments.index_dtype == "e4m3"

    def lists(self, num_keys: int) -> Tensor | None:
        if self.arguments.lists == "own":
            return None
        return pooled_lists(Shape(num_keys, self.arguments.queries, self.config.indexer.top_k), "cuda")

    def answer(self, num_keys: int) -> None:
        """One table of the forward pass."""
        caches = make_caches(self.config, num_keys, self.is_e4m3, torch.bfloat16, "cuda")
        positions = torch.arange(num_keys - self.arguments.queries, num_keys, device="cuda")
        rotary, lists = rotary_tables(self.config, positions), self.lists(num_keys)
        answering = AnsweringLayer(self.layer, self.config, operations())
        times = {
            mode: measure(
                lambda clock, mode=mode: answering.forward(self.x, rotary, caches, positions, mode, lists, clock),
                self.arguments.repeats,
            )
            for mode in MODES
        }
        print_table(f"forward, {self.arguments.queries} tokens at the end of {num_keys}", times)

    def learn(self, num_keys: int, learning: LearningLayer) -> None:
        """One table of forward and backward."""
        num_past = num_keys - self.arguments.queries
        past = make_caches(self.config, num_past, self.is_e4m3, torch.bfloat16, "cuda")
        rotary = rotary_tables(self.config, torch.arange(num_past, num_keys, device="cuda"))
        lists, gradient = self.lists(num_keys), torch.randn_like(self.x)
        times = {
            mode: measure(
                lambda clock, mode=mode: learning.step(self.x, rotary, past, gradient, mode, lists, clock),
                max(3, self.arguments.repeats // 4),
            )
            for mode in MODES
        }
        print_table(f"forward + backward, {self.arguments.queries} tokens at the end of {num_keys}", times)
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and time one decoder layer.")
    parser.add_argument("--contexts", type=int, nargs="*", default=[32768, 131072, 262144])
    parser.add_argument("--training-contexts", type=int, nargs="*", default=[32768, 131072])
    parser.add_argument("--queries", type=int, default=8192)
    parser.add_argument("--index-dtype", choices=["e4m3", "bf16"], default="e4m3")
    parser.add_argument("--lists", choices=["pooled", "own"], default="pooled", help="which keys sparse attention attends to")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--eager", action="store_true", help="training without torch.compile of norms and projections")
    parser.add_argument(
        "--check-only", action="store_true", help="compare with the model's layer and time nothing; works on a CPU"
    )
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.check_only:
        sys.exit("timing needs a CUDA GPU; --check-only compares the layer with the model's on a CPU")
    check(device)
    if arguments.check_only:
        return 0
    settings = f"index keys {arguments.index_dtype}, {arguments.lists} lists"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {settings}")
    bench = Bench(arguments)
    for num_keys in arguments.contexts:
        bench.answer(num_keys)
    if arguments.training_contexts:
        learning = LearningLayer(bench.layer, bench.config, operations(), is_compiled=not arguments.eager)
        for num_keys in arguments.training_contexts:
            bench.learn(num_keys, learning)
    return 0


if __name__ == "__main__":
    sys.exit(main())
