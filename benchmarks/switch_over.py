"""From which context length on sparse attention is not slower than dense attention.

    python -m benchmarks.switch_over [--check-only] [--out FILE]

One layer of the 30B shape: 32 query and 4 KV heads of 128, indexer of 16 heads of 64, k 2,048. Prefill of whole prompts and of
the last 2,048 queries of a context, by selection and sparse attention, beside `dense_attention` with the back end that it
chooses itself; decoding in CUDA graphs, the whole step over pages beside attention to all keys by torch's FlashAttention.
Selection is the real one; attention takes lists that share keys as a trained indexer's do (`inputs.causal_lists`), since random
indexers choose alike for no two neighbours. Queries that see at most k keys take them all: there sparse attention must equal
dense attention, and no figure is printed where it does not.

--check-only compares and times nothing; it works on a CPU too, at sizes for Triton's interpreter (TRITON_INTERPRET=1).
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.decode import PAGE, Decode, Pool
from benchmarks.inputs import FULL, TINY, Sizes, causal_lists
from benchmarks.measure import FAILURES, Case, Report, compare, figure, must_equal
from benchmarks.rehearsal import header, rehearse
from benchmarks.selection import make_inputs, select
from openkeye.kernels import reference
from openkeye.kernels.dense_attention import choose_back_end, dense_attention
from openkeye.kernels.layer_caches import LayerCaches
from openkeye.kernels.sparse_attention import sparse_attention

SIZES = replace(
    FULL,
    contexts=(1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768),
    num_queries=2048,
    decode_contexts=(1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384),
)
REHEARSAL_SIZES = replace(SIZES, contexts=(4096,), decode_contexts=(4096,))
TINY_SIZES = replace(TINY, contexts=(32, 64, 96), num_queries=32, top_k=64, decode_contexts=(64, 128), batches=(1, 2))
CACHES = {"fp8": "fp8 index, bf16 KV", "bf16": "all bf16"}
# index keys, and the caches of `decode.Pool` that hold them so


@dataclass(frozen=True)
class Line:
    """One length's milliseconds; None where nothing was timed, or what was made is wrong."""

    length: int
    dense_name: str
    dense: float | None
    sparse: dict[str, float | None]
    # by the index keys' dtype


class Prompt:
    """Prefill of the last queries of a context, which may be all of it."""

    def __init__(self, report: Report, sizes: Sizes, num_keys: int, num_queries: int) -> None:
        self.report, self.inputs = report, make_inputs(sizes, num_keys, report.device, num_queries)
        self.lists = causal_lists(self.inputs.shape, report.device)

    def line(self) -> Line:
        inputs = self.inputs
        back_end = choose_back_end(inputs.query, inputs.key, is_causal=True)
        dense = self.measure(f"dense by {back_end}", self.dense, self.check_dense)
        sparse = {
            name: self.measure(f"select + attend, {name}", partial(self.select_and_attend, name), partial(self.check, name))
            for name in CACHES
        }
        return Line(inputs.shape.num_keys, back_end, dense, sparse)

    def measure(self, name: str, run: Callable[[], Tensor], check: Callable[[], None]) -> float | None:
        return self.report.measure(Case(name, self.inputs.shape.name, (run,), check))

    def dense(self) -> Tensor:
        inputs = self.inputs
        return dense_attention(inputs.query, inputs.key, inputs.value, inputs.positions, inputs.scale)

    def attend(self) -> Tensor:
        inputs = self.inputs
        return sparse_attention(inputs.query, inputs.key, inputs.value, self.lists, inputs.scale)

    def select_and_attend(self, name: str) -> Tensor:
        select(self.inputs, name == "fp8")
        return self.attend()

    def check_dense(self) -> None:
        """Sampled rows."""
        inputs, rows = self.inputs, self.inputs.rows[-4:]
        expected = reference.dense_attention(inputs.query[rows], inputs.key, inputs.value, inputs.positions[rows], inputs.scale)
        compare("dense_attention", self.dense()[rows], expected, inputs.tolerance)

    def check(self, name: str) -> None:
        """Sampled rows, and all that see at most k keys: those select them all and equal dense attention."""
        inputs, rows, output = self.inputs, self.inputs.rows, self.attend()
        tensors = (inputs.query[rows], inputs.key, inputs.value, self.lists[rows], inputs.scale)
        compare("sparse_attention", output[rows], reference.sparse_attention(*tensors), inputs.tolerance)
        num_short = int((inputs.positions < inputs.shape.top_k).sum())
        if num_short:
            must_equal("selection of all keys", select(inputs, name == "fp8")[:num_short], self.lists[:num_short])
            compare("sparse attention to all keys", output[:num_short], self.dense()[:num_short], inputs.tolerance)


def decode_line(decode: Decode) -> Line:
    """One new token of each request of a batch."""
    pool, requests, peer = decode.pool, decode.requests, decode.dense()
    sparse = {}
    for name, kind in CACHES.items():
        caches = pool.caches[kind]
        runs = tuple(partial(decode.step, caches, each) for each in requests)
        case = Case(f"whole step, {name}", decode.name, runs, partial(check_step, decode, caches), is_captured=True)
        sparse[name] = decode.report.measure(case)
    is_timed = peer.milliseconds == peer.milliseconds
    return Line(pool.context, "torch's flash", peer.milliseconds if is_timed else None, sparse)


