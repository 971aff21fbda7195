"""Trains `openkeye-tiny`, the checkpoint in the package, from random weights on FrameForge clips.

    python -m recipes.tiny --run-dir runs/tiny --stop-after-seconds 540     # repeat until it says "finished"

One H100, about 20 minutes in all, resumable at any point; `--smoke` runs a few steps of every stage on a CPU. What it should
reach stands in recipes/README.md.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from openkeye.common.checks import InputError
from openkeye.data.slots.frameforge_stream import NUM_COLOURS, NUM_SPRITES, TASKS, StreamConfig, batches
from openkeye.model.config import KeyeConfig
from openkeye.model.keye import KeyeModel
from openkeye.model.weights import save_model
from openkeye.train.initialise import count_parameters, initialise
from openkeye.train.slots.config import StageConfig, TrainConfig
from openkeye.train.slots.loop import Trainer

CHECKPOINT = Path(__file__).parent.parent / "openkeye" / "checkpoints" / "openkeye-tiny"

STANDARD = (16, 24, 32, 40, 48, 60)
EVERY = (16, 24, 32, 40, 48, 60, 96, 128, 192, 256, 384, 512, 600)
# Half of the steps stay with short clips, which hold more questions a second of computing.
EVERY_WEIGHTS = (2, 2, 2, 2, 2, 3, 1, 1, 1.5, 1.5, 1.5, 1.5, 2)
# Fewer lengths where a step costs more: each is compiled and recorded anew for the indexer and for sparse attention.
SOME = (16, 32, 48, 60, 128, 256, 400, 600)
SOME_WEIGHTS = (2, 3, 3, 4, 3, 3, 3, 3)
HINTS = {"hint_weight_start": 0.5, "hint_weight_end": 0.5}


def num_rounds(num_frames: int) -> int:
    """Rounds of 8 questions on a clip: a step holds fewer long clips, so each of them carries more."""
    return 1 if num_frames <= 24 else 2 if num_frames <= 96 else 4


def tiny(model_dir: str = str(CHECKPOINT), num_workers: int = 14) -> TrainConfig:
    """The whole run: see and read, then longer, then minutes, then the indexer, then sparse."""
    return TrainConfig(
        model_dir=model_dir,
        num_workers=num_workers,
        stages=(
            StageConfig(
                "short clips", 900, (12, 16), **HINTS, num_warmup_steps=100, cell_weight_start=0.5, cell_weight_end=0.5
            ),
            StageConfig("clips to 30 s", 2800, STANDARD, **HINTS, cell_weight_start=0.5, cell_weight_end=0.2),
            StageConfig("clips to 5 min", 3200, EVERY, EVERY_WEIGHTS, **HINTS, rate_end=0.35, cell_weight_start=0.2),
            StageConfig(
                "indexer warm-up",
                400,
                SOME,
                SOME_WEIGHTS,
                trains="indexer",
                num_indexer_rows=3072,
                answer_weight=0.0,
                num_warmup_steps=20,
            ),
            StageConfig(
                "sparse adaptation",
                720,
                SOME,
                SOME_WEIGHTS,
                "sparse",
                **HINTS,
                rate_start=0.35,
                rate_end=0.0,
                num_indexer_rows=3072,
            ),
        ),
    )


def smoke(model_dir: str = str(CHECKPOINT)) -> TrainConfig:
    """Two steps of every stage on the shortest clips: the same code on a CPU, in seconds."""
    config = tiny(model_dir, num_workers=0)
    stages = tuple(
        replace(
            stage,
            num_steps=2,
            frame_counts=(8,),
            frame_weights=(),
            num_warmup_steps=0,
            num_indexer_rows=min(64, stage.num_indexer_rows),
        )
        for stage in config.stages
    )
    return replace(config, stages=stages, num_frames_per_step=16, log_every=1)


@dataclass(frozen=True)
class FrameCounts:
    """The clip length of each step, drawn from its stage's list: the same for every worker and every resumed run."""

    config: TrainConfig

    def __call__(self, step: int) -> int:
        stage, _ = self.config.stage_at(min(step, self.config.num_steps - 1))
        weights = np.array(stage.frame_weights or [1.0] * len(stage.frame_counts))
        rng = np.random.default_rng([self.config.seed, step])
        return int(rng.choice(stage.frame_counts, p=weights / weights.sum()))


def with_stage_steps(config: TrainConfig, steps: list[int]) -> TrainConfig:
    """The same run with other stage lengths; 0 leaves a stage out.

    Raises:
        InputError: not one number per stage.
    """
    if len(steps) != len(config.stages):
        names = ", ".join(stage.name for stage in config.stages)
        raise InputError(f"--stage-steps got {len(steps)} numbers; give one for each of: {names}")
    pairs = zip(config.stages, steps, strict=True)
    return replace(config, stages=tuple(replace(stage, num_steps=count) for stage, count in pairs if count))


def run(config: TrainConfig, run_dir: Path, out_dir: Path, stop_after_seconds: float, start_from: Path | None = None) -> bool:
    """Train until finished or out of time; the weights so far are written to `out_dir` either way."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = KeyeModel(KeyeConfig.load(config.model_dir))
    initialise(model, config.seed)
    if start_from is not None:
        model.load_state_dict(load_file(start_from))
    model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    trainer = Trainer(model, config, list(TASKS), NUM_COLOURS, NUM_SPRITES, run_dir)
    stream = StreamConfig(
        config.model_dir, config.seed, config.num_frames_per_step, config.slot_length, FrameCounts(config), num_rounds
    )
    print(f"{count_parameters(model):,} weights, step {trainer.step_number} of {config.num_steps}, on {device}", flush=True)
    is_finished = trainer.run(
        lambda first_step: batches(stream, first_step, config.num_workers, device), stop_after_seconds, on_log=print_figures
    )
    save_model(model, out_dir)
    return is_finished


def print_figures(record: dict) -> None:
    """One line of the log for people."""
    tasks = " ".join(f"{task[:6]} {record[f'exact/{task}']:.2f}" for task in TASKS if f"exact/{task}" in record)
    others = " ".join(
        f"{name} {record[name]:.3f}"
        for name in (
            "answer_loss",
            "cell_loss",
            "sight_loss",
            "hint_0",
            "hint_1",
            "hint_2",
            "hint_3",
            "hint_4",
            "indexer_loss",
            "indexer_recall",
            "indexer_mass",
            "gradient_norm",
            "num_skipped",
        )
        if name in record
    )
    pace = f"{record['ms_per_step']:5.0f} ms ({record['ms_for_batch']:.0f} for the batch)"
    print(f"{record['step']:6d} {record['seconds']:6.0f} s {pace}  {tasks}  {others}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train openkeye-tiny.")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--stop-after-seconds", type=float, default=float("inf"), help="save and leave after this many seconds")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="write the weights here instead of into the package")
    parser.add_argument("--start-from", type=Path, default=None, help="weights (safetensors) of an earlier run to begin with")
    parser.add_argument("--smoke", action="store_true", help="a few steps of every stage on short clips")
    parser.add_argument("--stage-steps", type=int, nargs="+", default=None, help="steps of each stage instead of the recipe's")
    parser.add_argument("--num-workers", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = smoke() if arguments.smoke else tiny(num_workers=arguments.num_workers)
    if arguments.stage_steps is not None:
        config = with_stage_steps(config, arguments.stage_steps)
    is_finished = run(
        replace(config, seed=arguments.seed),
        arguments.run_dir,
        arguments.out,
        arguments.stop_after_seconds,
        arguments.start_from,
    )
    print("finished" if is_finished else "not finished: run the same command again to go on", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
