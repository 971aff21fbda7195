"""Video files to `Frames`: the pictures shown at the requested moments, each with its own time, resized while decoding."""

import threading
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path

import av
import numpy as np

from openkeye.common.checks import InputError
from openkeye.inputs.picture_hash import picture_hash
from openkeye.inputs.sampling import VideoLimits, VideoPlan, evenly_spaced, plan_video
from openkeye.inputs.video_scan import VideoScan, open_video, scan_video

Progress = Callable[[int, int], None]
# called with (frames done, frames in all)

TIME_DIGITS = 6
# decimals of a stated time: finer than any container's clock, coarse enough to hide binary fractions

LONGEST_STEP_SECONDS = 4
# how far before the first frame a seek may aim before the frame counts as undecodable


@dataclass(frozen=True)
class Frames:
    """Sampled pictures of one video, all of one size."""

    pixels: np.ndarray
    # [N, H, W, 3] uint8
    times_seconds: list[float]
    # when each picture begins to be shown, from the stream's first frame
    source: str
    duration_seconds: float
    notes: list[str] = field(default_factory=list)
    # what a user should know: truncated file, damaged frames, ...

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.pixels.dtype != np.uint8 or len(self.times_seconds) != self.pixels.shape[0]:
            raise ValueError(
                f"Frames need uint8 pixels [N, H, W, 3] and N times, got {self.pixels.dtype} {self.pixels.shape} "
                f"and {len(self.times_seconds)} times"
            )

    @property
    def picture_size(self) -> tuple[int, int]:
        """(height, width), known without the pixels where a subclass makes them when first asked."""
        return int(self.pixels.shape[1]), int(self.pixels.shape[2])

    @cached_property
    def hashes(self) -> list[str]:
        """Of each picture (`picture_hash`), made once for all prompts that hold this video."""
        return [picture_hash(picture) for picture in self.pixels]

    def until(self, seconds: float) -> "Frames":
        """The frames shown up to a moment, one at least."""
        num_kept = max(1, sum(time <= seconds for time in self.times_seconds))
        return Frames(self.pixels[:num_kept], self.times_seconds[:num_kept], self.source, self.duration_seconds, self.notes)


@dataclass(frozen=True)
class VideoRequest:
    """A scanned video and what will be taken from it: known before any picture is decoded."""

    scan: VideoScan
    plan: VideoPlan
    frame_numbers: np.ndarray
    # [N] int64 into the scan's frames, increasing

    @property
    def times_seconds(self) -> list[float]:
        """When each requested frame is shown."""
        return [_seconds(self.scan, pts) for pts in self.scan.pts_F[self.frame_numbers].tolist()]

    @property
    def source(self) -> str:
        """The video's name in errors and notes."""
        return self.scan.source

    @property
    def duration_seconds(self) -> float:
        """Of the whole video."""
        return self.scan.duration_seconds


def request_video(
    scan: VideoScan,
    limits: VideoLimits,
    num_videos: int = 1,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
) -> VideoRequest:
    """Choose frames and their size (spec: 4.3) in the asked part of the video; both ends are included."""
    first, last = _window(scan, start_seconds, end_seconds, limits.fps)
    times_F = scan.times_seconds_F[first : last + 1]
    num_frames = len(times_F)
    fps = scan.fps
    if not scan.is_constant_rate and num_frames > 1:
        fps = num_frames / (times_F[-1] - times_F[0] + scan.last_frame_seconds)
    plan = plan_video(scan.height, scan.width, num_frames, fps, limits, num_videos, scan.source)
    if scan.is_constant_rate or plan.num_frames == num_frames:
        numbers = evenly_spaced(num_frames, plan.num_frames)
    else:
        # Even moments in time; a tenth of a millisecond forgives rounding at a frame's very start.
        moments = np.linspace(times_F[0], times_F[-1], plan.num_frames) + 1e-4
        numbers = np.unique(np.searchsorted(times_F, moments, side="right") - 1)
    return VideoRequest(scan, plan, first + numbers)


def _window(scan: VideoScan, start_seconds: float | None, end_seconds: float | None, fps: float) -> tuple[int, int]:
    """Numbers of the first and the last frame of the asked part."""
    start = 0.0 if start_seconds is None else start_seconds
    end = scan.duration_seconds if end_seconds is None else end_seconds
    if not 0.0 <= start < scan.duration_seconds:
        raise InputError(
            f"{scan.source}: start {start:g} s is outside the video; give a start from 0 to below {scan.duration_seconds:.2f} s"
        )
    if not end > start:
        raise InputError(f"{scan.source}: end {end:g} s is not after start {start:g} s; give an end past the start")
    times_F = scan.times_seconds_F
    shown_at_start = max(0, int(np.searchsorted(times_F, start + 1e-4, side="right")) - 1)
    first = int(np.searchsorted(times_F, start - 1e-4))
    last = int(np.searchsorted(times_F, end + 1e-4, side="right")) - 1
    # Where the next frame is long in coming (a held picture), the one on screen at the start belongs to the part.
    if first > last or times_F[first] - start > 1.0 / fps:
        first = shown_at_start
    return first, max(first, last)


