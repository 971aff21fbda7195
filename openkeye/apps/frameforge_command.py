"""`openkeye frameforge make`: synthetic clips with known truth, as H.264 files and JSON lines."""

import argparse

from openkeye.common.checks import InputError

SUMMARY = "make synthetic videos with questions and known answers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    make = actions.add_parser("make", help="write clips and their questions")
    make.add_argument("--out", required=True, metavar="DIR", help="folder for the clips and clips.jsonl")
    make.add_argument("--num", type=int, default=100, help="number of clips")
    make.add_argument("--seed", type=int, default=0, help="the same seed gives the same clips")
    make.add_argument("--tier", choices=("standard", "long", "hour"), default="standard", help="8-30 s, 1-5 min, or an hour")
    make.add_argument("--seconds", default=None, metavar="A..B", help="another range of lengths, for example 8..30")
    make.add_argument("--workers", type=int, default=None, help="processes (default: one per core)")


def run(arguments: argparse.Namespace) -> int:
    """Write the clips with a progress bar on standard error; prints the folder's index file."""
    import os
    from contextlib import closing
    from pathlib import Path

    from rich.console import Console
    from rich.progress import track

    from openkeye.frameforge.writer import write_clips

    if arguments.num < 1:
        raise InputError(f"--num is {arguments.num}; give at least 1")
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder for --out")
    clips = write_clips(
        out,
        arguments.num,
        arguments.seed,
        arguments.tier,
        parse_seconds(arguments.seconds),
        arguments.workers or os.cpu_count() or 1,
    )
    console = Console(stderr=True)
    with closing(clips):
        for _ in track(clips, "Filming", total=arguments.num, console=console, disable=not console.is_terminal):
            pass
    print(out / "clips.jsonl")
    return 0


def parse_seconds(text: str | None) -> tuple[float, float] | None:
    """`8..30` as (8.0, 30.0)."""
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(".."))
    except ValueError:
        raise InputError(f"--seconds is {text!r}; give a range such as 8..30") from None
    if not 4.0 <= low <= high <= 3600.0:
        raise InputError(f"--seconds is {text!r}; give a range within 4..3600, the smaller number first")
    return low, high
