"""What `benchmarks.video` measures."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import openkeye
from benchmarks.hour_video import long_video
from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.loop import Engine
from openkeye.inputs.sampling import VideoLimits
from openkeye.inputs.video import iterate_frames, request_video
from openkeye.inputs.video_scan import scan_video

FOLDER = Path("runs/video")
DEMO = Path(openkeye.__file__).parent / "media" / "demo.mp4"
QUESTION = "When is the red circle visible?"
FIRST_TOKEN = SamplingParameters(max_new_tokens=1)
GOAL = 1.3
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Clock:
    """Seconds on the wall and of this process on all cores."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> "Clock":
        return cls(time.monotonic(), time.process_time())

    def since(self, start: "Clock") -> "Clock":
        return Clock(self.wall - start.wall, self.cpu - start.cpu)

    def __str__(self) -> str:
        return f"{self.wall:7.1f} s   {self.cpu:7.1f} s of cores"


def decode_alone(path: Path, limits: VideoLimits) -> tuple[Clock, Clock, int]:
    """Reading the packets; decoding the sampled frames; how many they are."""
    start = Clock.now()
    request = request_video(scan_video(path), limits)
    scanned = Clock.now()
    num_frames = sum(1 for _ in iterate_frames(request, request.plan.height, request.plan.width))
    return scanned.since(start), Clock.now().since(scanned), num_frames


def first_token(minutes: int, gop: int, repeats: int) -> None:
    """The mark: both ways one after the other, as often as asked."""
    path = long_video(FOLDER, 720, 1280, minutes, gop=gop)
    # No features are kept: the file repeats its minute, and no picture may be spared for it.
    engine = Engine(device="cpu", config=EngineConfig(vision_cache_bytes=1))
    engine.ask(DEMO, QUESTION)
    print(f"{path.name}, {path.stat().st_size / 1e6:.0f} MB, torch {torch.get_num_threads()} threads", flush=True)
    ratios = []
    for _ in range(repeats):
        scanned, decoded, num_frames = decode_alone(path, engine.processor.video_limits)
        start = Clock.now()
        answer = engine.ask(path, QUESTION, sampling=FIRST_TOKEN)
        asked = Clock.now().since(start)
        ratios.append(asked.wall / decoded.wall)
        print(f"  packets alone            {scanned}")
        print(f"  decoder alone            {decoded}   {num_frames} frames")
        print(f"  question to first token  {asked}   {answer.num_prompt_tokens} tokens, ratio {ratios[-1]:.2f}")
        stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in answer.stage_seconds.items())
        print(f"    of which (side by side) {stages}", flush=True)
    print(f"ratio to the decoder alone: {min(ratios):.2f} to {max(ratios):.2f}, goal <= {GOAL}")


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (highest since `clear_refs`)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def memory(minutes: int) -> None:
    """Peak memory of the full budget."""
    path = long_video(FOLDER, 1080, 1920, minutes)
    engine = Engine(device="cpu", config=EngineConfig(cache_tokens=262_144))
    engine.processor = replace(engine.processor, video_limits=VideoLimits(), max_tokens=262_144)
    caches = engine.runner.caches
    pages = [caches.keys, caches.values, caches.index_keys]
    for cache in pages:
        cache.zero_()
    engine.ask(DEMO, QUESTION, fps=1)
    engine.runner.vision_cache.clear()
    Path("/proc/self/clear_refs").write_text("5")
    start, clock = resident_bytes("VmRSS"), Clock.now()
    answer = engine.ask(path, QUESTION, sampling=FIRST_TOKEN)
    asked, peak = Clock.now().since(clock), resident_bytes("VmHWM")
    kept = engine.runner.vision_cache.num_bytes
    print(f"{path.name}: {answer.num_frames} frames, {answer.num_prompt_tokens} tokens, {asked}")
    print(
        f"  at the start {start / MEBIBYTE:.0f} MiB, of which pages {sum(cache.nbytes for cache in pages) / MEBIBYTE:.0f} MiB"
    )
    print(f"  peak above it {(peak - start) / MEBIBYTE:.0f} MiB, of which encoded pictures kept {kept / MEBIBYTE:.0f} MiB")
    print(f"  above weights and caches {(peak - start - kept) / MEBIBYTE:.0f} MiB")
