"""Clips as real H.264 files with their questions as JSON lines; everything is a function of (seed, index, tier)."""

import json
import os
import signal
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from openkeye.common.checks import InputError, writing_to
from openkeye.frameforge.catalogue import COLOUR_NAMES, SPRITES, TEXTURES
from openkeye.frameforge.needles import Needle, make_needle, make_sparse_scene
from openkeye.frameforge.questions import Question, make_questions
from openkeye.frameforge.render import render, scene_job
from openkeye.frameforge.scene import Scene, SceneSettings, make_scene
from openkeye.frameforge.stream import FILE_SPACE

SAMPLED_FPS = 2.0
# at which the answers' words are stated


@dataclass(frozen=True)
class Tier:
    """How long the clips are and how they are filmed."""

    seconds: tuple[float, float]
    fps: int
    side: int
    # pixels
    number: int
    # part of every seed: a new tier must not change the clips of others
    min_event_seconds: float = 2.0
    is_sparse: bool = False
    # a few short events (`needles.make_sparse_scene`)
    num_rounds: int = 1
    # of questions


TIERS = {
    "standard": Tier((8.0, 30.0), 10, 168, 1, min_event_seconds=1.5),
    "long": Tier((60.0, 300.0), 6, 128, 0),
    "hour": Tier((3600.0, 3600.0), 2, 128, 2, is_sparse=True, num_rounds=2),
}
NEEDLE_NUMBER = 3
# the place of `needle_of` among the tiers' seeds


@dataclass(frozen=True)
class Clip:
    """One clip before it is filmed."""

    name: str
    scene: Scene
    questions: list[Question]
    num_frames: int
    tier: Tier

    @property
    def duration_seconds(self) -> float:
        return self.num_frames / self.tier.fps


@dataclass(frozen=True)
class ClipFile:
    """One clip on disk."""

    path: Path
    duration_seconds: float
    questions: list[Question]


def make_clip(seed: int, index: int, tier_name: str = "standard", seconds: tuple[float, float] | None = None) -> Clip:
    """The scene and questions of one clip; never one that training has seen (`stream.FILE_SPACE`).

    Raises:
        InputError: the hour tier with clips of less than a minute.
    """
    tier = TIERS[tier_name]
    rng = np.random.default_rng([FILE_SPACE, seed, index, tier.number])
    num_frames = round(float(rng.uniform(*(seconds or tier.seconds))) * tier.fps)
    if tier.is_sparse:
        scene = make_sparse_scene(rng, 0.0, num_frames / tier.fps)
    else:
        scene = make_scene(rng, 0.0, num_frames / tier.fps, SceneSettings(tier.min_event_seconds))
    # The even sampling of a file at 2 frames a second: both ends included, nearest frames of the file.
    num_sampled = max(2, int(num_frames / tier.fps * SAMPLED_FPS))
    sampled = np.rint(np.linspace(0, num_frames - 1, num_sampled)) / tier.fps
    questions = make_questions(scene, rng, sampled, tier.num_rounds)
    return Clip(f"{tier_name}-{seed}-{index:05d}.mp4", scene, questions, num_frames, tier)


def needle_of(seed: int, index: int, minutes: float, depth: float, fps: float = SAMPLED_FPS) -> Needle:
    """A video with one needle, never one that training has seen; (seed, index) looks the same at every length and depth."""
    return make_needle(np.random.default_rng([FILE_SPACE, seed, index, NEEDLE_NUMBER]), minutes, depth, fps)


def film(clip: Clip, path: Path) -> None:
    """Write the clip as H.264 (yuv420p, constant quality), a few seconds of frames in memory at a time.

    The file has its name only when it is whole.
    """
    part = path.with_suffix(".part")
    try:
        _encode(clip, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _encode(clip: Clip, path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=clip.tier.fps, options={"crf": "20", "preset": "veryfast"})
        stream.width = stream.height = clip.tier.side
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, clip.tier.fps)
        stream.codec_context.thread_count = 1
        for start in range(0, clip.num_frames, 64):
            times = np.arange(start, min(start + 64, clip.num_frames)) / clip.tier.fps
            for picture in render(scene_job(clip.scene, times), clip.tier.side, "cpu").numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def clip_record(clip: Clip) -> dict[str, Any]:
    """Everything known about a clip, as plain data."""
    tracks = [
        {
            "sprite": SPRITES[track.sprite],
            "colour": COLOUR_NAMES[track.colour],
            "texture": TEXTURES[track.texture],
            "intervals_seconds": track.intervals,
            "path": track.path,
            "direction": track.direction,
            "turn_seconds": track.turn_seconds,
        }
        for track in clip.scene.tracks
    ]
    return {
        "video": clip.name,
        "duration_seconds": clip.duration_seconds,
        "questions": [asdict(question) for question in clip.questions],
        "background": clip.scene.background.kind,
        "tracks": tracks,
    }


def question_from_record(record: dict[str, Any]) -> Question:
    """The inverse of what `clip_record` makes of a question."""
    intervals = tuple((float(first), float(last)) for first, last in record["intervals"])
    mentions = tuple((int(track), str(name)) for track, name in record["mentions"])
    return Question(**(record | {"intervals": intervals, "mentions": mentions}))


def write_clips(
    out_dir: Path, num: int, seed: int, tier: str = "standard", seconds: tuple[float, float] | None = None, num_workers: int = 1
) -> Generator[ClipFile, None, None]:
    """Film clips 0..num-1 in worker processes, in order; `clips.jsonl` grows with every clip that is yielded.

    Raises:
        InputError: the folder cannot be written; a negative seed; less than one worker.
    """
    if seed < 0:
        raise InputError(f"the seed is {seed}; give a whole number from 0")
    if num_workers < 1:
        raise InputError(f"the number of workers is {num_workers}; give at least 1")
    jobs = [(out_dir, seed, index, tier, seconds) for index in range(num)]
    with ExitStack() as stack:
        with writing_to(out_dir):
            out_dir.mkdir(parents=True, exist_ok=True)
            lines = stack.enter_context((out_dir / "clips.jsonl").open("w", buffering=1))
        pool = ProcessPoolExecutor(
            num_workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        )
        # Whoever stops early waits for the clips being filmed, not for all that were ordered.
        stack.callback(pool.shutdown, cancel_futures=True)
        with _deaf_to_ctrl_c():
            written = pool.map(_write_one, jobs)
        for _ in jobs:
            with writing_to(out_dir):
                line = next(written)
                lines.write(line + "\n")
            yield _clip_file(out_dir, line)


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C, which reaches the whole group: the parent alone decides what to do about it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _write_one(job: tuple[Path, int, int, str, tuple[float, float] | None]) -> str:
    out_dir, seed, index, tier, seconds = job
    clip = make_clip(seed, index, tier, seconds)
    film(clip, out_dir / clip.name)
    return json.dumps(clip_record(clip))


def _clip_file(folder: Path, line: str) -> ClipFile:
    record = json.loads(line)
    questions = [question_from_record(question) for question in record["questions"]]
    return ClipFile(folder / record["video"], record["duration_seconds"], questions)


def read_clips(folder: Path) -> list[ClipFile]:
    """The clips that `write_clips` left in a folder.

    Raises:
        InputError: a line of `clips.jsonl` is not a clip's record.
    """
    index = folder / "clips.jsonl"
    clips = []
    for number, line in enumerate(index.read_text().splitlines(), 1):
        try:
            clips.append(_clip_file(folder, line))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{index}: line {number} is not a clip's record ({error}); make the clips again with `openkeye frameforge make`"
            ) from error
    return clips
