"""Which kernels take the time of prefill's selection and attention, by the profiler's own clock.

python -m benchmarks.where_time_goes [--contexts 32768 131072 262144]
"""

import argparse
import re
import sys
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.inputs import FULL, pooled_lists
from benchmarks.rehearsal import header
from benchmarks.selection import make_inputs, select
from openkeye.kernels.sparse_attention import sparse_attention

NUM_RUNS = 5


def kernels_of(work: Callable[[], object]) -> list[tuple[str, int, float]]:
    """Name, launches a run and milliseconds a run of every kernel, the slowest first; the first run is left out."""
    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(NUM_RUNS):
            work()
        torch.cuda.synchronize()
    rows = [
        (event.key, round(event.count / NUM_RUNS), event.self_device_time_total / 1e3 / NUM_RUNS)
        for event in profiler.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(rows, key=lambda row: -row[2])


def short_name(name: str) -> str:
    """A kernel's own name without namespaces, template arguments and parameters."""
    bare = re.sub(r"\(anonymous namespace\)::|<unnamed>::|^void ", "", name)
    return re.split(r"[<(]", bare)[0].split("::")[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description="Show which kernels take the time of selection and attention.")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(FULL.contexts))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("the time of kernels needs a CUDA GPU")
    print(header() + "\n\n| context | operation | kernel | launches | ms |\n|---|---|---|---|---|")
    for context in arguments.contexts:
        inputs = make_inputs(FULL, context, "cuda")
        lists = pooled_lists(inputs.shape, "cuda")
        operations: dict[str, Callable[[], object]] = {
            "indexer_select, fp8": lambda inputs=inputs: select(inputs, True),
            "sparse_attention": lambda inputs=inputs, lists=lists: sparse_attention(
                inputs.query, inputs.key, inputs.value, lists, inputs.scale
            ),
        }
        for operation, work in operations.items():
            for name, launches, milliseconds in kernels_of(work):
                print(f"| {context} | {operation} | {short_name(name)} | {launches} | {milliseconds:.3f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
