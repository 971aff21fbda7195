"""Which moments of a video the model sees, and how large: pure arithmetic of the token budget.

Units: one merged token covers factor x factor pixels (factor = patch size x merge size, 28 as published). Published
arithmetic throughout (spec: 4.1-4.3), with these differences: several videos share one budget, no choice of size ever
passes the budget, and a request's own limits count wherever the defaults would.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from openkeye.common.checks import InputError

MAX_ASPECT_RATIO = 200

ADAPTIVE_TABLES: dict[str, tuple[tuple[int, int], ...]] = {
    "paper": ((256, 125), (512, 250), (1024, 500)),
    "release": ((259, 90), (518, 180), (1036, 360), (2016, 700)),
}
# (longest duration in seconds, share of the budget in thousandths) rows of the report and of the released code; longer
# videos take all.


@dataclass(frozen=True)
class ImageLimits:
    """Size limits of a picture, in pixels, and the grid that its sides must fit."""

    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 20480 * 28 * 28
    factor: int = 28

    def __post_init__(self) -> None:
        _check_range("image", self.min_pixels, self.max_pixels)


@dataclass(frozen=True)
class VideoLimits:
    """Limits of one request's videos; sizes in merged tokens. The defaults are the published ones."""

    fps: float = 2.0
    min_tokens_per_frame: int = 64
    max_tokens_per_frame: int = 256
    total_tokens: int = 184_320
    min_frames: int = 2
    max_frames: int | None = None
    num_frames: int | None = None
    # an exact number of frames instead of a rate; the budget still caps it
    adaptive: str | None = None
    # "paper" or "release": a smaller budget for shorter videos
    factor: int = 28

    def __post_init__(self) -> None:
        _check_range("video tokens per frame", self.min_tokens_per_frame, self.max_tokens_per_frame)
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise InputError(f"fps is {self.fps}: give a rate above 0")
        for name in ("total_tokens", "min_frames", "max_frames", "num_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: give 1 or more")
        if self.adaptive is not None and self.adaptive not in ADAPTIVE_TABLES:
            raise InputError(f"adaptive table {self.adaptive!r} is unknown: choose from {', '.join(ADAPTIVE_TABLES)}")

    def changed(self, **changes: Any) -> "VideoLimits":
        """A copy with some limits replaced (None keeps a limit); min and max give way to each other."""
        given = {name: value for name, value in changes.items() if value is not None}
        unknown = set(given) - {field.name for field in fields(self)}
        if unknown:
            raise InputError(f"unknown video limits {sorted(unknown)}: choose from {[field.name for field in fields(self)]}")
        if "max_tokens_per_frame" in given and "min_tokens_per_frame" not in given:
            given["min_tokens_per_frame"] = min(self.min_tokens_per_frame, given["max_tokens_per_frame"])
        if "min_tokens_per_frame" in given and "max_tokens_per_frame" not in given:
            given["max_tokens_per_frame"] = max(self.max_tokens_per_frame, given["min_tokens_per_frame"])
        return replace(self, **given)


def _check_range(what: str, low: int, high: int) -> None:
    if not 0 < low <= high:
        raise InputError(f"{what} limits {low}..{high}: the lower must be above 0 and not above the upper")


