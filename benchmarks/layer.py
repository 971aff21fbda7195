"""Times one decoder layer of the 30B shape end to end, dense beside sparse, and says where the time goes.

    python -m benchmarks.layer [--contexts 32768 131072 262144] [--training-contexts 32768 131072] [--check-only]

Answering: norm, projections, norms with rotary and cache writes, selection, attention, output projection and experts of the
last 8,192 tokens of a context whose earlier tokens lie in the caches. Training: forward and backward of the same tokens, with
gradients of all weights but the indexer's (its own loss is not part of it) and of all keys and values of the context. Weights
and tokens are random. Random indexers choose alike for no two neighbours, so attention takes lists as trained indexers choose
them (`benchmarks.inputs.pooled_lists`; --lists own: those selected), while the selection that is timed is the layer's own.

--check-only compares the layer with `openkeye.model`'s own on the same weights, forward and backward, at a tiny size; on a CPU
with TRITON_INTERPRET=1.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.inputs import Shape, pooled_lists
from benchmarks.layer_passes import (
    MODES,
    AnsweringLayer,
    Clock,
    LearningLayer,
    make_caches,
    operations,
    random_layer,
    rotary_tables,
)
from benchmarks.measure import Disagreement, compare
from benchmarks.rehearsal import header, rehearse
from openkeye.model.config import IndexerConfig, KeyeConfig
from openkeye.model.past import PlainPast
from openkeye.model.published import published_config

REHEARSAL_BLOCKS = 5
# of the queries: more keys than the lists' pools need


def check(device: str) -> None:
    """Both passes in both modes against the model's layer, in float32 at a tiny size."""
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


def table(columns: dict[str, dict[str, dict[str, float]]]) -> str:
    """Parts by passes and contexts, dense beside sparse, then their sums and the ratio of those; milliseconds."""
    heads = [f"{title}, {mode}" for title in columns for mode in MODES]
    parts = dict.fromkeys(part for times in columns.values() for mode in reversed(MODES) for part in times[mode])
    lines = ["| part, ms | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for part in parts:
        cells = [f"{times[mode][part]:.2f}" if part in times[mode] else "" for times in columns.values() for mode in MODES]
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    sums = [[sum(times[mode].values()) for mode in MODES] for times in columns.values()]
    lines.append("| **sum** | " + " | ".join(f"**{figure:.2f}**" for pair in sums for figure in pair) + " |")
    lines.append("| dense / sparse | " + " | ".join(f" | **{dense / sparse:.2f}**" for dense, sparse in sums) + " |")
    return "\n".join(lines)


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

    def answering(self, num_keys: int) -> Callable[[str, Clock], object]:
        """The forward pass in a mode."""
        caches = make_caches(self.config, num_keys, self.is_e4m3, torch.bfloat16, "cuda")
        positions = torch.arange(num_keys - self.arguments.queries, num_keys, device="cuda")
        rotary, lists = rotary_tables(self.config, positions), self.lists(num_keys)
        answering = AnsweringLayer(self.layer, self.config, operations())
        return lambda mode, clock: answering.forward(self.x, rotary, caches, positions, mode, lists, clock)

    def learning(self, num_keys: int, learning: LearningLayer) -> Callable[[str, Clock], object]:
        """Forward and backward in a mode."""
        num_past = num_keys - self.arguments.queries
        past = make_caches(self.config, num_past, self.is_e4m3, torch.bfloat16, "cuda")
        rotary = rotary_tables(self.config, torch.arange(num_past, num_keys, device="cuda"))
        lists, gradient = self.lists(num_keys), torch.randn_like(self.x)
        return lambda mode, clock: learning.step(self.x, rotary, past, gradient, mode, lists, clock)

    def learning_layer(self) -> LearningLayer:
        return LearningLayer(self.layer, self.config, operations(), is_compiled=not self.arguments.eager)

    def rehearse(self, what: str) -> None:
        """One pass at a short context, so that its kernels lie compiled on the disk."""
        num_keys = REHEARSAL_BLOCKS * self.arguments.queries
        if what == "answer":
            run, modes = self.answering(num_keys), MODES
        else:
            run, modes = self.learning(num_keys, self.learning_layer()), (what,)
        for mode in modes:
            run(mode, Clock("cpu"))

    def times(self) -> dict[str, dict[str, dict[str, float]]]:
        """Milliseconds by pass and context, mode and part."""
        arguments, columns = self.arguments, {}
        for num_keys in arguments.contexts:
            run = self.answering(num_keys)
            columns[f"forward at {num_keys}"] = {mode: measure(partial(run, mode), arguments.repeats) for mode in MODES}
        layer = self.learning_layer()
        for num_keys in arguments.training_contexts:
            run, repeats = self.learning(num_keys, layer), max(3, arguments.repeats // 4)
            columns[f"forward + backward at {num_keys}"] = {mode: measure(partial(run, mode), repeats) for mode in MODES}
        return columns


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check and time one decoder layer.")
    parser.add_argument("--contexts", type=int, nargs="*", default=[32768, 131072, 262144])
    parser.add_argument("--training-contexts", type=int, nargs="*", default=[32768, 131072])
    parser.add_argument("--queries", type=int, default=8192)
    parser.add_argument("--index-dtype", choices=["e4m3", "bf16"], default="e4m3")
    parser.add_argument("--lists", choices=["pooled", "own"], default="pooled", help="which keys sparse attention attends to")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--eager", action="store_true", help="training without torch.compile of norms and projections")
    parser.add_argument("--out", type=Path, help="file that the table is written to, in Markdown")
    parser.add_argument("--no-rehearsal", action="store_true", help="compile on the way and not beforehand side by side")
    parser.add_argument("--rehearse", choices=["answer", *MODES], help=argparse.SUPPRESS)
    parser.add_argument(
        "--check-only", action="store_true", help="compare with the model's layer and time nothing; works on a CPU"
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.check_only:
        sys.exit("timing needs a CUDA GPU; --check-only compares the layer with the model's on a CPU")
    if arguments.rehearse:
        Bench(arguments).rehearse(arguments.rehearse)
        return 0
    if device == "cuda" and not arguments.no_rehearsal:
        settings = ["--index-dtype", arguments.index_dtype, *(["--eager"] if arguments.eager else [])]
        passes = [("benchmarks.layer", "--rehearse", what, *settings) for what in ("answer", *MODES)]
        rehearse([*passes, ("benchmarks.layer", "--check-only", "--no-rehearsal")])
    try:
        check(device)
    except Disagreement as error:
        sys.exit(f"{error}; nothing is timed")
    if arguments.check_only:
        return 0
    text = f"{header()}; {arguments.queries} tokens, index keys {arguments.index_dtype}, {arguments.lists} lists\n\n"
    text += table(Bench(arguments).times())
    text += f"\n\nPeak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB."
    print(text, flush=True)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
