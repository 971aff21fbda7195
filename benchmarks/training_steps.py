"""Times whole training steps of openkeye-tiny by clip length and attention, and where a step goes.

python -m benchmarks.training_steps [--frames 16 60 600] [--steps 10]
"""

import argparse
import time
from pathlib import Path

import torch

from openkeye.data.frameforge_stream import NUM_COLOURS, NUM_SPRITES, TASKS, ClipText, StreamConfig, make_host_batch, to_device
from openkeye.inputs.processor import Processor
from openkeye.model.config import KeyeConfig
from openkeye.model.keye import KeyeModel
from openkeye.train.config import StageConfig
from openkeye.train.initialise import initialise
from openkeye.train.loop import Trainer
from recipes.tiny import tiny


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

    def synchronise() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    print("| frames | attention | draw ms | step ms | peak GiB |\n|---|---|---|---|---|")
    for frames in arguments.frames:
        shape = (config.num_frames_per_step, config.num_slots, config.slot_length)
        stream = StreamConfig(config.model_dir, 0, *shape, lambda _, frames=frames: frames)
        host_batch = make_host_batch(stream, text, 0)
        for attention, rows in (("dense", 0), ("sparse", 96)):
            stage = StageConfig("bench", 100, (frames,), attention=attention, num_indexer_rows=rows, cell_weight_start=0.5)
            batch = to_device(host_batch, device)
            for _ in range(3):
                trainer.step(batch, stage, 0)
            synchronise()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            for _ in range(arguments.steps):
                batch = to_device(host_batch, device)
            synchronise()
            draw = (time.perf_counter() - start) / arguments.steps
            start = time.perf_counter()
            for _ in range(arguments.steps):
                trainer.step(batch, stage, 0)
            synchronise()
            step = (time.perf_counter() - start) / arguments.steps
            peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
            print(f"| {frames} | {attention} | {1000 * draw:.1f} | {1000 * step:.1f} | {peak:.1f} |", flush=True)
            if arguments.profile:
                activities = [torch.profiler.ProfilerActivity.CPU]
                if device == "cuda":
                    activities.append(torch.profiler.ProfilerActivity.CUDA)
                with torch.profiler.profile(activities=activities) as profile:
                    trainer.step(batch, stage, 0)
                    synchronise()
                key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
                print(profile.key_averages().table(sort_by=key, row_limit=14, max_name_column_width=60), flush=True)


if __name__ == "__main__":
    main()
