"""Cost of a token by its position, dense and sparse, as the report's Figure 4 shows it, ours beside its published values.

    python -m benchmarks.serving_curves benchmarks/data/serving_h200.json --out docs/cost_by_position.png

Needs matplotlib (`pip install openkeye[bench]`). The report gives dollars of an H800; both are drawn as times what dense attention
costs at 32K, so that only the shapes are compared.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

REPORT = {
    "prefill": {
        "dense": {2048: 0.0077, 32768: 0.019, 65536: 0.031, 98304: 0.0435, 131072: 0.056},
        "sparse": {2048: 0.008, 32768: 0.013, 65536: 0.015, 98304: 0.0165, 131072: 0.018},
    },
    "decode": {
        "dense": {2048: 0.08, 32768: 0.87, 65536: 1.60, 98304: 2.40, 131072: 3.22},
        "sparse": {2048: 0.12, 32768: 0.36, 65536: 0.45, 98304: 0.55, 131072: 0.64},
    },
}
# dollars for a million tokens, read off the report's curves
UNIT = 32768
COLOURS = {"dense": "#b4541a", "sparse": "#1a6fb4"}


def draw(measured: Mapping[str, Mapping[str, Mapping[int, float]]], machine: str, out: Path) -> None:
    """Two panels, prefill and decode; milliseconds a token in `measured[phase][attention]` by position."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, phase in zip(axes, ("prefill", "decode"), strict=True):
        for attention in ("dense", "sparse"):
            for curves, style, whose in ((measured[phase], "o-", "ours"), (REPORT[phase], "s:", "report")):
                points = sorted(curves[attention].items())
                unit = curves["dense"][UNIT]
                axis.plot(
                    [position / 1024 for position, _ in points],
                    [cost / unit for _, cost in points],
                    style,
                    color=COLOURS[attention],
                    alpha=1.0 if whose == "ours" else 0.5,
                    markersize=4,
                    label=f"{attention}, {whose}",
                )
        axis.set_title(phase)
        axis.set_xlabel("position, thousands of tokens (1,024)")
        axis.set_ylabel("cost of a token (dense at 32K = 1)")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle(f"Keye-VL-2.0-30B-A3B's shape: ours on one {machine}; the report on H800", fontsize=10)
    figure.savefig(out, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what `python -m benchmarks.serving --json` wrote")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    options = parser.parse_args(arguments)
    results = json.loads(options.results.read_text())
    measured = {
        phase: {name: {int(at): cost for at, cost in curve.items()} for name, curve in results[f"{phase}_ms"].items()}
        for phase in ("prefill", "decode")
    }
    draw(measured, results["machine"].split(",")[0], options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
