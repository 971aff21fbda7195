"""Times every kernel at the 30B shape beside torch's own best, and says what share of the hardware's floor it reaches.

    python -m benchmarks.kernels [--only prefill unions decode learning parts quality] [--check-only] [--out FILE]

One layer: 32 query and 4 KV heads of 128, indexer of 16 heads of 64, k 2,048. Nothing is timed before its result has been
compared with the plain twin, on sampled rows where the twin is slow; a line whose check fails is not printed, and the exit
status is 1. Floors take what an H100 80 GB HBM3 reaches (`measure.Ceilings`): on another GPU give --bf16-tflops, --fp8-tflops,
--memory-tbps, --l2-tbps and --adds-tbps. Times are medians; those in ms begin with an L2 that holds none of the inputs.

Kernels are compiled beforehand by processes side by side (--no-rehearsal: on the way). --check-only works on a CPU too, at
sizes for Triton's interpreter (TRITON_INTERPRET=1).
"""

import argparse
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import torch

from benchmarks import decode, learning, parts, prefill, quality, union_sizes
from benchmarks.inputs import FULL, REHEARSAL, TINY, Sizes
from benchmarks.measure import FAILURES, Ceilings, Report
from benchmarks.rehearsal import header, rehearse

GROUPS = {
    "prefill": prefill.run,
    "unions": union_sizes.run,
    "decode": decode.run,
    "learning": learning.run,
    "parts": parts.run,
    "quality": quality.run,
}
REHEARSALS = {"prefill": 4, "decode": 3, "learning": 5, "parts": 4}
# processes that compile a group's kernels


def run_groups(report: Report, sizes: Sizes, groups: list[str]) -> None:
    for group in groups:
        start = time.monotonic()
        try:
            GROUPS[group](report, sizes, report.device)
        except FAILURES as error:
            report.fail(f"the rest of {group}", error)
        if report.mode != "rehearse":
            print(f"{group}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check and time the kernels.")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--contexts", type=int, nargs="+", help="of prefill and decode")
    parser.add_argument("--check-only", action="store_true", help="compare with the twins and time nothing; works on a CPU")
    parser.add_argument("--rep-ms", type=int, default=60, help="milliseconds of repetitions of each timing")
    parser.add_argument("--out", type=Path, help="file that the tables are written to, in Markdown")
    parser.add_argument("--no-rehearsal", action="store_true", help="compile on the way and not beforehand side by side")
    parser.add_argument("--rehearse", help=argparse.SUPPRESS)
    for field in fields(Ceilings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=float, default=field.default)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.check_only:
        sys.exit("timing needs a CUDA GPU; --check-only compares the kernels with their twins on a CPU")
    if arguments.rehearse:
        number, count = map(int, arguments.rehearse.split("/"))
        run_groups(Report("rehearse", device, share=(number, count)), REHEARSAL, arguments.only)
        return 0
    sizes = FULL if device == "cuda" else TINY
    if arguments.contexts:
        contexts = tuple(arguments.contexts)
        sizes = replace(sizes, contexts=contexts, decode_contexts=contexts)
    ceilings = Ceilings(**{field.name: getattr(arguments, field.name) for field in fields(Ceilings)})
    report = Report("check" if arguments.check_only else "time", device, arguments.rep_ms, ceilings)
    if device == "cuda":
        if not arguments.no_rehearsal:
            counts = [(group, REHEARSALS.get(group, 0)) for group in arguments.only]
            shares = [(group, f"{number}/{count}") for group, count in counts for number in range(count)]
            rehearse([("benchmarks.kernels", "--only", group, "--rehearse", share) for group, share in shares])
        report.say(header())
    start = time.monotonic()
    run_groups(report, sizes, arguments.only)
    print(f"all groups: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return report.finish(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
