"""Times whole training steps of openkeye-tiny by clip length and attention, and where a step goes.

python -m benchmarks.training_steps [--frames 16 60 600] [--steps 10]
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from openkeye.data.slots.frameforge_stream import (
    NUM_COLOURS,
    NUM_SPRITES,
    TASKS,
    ClipText,
    StreamConfig,
    make_host_batch,
    to_device,
)
from openkeye.inputs.processor import Processor
from openkeye.model.config import KeyeConfig
from openkeye.model.keye import KeyeModel
from openkeye.train.initialise import initialise
from openkeye.train.slots.config import StageConfig
from openkeye.train.slots.loop import Trainer
from recipes.tiny import num_rounds, tiny


def main() -> None:
    parser = argparse.ArgumentParser(description="Time training steps.")
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 60, 600])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="also list the ten costliest operations of one step")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = tiny()
    model = KeyeModel(KeyeConfig.load(config.model_dir))
    initialise(model, 0)
    model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    trainer = Trainer(model, config, list(TASKS), NUM_COLOURS, NUM_SPRITES, Path("runs/bench"))
    text = ClipText(Processor.load(config.model_dir))

    print("| frames | attention | draw ms | step ms | draw and step ms | peak GiB |\n|---|---|---|---|---|---|")
    with trainer.graphs.on_stream():
        time_steps(arguments, trainer, text, device)


def time_steps(arguments: argparse.Namespace, trainer: Trainer, text: ClipText, device: str) -> None:
    """One row for every clip length and attention."""
    config = trainer.config

    def synchronise() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def mean_ms(work: Callable[[], object]) -> float:
        synchronise()
        start = time.perf_counter()
        for _ in range(arguments.steps):
            work()
        synchronise()
        return 1000 * (time.perf_counter() - start) / arguments.steps

    for frames in arguments.frames:
        stream = StreamConfig(
            config.model_dir, 0, config.num_frames_per_step, config.slot_length, lambda _, frames=frames: frames, num_rounds
        )
        host_batch = make_host_batch(stream, text, 0)
        for attention, rows in (("dense", 0), ("sparse", 3072)):
            stage = StageConfig("bench", 100, (frames,), attention=attention, num_indexer_rows=rows, cell_weight_start=0.5)
            batch = to_device(host_batch, device)
            # Step 1 of a stage keeps no extra figures; a few runs compile and record it.
            for _ in range(4):
                trainer.step(batch, stage, 1)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            draw = mean_ms(lambda host_batch=host_batch: to_device(host_batch, device))
            step = mean_ms(lambda batch=batch, stage=stage: trainer.step(batch, stage, 1))
            both = mean_ms(lambda host_batch=host_batch, stage=stage: trainer.step(to_device(host_batch, device), stage, 1))
            peak = torch.cuda.max_memory_reserved() / 2**30 if device == "cuda" else 0.0
            print(f"| {frames} | {attention} | {draw:.1f} | {step:.1f} | {both:.1f} | {peak:.1f} |", flush=True)
            if arguments.profile:
                activities = [torch.profiler.ProfilerActivity.CPU]
                if device == "cuda":
                    activities.append(torch.profiler.ProfilerActivity.CUDA)
                with torch.profiler.profile(activities=activities) as profile:
                    trainer.step(batch, stage, 1)
                    synchronise()
                key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
                print(profile.key_averages().table(sort_by=key, row_limit=14, max_name_column_width=60), flush=True)


if __name__ == "__main__":
    main()
