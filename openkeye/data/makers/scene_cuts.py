"""Finds hard cuts in a video, frame by frame.

Between neighbouring frames, each shrunk to 64 x 36 pixels, two distances in 0..1 are averaged: half the absolute difference of
their colour histograms (8 x 8 x 8 bins of RGB: what is seen) and the mean absolute difference of luma (where it is seen),
four times enlarged, since two unlike pictures differ by about a quarter. A cut is a distance that reaches `least_distance` and
is `ratio` times the largest other one within `window_seconds`: a busy shot raises its own threshold, and a flash, which jumps
there and back, is none. Fades and dissolves are not found, nor is the weaker of two cuts within the window.
"""

from dataclasses import dataclass, replace

import numpy as np

from openkeye.common.checks import InputError
from openkeye.inputs.sampling import VideoLimits
from openkeye.inputs.video import iterate_frames, request_video
from openkeye.inputs.video_scan import VideoScan

HEIGHT, WIDTH = 36, 64
NUM_BINS = 8
# of each colour
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
LUMA_SCALE = 4.0


@dataclass(frozen=True)
class CutDetector:
    """When a change between two frames is a cut."""

    least_distance: float = 0.2
    ratio: float = 2.0
    window_seconds: float = 0.5
    max_fps: float = 30.0
    # of faster videos every second, third, ... frame is looked at

    def __post_init__(self) -> None:
        if not (0.0 < self.least_distance <= 1.0 and self.ratio >= 1.0 and self.window_seconds > 0 and self.max_fps > 0):
            raise InputError(f"{self}: give a least distance in 0..1, a ratio from 1 on, a window and a rate above 0")


def find_cuts(scan: VideoScan, detector: CutDetector | None = None) -> list[float]:
    """Seconds at which a new scene begins, ascending: the time of its first frame; the video's beginning is not among them.

    Raises:
        InputError: no frame can be decoded.
    """
    detector = detector or CutDetector()
    step = max(1, int(scan.fps / detector.max_fps))
    request = replace(
        request_video(scan, VideoLimits(num_frames=1)), frame_numbers=np.arange(0, len(scan.pts_F), step, dtype=np.int64)
    )
    times: list[float] = []
    distances: list[float] = []
    before: tuple[np.ndarray, np.ndarray] | None = None
    for picture, seconds in iterate_frames(request, HEIGHT, WIDTH):
        now = _histogram(picture), picture.astype(np.float32) @ LUMA
        if before is not None:
            times.append(seconds)
            distances.append(_distance(before, now))
        before = now
    if before is None:
        raise InputError(f"{scan.source}: none of its frames can be decoded; the file is damaged")
    return choose_cuts(np.array(times), np.array(distances), detector)


def choose_cuts(times_D: np.ndarray, distances_D: np.ndarray, detector: CutDetector) -> list[float]:
    """Of D distances, each between the frame at its time and the one before, the times of those that are cuts."""
    cuts = []
    for number in np.flatnonzero(distances_D >= detector.least_distance):
        near = np.abs(times_D - times_D[number]) <= detector.window_seconds
        near[number] = False
        if distances_D[number] >= detector.ratio * distances_D[near].max(initial=0.0):
            cuts.append(float(times_D[number]))
    return cuts


def scenes_between(
    cuts: list[float], duration_seconds: float, min_seconds: float, max_seconds: float
) -> list[tuple[float, float]]:
    """(start, end) of scenes that cover a video: short ones join the scene before, long ones are cut evenly."""
    edges = [0.0]
    for cut in cuts:
        if cut - edges[-1] >= min_seconds and duration_seconds - cut >= min_seconds:
            edges.append(cut)
    scenes = []
    for start, end in zip(edges, [*edges[1:], duration_seconds], strict=True):
        pieces = np.linspace(start, end, int(np.ceil((end - start) / max_seconds)) + 1).round(3).tolist()
        scenes += list(zip([start, *pieces[1:-1]], [*pieces[1:-1], end], strict=True))
    return scenes


def _histogram(picture: np.ndarray) -> np.ndarray:
    """[NUM_BINS ** 3] shares of the pixels of a picture [H, W, 3]."""
    bins = picture.astype(np.int64) * NUM_BINS // 256
    joint = (bins[..., 0] * NUM_BINS + bins[..., 1]) * NUM_BINS + bins[..., 2]
    return np.bincount(joint.ravel(), minlength=NUM_BINS**3) / joint.size


def _distance(before: tuple[np.ndarray, np.ndarray], now: tuple[np.ndarray, np.ndarray]) -> float:
    colour = float(np.abs(before[0] - now[0]).sum()) / 2
    luma = float(np.abs(before[1] - now[1]).mean()) / 255
    return (colour + min(1.0, LUMA_SCALE * luma)) / 2
