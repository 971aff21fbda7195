"""One decoder layer's passes, cut into the parts whose time is told: answering over caches, and learning.

Answering uses what fuses norms, rotary turns and cache writes; learning keeps a graph of its own for every part.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from openkeye.kernels.norm_rotary import add_rms_norm, index_norm_rotary_write, norm_rotary_write, rms_norm
from openkeye.kernels.quantize import quantize_vectors
from openkeye.model.attention import RotaryTables
from openkeye.model.config import KeyeConfig
from openkeye.model.decoder import DecoderLayer
from openkeye.model.past import IndexerOutput
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