def read_video(
    path: str | Path,
    limits: VideoLimits | None = None,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    on_progress: Progress | None = None,
    num_videos: int = 1,
) -> Frames:
    """Sample a video file within `limits` (the published ones by default), at the model's size.

    Raises InputError, one line naming the file and the mend, for anything that is not a video that decodes.
    """
    request = request_video(scan_video(Path(path)), limits or VideoLimits(), num_videos, start_seconds, end_seconds)
    return read_request(request, on_progress)


def read_request(request: VideoRequest, on_progress: Progress | None = None) -> Frames:
    """Decode what a request asks for. Frames that are damaged beyond decoding are left out, and a note says so."""
    plan, scan = request.plan, request.scan
    num_wanted = len(request.frame_numbers)
    pixels = np.empty((num_wanted, plan.height, plan.width, 3), dtype=np.uint8)
    times: list[float] = []
    health = DecodeHealth()
    for picture, seconds in iterate_frames(request, plan.height, plan.width, health):
        pixels[len(times)] = picture
        times.append(seconds)
        if on_progress is not None:
            on_progress(len(times), num_wanted)
    if not times:
        raise InputError(f"{scan.source}: none of the {num_wanted} sampled frames can be decoded; the file is damaged")
    notes = [*scan.notes, *health.notes(num_wanted - len(times))]
    return Frames(pixels[: len(times)], times, scan.source, scan.duration_seconds, notes)


@dataclass
class DecodeHealth:
    """What went wrong while decoding, counted."""

    num_bad_packets: int = 0
    num_damaged_frames: int = 0
    num_held: int = 0
    # frames in whose place another picture stands (`iterate_shown`)
    stop: threading.Event = field(default_factory=threading.Event)
    # set by whoever wants no more frames, on any thread: no further packet is decoded

    def notes(self, num_missing: int = 0) -> list[str]:
        """Lines for the user; none for a clean file."""
        notes = []
        if self.num_bad_packets:
            notes.append(f"{self.num_bad_packets} packets could not be decoded and were skipped")
        if self.num_damaged_frames:
            notes.append(f"{self.num_damaged_frames} sampled frames are damaged")
        if num_missing:
            notes.append(f"{num_missing} sampled frames are missing because the file is damaged there")
        if self.num_held:
            notes.append(f"{self.num_held} sampled frames cannot be decoded; the picture before stands in for each")
        return notes


def iterate_frames(
    request: VideoRequest, height: int, width: int, health: DecodeHealth | None = None
) -> Generator[tuple[np.ndarray, float]]:
    """(picture [height, width, 3] uint8, seconds) of each requested frame, in order; memory holds one at a time."""
    health = health if health is not None else DecodeHealth()
    scan = request.scan
    targets = scan.pts_F[request.frame_numbers]
    with open_video(scan.source, scan.content) as (container, stream):
        stream.thread_type = "AUTO"
        chosen = _seeking if _is_sparse(scan, targets) else _sequential
        for pts, frame in chosen(container, stream, scan, targets.tolist(), health):
            health.num_damaged_frames += frame.is_corrupt
            yield _picture(frame, height, width, scan.quarter_turns), _seconds(scan, pts)


def iterate_shown(request: VideoRequest, health: DecodeHealth) -> Generator[np.ndarray]:
    """One picture for each requested frame, in order, [height, width, 3] uint8 of the plan; memory holds two at a time.

    For whom the number of frames is settled: where one cannot be decoded, the picture before it stays, as on a player's screen
    (at the beginning: the first that can be decoded). Of a whole file they are those of `read_request`, to the byte.

    Raises:
        InputError: no frame can be decoded.
    """
    times, plan = request.times_seconds, request.plan
    held: np.ndarray | None = None
    num_given = 0
    with closing(iterate_frames(request, plan.height, plan.width, health)) as decoded:
        for picture, seconds in decoded:
            number = bisect_left(times, seconds)
            if number < num_given:
                # Older than what was shown: a seek that went astray.
                continue
            health.num_held += number - num_given + (seconds != times[number])
            for _ in range(num_given, number):
                yield picture if held is None else held
            yield picture
            held, num_given = picture, number + 1
    if health.stop.is_set():
        return
    if held is None:
        raise InputError(f"{request.source}: none of the {len(times)} sampled frames can be decoded; the file is damaged")
    health.num_held += len(times) - num_given
    for _ in range(num_given, len(times)):
        yield held


