"""Trains `openkeye-tiny`, the checkpoint in the package, from random weights on FrameForge clips.

    python -m recipes.tiny --run-dir runs/tiny --stop-after-seconds 540     # repeat until it says "finished"

One H100, under 20 minutes in all, resumable at any point; `--smoke` runs a few steps of every stage on a CPU. What it should
reach stands in recipes/README.md.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from openkeye.train.config import StageConfig, TrainConfig

CHECKPOINT = Path(__file__).parent.parent / "openkeye" / "checkpoints" / "openkeye-tiny"

STANDARD = (16, 24, 32, 40, 48, 60)
EVERY = (16, 24, 32, 40, 48, 60, 96, 128, 192, 256, 384, 512, 600)
# Half of the steps stay with short clips, which hold more questions a second of computing.
EVERY_WEIGHTS = (2, 2, 2, 2, 2, 3, 1, 1, 1.5, 1.5, 1.5, 1.5, 2)


def tiny(model_dir: str = str(CHECKPOINT), num_workers: int = 14) -> TrainConfig:
    """The whole run: see and read, then longer, then minutes, then the indexer, then sparse."""
    return TrainConfig(
        model_dir=model_dir,
        num_workers=num_workers,
        stages=(
            StageConfig("short clips", 1500, (16,), num_warmup_steps=100, cell_weight_start=1.0, cell_weight_end=0.7),
            StageConfig("clips to 30 s", 3600, STANDARD, cell_weight_start=0.7, cell_weight_end=0.2),
            StageConfig(
                "clips to 5 min", 1800, EVERY, EVERY_WEIGHTS, rate_end=0.35, cell_weight_start=0.2, cell_weight_end=0.0
            ),
            StageConfig(
                "indexer warm-up",
                300,
                EVERY,
                EVERY_WEIGHTS,
                trains="indexer",
                num_indexer_rows=96,
                answer_weight=0.0,
                num_warmup_steps=20,
            ),
            StageConfig(
                "sparse adaptation", 1200, EVERY, EVERY_WEIGHTS, "sparse", rate_start=0.35, rate_end=0.0, num_indexer_rows=96
            ),
        ),
    )


def smoke(model_dir: str) -> TrainConfig:
    """Two steps of every stage on the shortest clips: the same code on a CPU, in seconds."""
    config = tiny(model_dir, num_workers=0)
    stages = tuple(
        replace(stage, num_steps=2, frame_counts=(8,), frame_weights=(), num_warmup_steps=0) for stage in config.stages
    )
    return replace(config, stages=stages, num_frames_per_step=16, log_every=1)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train openkeye-tiny.")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--stop-after-seconds", type=float, default=float("inf"), help="save and leave after this many seconds")
    parser.add_argument("--out", type=Path, default=None, help="write the weights here instead of into the package")
    parser.add_argument("--smoke", action="store_true", help="a few steps on a CPU")
    parser.add_argument("--num-workers", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    from openkeye.train.tiny_run import run

    config = smoke(str(CHECKPOINT)) if arguments.smoke else tiny(num_workers=arguments.num_workers)
    is_finished = run(
        replace(config, seed=arguments.seed), arguments.run_dir, arguments.out or CHECKPOINT, arguments.stop_after_seconds
    )
    print("finished" if is_finished else "not finished: run the same command again to go on", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