def limits_from_config(preprocessor: Mapping[str, Any], factor: int) -> tuple[ImageLimits, VideoLimits]:
    """Limits of a checkpoint's `preprocessor_config.json`; what it leaves out takes the published defaults.

    Pictures: `min_pixels` and `max_pixels`, or `size.shortest_edge` and `size.longest_edge` (areas, in spite of their names).
    Videos: a table `video` whose keys are the fields of `VideoLimits`.
    """
    size = preprocessor.get("size") or {}
    area = factor * factor
    image = ImageLimits(
        min_pixels=int(preprocessor.get("min_pixels") or size.get("shortest_edge") or 4 * area),
        max_pixels=int(preprocessor.get("max_pixels") or size.get("longest_edge") or 20480 * area),
        factor=factor,
    )
    return image, VideoLimits(factor=factor).changed(**preprocessor.get("video", {}))


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Sides (height, width) in multiples of `factor`, nearest to the picture's own, with an area in the limits (spec: 4.1).

    Where rounding up to the minimum or the smallest side of one factor would pass `max_pixels`, the maximum wins.
    """
    if min(height, width) < 1:
        raise InputError(f"picture of {width}x{height} pixels: both sides must be at least 1")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise InputError(
            f"picture of {width}x{height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other; crop it first"
        )
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        new_height = max(factor, math.ceil(height * scale / factor) * factor)
        new_width = max(factor, math.ceil(width * scale / factor) * factor)
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    if new_height * new_width > max_pixels:
        longest = max(factor, max_pixels // (factor * factor) * factor)
        new_height, new_width = min(new_height, longest), min(new_width, longest)
    return new_height, new_width


@dataclass(frozen=True)
class VideoPlan:
    """What will be taken from one video."""

    num_frames: int
    height: int
    width: int
    tokens_per_frame: int
    tokens: int
    # of all frames; never above budget
    budget: int
    seconds_between_frames: float
    # mean spacing; 0 for a single frame
    frame_indices: np.ndarray
    # [num_frames] int64, of the file's own frames


def video_budget(limits: VideoLimits, duration_seconds: float, num_videos: int = 1) -> float:
    """Tokens that one of `num_videos` videos may take (spec: 4.3; report, adaptive video pixel budget)."""
    budget = limits.total_tokens / num_videos
    # The released code knows its table for a single video only; the report multiplies each video's share.
    if limits.adaptive is None or (limits.adaptive == "release" and num_videos > 1):
        return budget
    for longest_seconds, thousandths in ADAPTIVE_TABLES[limits.adaptive]:
        if duration_seconds <= longest_seconds:
            return budget * thousandths / 1000
    return budget


def plan_video(
    height: int, width: int, num_frames: int, fps: float, limits: VideoLimits, num_videos: int = 1, source: str = "video"
) -> VideoPlan:
    """Frames and size for a video of `num_frames` frames of height x width pixels at `fps` frames a second on average.

    Raises InputError for a video without frames, an absurd shape, or a budget below one frame.
    """
    if num_frames < 1 or not (math.isfinite(fps) and fps > 0):
        raise InputError(f"{source}: {num_frames} frames at {fps} frames a second; a video needs at least one frame and a rate")
    if num_videos < 1:
        raise InputError(f"{num_videos} videos: give 1 or more")
    duration_seconds = num_frames / fps
    budget = video_budget(limits, duration_seconds, num_videos)
    most_in_budget = max(1, math.floor(budget / limits.min_tokens_per_frame))
    wanted = limits.num_frames or int(duration_seconds * min(limits.fps, fps))
    num_taken = min(max(wanted, limits.min_frames), most_in_budget, num_frames)
    if limits.max_frames is not None:
        num_taken = min(num_taken, limits.max_frames)
    # The published bisection returns the first size past the budget; the largest one inside it is a division.
    tokens_allowed = min(limits.max_tokens_per_frame, math.floor(budget / num_taken))
    if tokens_allowed < 1:
        raise InputError(f"{source}: a budget of {budget:.0f} tokens cannot hold one frame; raise total_tokens")
    area = limits.factor * limits.factor
    min_pixels = min(limits.min_tokens_per_frame, tokens_allowed) * area
    try:
        new_height, new_width = smart_resize(height, width, limits.factor, min_pixels, tokens_allowed * area)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    tokens_per_frame = new_height * new_width // area
    return VideoPlan(
        num_frames=num_taken,
        height=new_height,
        width=new_width,
        tokens_per_frame=tokens_per_frame,
        tokens=tokens_per_frame * num_taken,
        budget=math.floor(budget),
        seconds_between_frames=(num_frames - 1) / (num_taken - 1) / fps if num_taken > 1 else 0.0,
        frame_indices=evenly_spaced(num_frames, num_taken),
    )


def evenly_spaced(num_frames: int, num_taken: int) -> np.ndarray:
    """[num_taken] int64: evenly spaced indices over 0..num_frames-1, both ends included, ties to even (spec: 4.3)."""
    return np.rint(np.linspace(0, num_frames - 1, num_taken)).astype(np.int64)