def _seconds(scan: VideoScan, pts: int) -> float:
    """From the first frame, rounded as every stated time is."""
    return round(float((pts - int(scan.pts_F[0])) * scan.time_base), TIME_DIGITS)


def _picture(frame: av.VideoFrame, height: int, width: int, quarter_turns: int) -> np.ndarray:
    if quarter_turns % 2:
        height, width = width, height
    resized = frame.reformat(width=width, height=height, format="rgb24", interpolation="BICUBIC")
    return np.ascontiguousarray(np.rot90(resized.to_ndarray(), quarter_turns))


def _is_sparse(scan: VideoScan, targets: np.ndarray) -> bool:
    """Whether seeking pays: samples stand further apart than keyframes, and times survive a seek."""
    if scan.is_counted or len(targets) < 2 or len(scan.key_pts) < 2:
        return False
    keyframe_spacing = (scan.pts_F[-1] - scan.key_pts[0]) / len(scan.key_pts)
    return bool((targets[-1] - targets[0]) / (len(targets) - 1) > 1.5 * keyframe_spacing)


def _decoded(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, scan: VideoScan, health: DecodeHealth
) -> Iterator[tuple[int, av.VideoFrame]]:
    """(pts, frame) from the container's place on, in the order shown; damaged packets are counted and skipped."""
    number = 0
    for packet in _packets(container, stream):
        if health.stop.is_set():
            return
        try:
            frames = stream.decode(packet)
        except av.error.FFmpegError:
            health.num_bad_packets += 1
            number += 1
            continue
        for frame in frames:
            if scan.is_counted and number < len(scan.pts_F):
                yield int(scan.pts_F[number]), frame
            elif not scan.is_counted and frame.pts is not None and frame.pts <= scan.pts_F[-1]:
                yield frame.pts, frame
            number += 1


def _packets(container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> Iterator[av.Packet | None]:
    """Packets up to the end or to the first that cannot be read (the scan has its note); None lets the decoder empty itself."""
    packets = container.demux(stream)
    while True:
        try:
            yield next(packets)
        except StopIteration:
            return
        except av.error.FFmpegError:
            yield None
            return


def _sequential(
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    scan: VideoScan,
    targets: list[int],
    health: DecodeHealth,
) -> Iterator[tuple[int, av.VideoFrame]]:
    """One pass from the start (or the last keyframe before the first target): each target's frame, or the one shown then."""
    if scan.is_counted or targets[0] == scan.pts_F[0]:
        frames = _decoded(container, stream, scan, health)
    else:
        frames = _decoded_before(container, stream, scan, targets[0], health)
    yield from _pick(frames, targets)


def _pick(frames: Iterator[tuple[int, av.VideoFrame]], targets: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """The frame shown at each target, each frame once."""
    shown: tuple[int, av.VideoFrame] | None = None
    index = 0
    for pts, frame in frames:
        while index < len(targets) and pts > targets[index]:
            if shown is not None:
                yield shown
                shown = None
            index += 1
        if index == len(targets):
            return
        if pts == targets[index]:
            yield pts, frame
            shown = None
            index += 1
            if index == len(targets):
                return
        else:
            shown = (pts, frame)
    if shown is not None:
        yield shown


def _seeking(
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    scan: VideoScan,
    targets: list[int],
    health: DecodeHealth,
) -> Iterator[tuple[int, av.VideoFrame]]:
    """A seek per target."""
    last_pts: int | None = None
    for target in targets:
        if health.stop.is_set():
            return
        found = next(_pick(_decoded_before(container, stream, scan, target, health), [target]), None)
        if found is not None and found[0] != last_pts:
            last_pts = found[0]
            yield found


def _decoded_before(
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    scan: VideoScan,
    target: int,
    health: DecodeHealth,
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames from the last keyframe not after `target` on.

    Seeking is inexact in some containers (MPEG-TS): where the first frame met is past the target, step back 1, 2, 4, ...
    seconds and retry.
    """
    step_seconds = 0
    while True:
        aim = target - int(step_seconds / scan.time_base)
        key = int(np.searchsorted(scan.key_pts, aim, side="right")) - 1
        container.seek(int(scan.key_pts[key]) if key >= 0 else aim, stream=stream, backward=True, any_frame=False)
        frames = _decoded(container, stream, scan, health)
        first = next(frames, None)
        if first is not None and first[0] <= target:
            return chain([first], frames)
        if (scan.pts_F[0] - aim) * scan.time_base > LONGEST_STEP_SECONDS:
            return frames if first is None else chain([first], frames)
        step_seconds = max(1, 2 * step_seconds)