def check_step(decode: Decode, caches: LayerCaches) -> None:
    """The step against its twin, and against dense attention where all keys are taken."""
    decode.check_step(caches)
    if decode.pool.context > decode.sizes.top_k:
        return
    requests = decode.requests[0]
    output = decode.step(caches, requests)
    for row, pages in enumerate(requests.table.long()):
        slots = (PAGE * pages[:, None] + torch.arange(PAGE, device=pages.device)).flatten()
        expected = dense_attention(
            requests.query[row : row + 1], caches.key_SGD[slots], caches.value_SGD[slots], None, decode.scale
        )
        compare("decoding over all keys", output[row : row + 1], expected, decode.tolerance)


def switch_over(lines: Sequence[Line], name: str) -> int | None:
    """The smallest length from which on sparse is never slower, with these index keys; a missing figure proves nothing."""
    found = None
    for line in sorted(lines, key=lambda line: -line.length):
        sparse = line.sparse[name]
        if line.dense is None or sparse is None or sparse > line.dense:
            break
        found = line.length
    return found


def say_table(report: Report, title: str, lines: Sequence[Line], is_microseconds: bool) -> None:
    """Dense beside sparse by length, and from where on sparse is not slower."""
    if report.mode != "time":
        return
    unit, scale = ("us", 1e3) if is_microseconds else ("ms", 1.0)
    columns = ["tokens", "dense by", f"dense {unit}"]
    for name in CACHES:
        columns += [f"sparse {unit}, {name} index", "dense / sparse"]
    report.say(f"\n### {title}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for line in lines:
        cells = [str(line.length), line.dense_name, "" if line.dense is None else figure(scale * line.dense)]
        for sparse in line.sparse.values():
            cells.append("" if sparse is None else figure(scale * sparse))
            cells.append("" if sparse is None or line.dense is None else f"{line.dense / sparse:.2f}")
        report.say("| " + " | ".join(cells) + " |")
    found = [switch_over(lines, name) for name in CACHES]
    fp8, bf16 = ("no measured length" if length is None else f"{length} tokens" for length in found)
    report.say(f"\nsparse is not slower from {fp8} on (fp8 index) / {bf16} (bf16 index)")


def prefill_tables(report: Report, sizes: Sizes) -> None:
    whole = [Prompt(report, sizes, length, length).line() for length in sizes.contexts]
    say_table(report, f"Prefill of whole prompts, k {sizes.top_k}", whole, is_microseconds=False)
    lengths = [length for length in sizes.contexts if length >= sizes.num_queries]
    chunks = [Prompt(report, sizes, length, sizes.num_queries).line() for length in lengths]
    title = f"Prefill of the last {sizes.num_queries} queries, k {sizes.top_k}"
    say_table(report, title, chunks, is_microseconds=False)


def decode_tables(report: Report, sizes: Sizes) -> None:
    lines: dict[int, list[Line]] = {batch: [] for batch in sizes.batches}
    for context in sizes.decode_contexts:
        pool = Pool(sizes, context, report.device)
        for batch in sizes.batches:
            lines[batch].append(decode_line(Decode(report, pool, batch)))
        del pool
        if report.device == "cuda":
            torch.cuda.empty_cache()
    for batch in sizes.batches:
        title = f"Decoding in a CUDA graph, requests: {batch}, k {sizes.top_k}"
        say_table(report, title, lines[batch], is_microseconds=True)


TABLES = {"prefill": prefill_tables, "decode": decode_tables}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="From which length on sparse attention is not slower than dense attention.")
    parser.add_argument("--check-only", action="store_true", help="compare and time nothing; works on a CPU")
    parser.add_argument("--rep-ms", type=int, default=60, help="milliseconds of repetitions of each timing of prefill")
    parser.add_argument("--out", type=Path, help="file that the tables are written to, in Markdown")
    parser.add_argument("--no-rehearsal", action="store_true", help="compile on the way and not beforehand side by side")
    parser.add_argument("--rehearse", choices=TABLES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.check_only:
        sys.exit("timing needs a CUDA GPU; --check-only compares sparse with dense attention on a CPU")
    if arguments.rehearse:
        TABLES[arguments.rehearse](Report("rehearse", device), REHEARSAL_SIZES)
        return 0
    if device == "cuda" and not arguments.no_rehearsal:
        rehearse([("benchmarks.switch_over", "--rehearse", name) for name in TABLES])
    report = Report("check" if arguments.check_only else "time", device, arguments.rep_ms)
    if device == "cuda":
        report.say(header())
    start = time.monotonic()
    for name, tables in TABLES.items():
        try:
            tables(report, SIZES if device == "cuda" else TINY_SIZES)
        except FAILURES as error:
            report.fail(f"the rest of {name}", error)
    print(f"all tables: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return report.finish(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
