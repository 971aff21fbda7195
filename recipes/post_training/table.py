"""Scores of several runs as a table: means over seeds with 95% intervals by Student's t.

    python -m recipes.post_training.table runs/context_rl/*-seed? --rewards outcome,right_answer_wrong_reasoning

A run is a folder `NAME-seedN` with reports of `openkeye evaluate task --json` in it (`*.json`), and the log of its training in
`run/`. Runs that differ in their seed alone share a row.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import t

from openkeye.apps.curves import read_log
from openkeye.common.checks import InputError

SEED = re.compile(r"-seed(\d+)$")


@dataclass(frozen=True)
class Estimate:
    """The mean of some runs, and half the width of its 95% interval."""

    mean: float
    half_width: float
    # infinite for one run
    num_runs: int

    def text(self) -> str:
        """`0.512 +- 0.034 (3)`"""
        spread = "" if self.num_runs == 1 else f" +- {self.half_width:.3f}"
        return f"{self.mean:.3f}{spread} ({self.num_runs})"


def estimate(values: Sequence[float]) -> Estimate:
    """Student's t over runs: mean +- t(0.975, n - 1) * s / sqrt(n), with n - 1 under the variance."""
    count = len(values)
    half = float(t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count)) if count > 1 else float("inf")
    return Estimate(float(np.mean(values)), half, count)


def read_run(folder: Path) -> dict[str, float]:
    """Rewards by `REPORT/NAME`, and "minutes" of training.

    Raises:
        InputError: no folder, or nothing in it that was scored.
    """
    numbers: dict[str, float] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            report = json.loads(path.read_text())
            numbers |= {f"{path.stem}/{name}": float(row["mean"]) for name, row in report["rewards"].items()}
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path} is no report of `openkeye evaluate task --json`; write it again") from None
    if not numbers:
        raise InputError(
            f"{folder} holds no reports; write some with `openkeye evaluate task NAME --json > {folder}/held_out.json`"
        )
    seconds = [float(record["seconds_per_step"]) for record in read_log(folder / "run")]
    return numbers | ({"minutes": sum(seconds) / 60} if seconds else {})


def table(folders: Sequence[Path], rewards: Sequence[str] = ()) -> list[list[str]]:
    """Rows of words, the first of which names the columns.

    Args:
        rewards: names of those to show, in this order; none: all.

    Raises:
        InputError: a folder without reports, or a reward that no run has.
    """
    groups: dict[str, list[dict[str, float]]] = defaultdict(list)
    for folder in folders:
        groups[SEED.sub("", folder.name)].append(read_run(folder))
    known = list(dict.fromkeys(name for runs in groups.values() for run in runs for name in run))
    columns = [name for name in known if name != "minutes"]
    if rewards:
        columns = [name for reward in rewards for name in columns if name.rpartition("/")[2] == reward]
        if not columns:
            raise InputError(f"no run has {', '.join(rewards)}; choose from {', '.join(known)}")
    columns += ["minutes"] if "minutes" in known else []
    rows = [["run", *columns]]
    for group, runs in groups.items():
        values = [[run[name] for run in runs if name in run] for name in columns]
        rows.append([group, *(estimate(column).text() if column else "-" for column in values)])
    return rows


def main(words: Sequence[str]) -> int:
    """Print the table; 2 for wrong input."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders NAME-seedN")
    parser.add_argument("--rewards", default="", help="names, by commas (default: all)")
    arguments = parser.parse_args(words)
    try:
        rows = table(arguments.runs, [name for name in arguments.rewards.split(",") if name])
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    for row in rows:
        print("| " + " | ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
