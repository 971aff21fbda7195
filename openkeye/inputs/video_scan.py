"""One pass over a video's packets, without decoding: when each frame is shown, which are keyframes, how large they are.

The pass answers what headers leave open or state wrongly: variable frame rates, edit lists, late starts, missing or
invented durations, truncated files. Times count from the first shown frame, wherever the container's clock stands.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from openkeye.common.checks import InputError
from openkeye.inputs.mp4_index import check_mp4_index

REFUSED_FORMATS = {"tty": "a text file", "hls": "a playlist", "dash": "a playlist", "concat": "a playlist"}
# What the demuxer also opens, though it is no video file.

LONGEST_BROADCAST_GAP_SECONDS = 60

MAX_FRAMES = 1 << 21
# 19 hours of 30 a second
MAX_FRAME_PIXELS = 8192 * 4608
# 8K in every form; a decoder holds up to 17 such frames
MAX_CHEAP_PIXELS = 1 << 35
MAX_PIXELS_PER_BYTE = 1 << 18
# Of longer videos. A still picture in 4K keeps below: 8 million pixels take at least some 40 bytes a frame. What is packed
# more tightly was made to keep a decoder busy.


@dataclass(frozen=True)
class VideoScan:
    """What the packets of a video tell. F frames in the order shown."""

    source: str
    content: Path | bytes
    pts_F: np.ndarray
    # [F] int64, increasing, in units of time_base
    key_pts: np.ndarray
    # [keyframes] int64, increasing
    time_base: Fraction
    height: int
    width: int
    # as shown: after rotation
    quarter_turns: int
    # counter-clockwise, 0..3
    fps: float
    # average
    last_frame_seconds: float
    # how long the last frame is shown
    is_counted: bool
    # frame times are known by the frame's number only: the file stores none that survive decoding (avi, raw streams)
    notes: tuple[str, ...] = field(default=())

    @property
    def times_seconds_F(self) -> np.ndarray:
        """[F] float64: seconds from the first frame."""
        return (self.pts_F - self.pts_F[0]).astype(np.float64) * float(self.time_base)

    @property
    def duration_seconds(self) -> float:
        """From the first frame to the end of the last."""
        return float(self.times_seconds_F[-1]) + self.last_frame_seconds

    @property
    def is_constant_rate(self) -> bool:
        """Whether the frame rate is constant."""
        return is_even(self.pts_F)


@contextmanager
def open_video(source: str, content: Path | bytes) -> Iterator[tuple[av.container.InputContainer, av.video.stream.VideoStream]]:
    """The opened container and its first real video stream; InputError, one line with the mend, for everything else."""
    if isinstance(content, Path):
        _check_is_file(source, content)
    elif not content:
        raise InputError(f"{source}: 0 bytes; give the content of a video file")
    check_mp4_index(source, content)
    try:
        # The prefix keeps a colon in a name from being read as a protocol; the whitelist keeps a file from opening others.
        opened = f"file:{content.absolute()}" if isinstance(content, Path) else io.BytesIO(content)
        container = av.open(opened, mode="r", options={"protocol_whitelist": "file"} if isinstance(content, Path) else {})
    except av.error.FFmpegError as error:
        raise InputError(
            f"{source}: not a readable video ({error.strerror}); it may be cut off or of another kind: "
            "try to play it, or make it again with `ffmpeg -i INPUT out.mp4`"
        ) from error
    with container:
        names = container.format.name.split(",")
        for name in names:
            if name in REFUSED_FORMATS:
                raise InputError(
                    f"{source}: {REFUSED_FORMATS[name]}, expected a video file (mp4, mkv, webm, avi, ts, gif, ...)"
                )
            if name == "image2" or name.endswith("_pipe"):
                raise InputError(f"{source}: a picture ({name.removesuffix('_pipe')}), not a video; pass it as an image")
        streams = [stream for stream in container.streams.video if not _is_cover(stream)]
        if not streams:
            kinds = " and ".join(sorted({str(stream.type) for stream in container.streams})) or "no stream"
            raise InputError(f"{source}: holds {kinds}, no moving picture; give a file with a video stream")
        _check_frame_size(source, streams[0].codec_context)
        yield container, streams[0]


def _check_frame_size(source: str, decoder: av.video.codeccontext.VideoCodecContext) -> None:
    if decoder.width * decoder.height > MAX_FRAME_PIXELS:
        raise InputError(
            f"{source}: frames of {decoder.width}x{decoder.height} pixels; at most {MAX_FRAME_PIXELS:,} in all are decoded: "
            "scale it down with `ffmpeg -i INPUT -vf scale=1920:-2 out.mp4`"
        )
    # A stream may grow behind its header.
    decoder.options = {"max_pixels": str(MAX_FRAME_PIXELS)}


def _check_is_file(source: str, path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{source}: a folder; give one video file in it")
    if not path.exists():
        raise InputError(f"{source}: no such file; check the path")
    if not path.is_file():
        raise InputError(f"{source}: not a regular file; save the video to disk and give that file")
    try:
        is_empty = not path.open("rb").read(1)
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror}); check its permissions") from error
    if is_empty:
        raise InputError(f"{source}: an empty file (0 bytes); copy or download it again")


def _is_cover(stream: av.video.stream.VideoStream) -> bool:
    """A cover picture of an audio file counts as a video stream to the demuxer."""
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


@dataclass
class _PacketTimes:
    pts: list[int]
    keys: list[int]
    durations: list[int]
    num_packets: int = 0
    first_frame: av.VideoFrame | None = None
    read_error: str = ""
    has_no_times: bool = False


def scan_video(content: Path | bytes, source: str | None = None) -> VideoScan:
    """Read every packet's time and decode one frame. `source` names the video in errors (default: its path)."""
    source = source or (str(content) if isinstance(content, Path) else "video")
    with open_video(source, content) as (container, stream):
        stream.thread_type = "NONE"
        num_indexed = len(stream.index_entries)
        packets = _read_packets(source, container, stream)
        if not packets.pts:
            raise InputError(f"{source}: a video stream without frames; the file is cut off or empty: make it again")
        if packets.first_frame is None:
            raise InputError(
                f"{source}: none of its {len(packets.pts)} frames can be decoded; the file is damaged, make it again"
            )
        _check_work(source, content, len(packets.pts), packets.first_frame)
        time_base = stream.time_base or Fraction(1, 1)
        is_cut_off = _is_cut_off(packets, num_indexed, stream)
        is_counted = packets.has_no_times or (container.format.name == "avi" and packets.pts == sorted(packets.pts))
        pts_F = np.unique(np.asarray(packets.pts, dtype=np.int64))
        if is_cut_off and packets.pts[-1] > pts_F[0]:
            # The cut goes through the last packet: what it decodes to is a patchwork, and later times are guesses.
            pts_F = pts_F[pts_F < packets.pts[-1]]
        if container.format.name == "mpegts":
            pts_F = _without_stray_times(pts_F, time_base)
        fps, last_frame_seconds = _rate(pts_F, packets.durations, time_base, stream.average_rate)
        quarter_turns = round((packets.first_frame.rotation or 0) / 90) % 4
        height, width = packets.first_frame.height, packets.first_frame.width
        if quarter_turns % 2:
            height, width = width, height
        return VideoScan(
            source=source,
            content=content,
            pts_F=pts_F,
            key_pts=np.unique(np.asarray(packets.keys, dtype=np.int64)),
            time_base=time_base,
            height=height,
            width=width,
            quarter_turns=quarter_turns,
            fps=fps,
            last_frame_seconds=last_frame_seconds,
            is_counted=is_counted,
            notes=tuple(_scan_notes(packets, is_cut_off, pts_F, time_base, fps)),
        )


def _check_work(source: str, content: Path | bytes, num_frames: int, frame: av.VideoFrame) -> None:
    num_bytes = content.stat().st_size if isinstance(content, Path) else len(content)
    num_pixels = num_frames * frame.width * frame.height
    if num_pixels > max(MAX_CHEAP_PIXELS, num_bytes * MAX_PIXELS_PER_BYTE):
        raise InputError(
            f"{source}: {num_frames:,} frames of {frame.width}x{frame.height} in {num_bytes:,} bytes; no recording is "
            "so small: scale it down, or cut it"
        )


def _read_packets(source: str, container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> _PacketTimes:
    found = _PacketTimes([], [], [])
    clock = 0
    ticks_per_frame = max(1, round(1 / ((stream.average_rate or stream.guessed_rate or 25) * (stream.time_base or 1))))
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            break
        except av.error.FFmpegError as error:
            found.read_error = error.strerror or "read error"
            break
        if found.first_frame is None:
            found.first_frame = _first_frame(packet)
        found.num_packets += 1
        # Empty packets (avi's skipped frames, the demuxer's end mark) and those before an edit list's start show nothing.
        if not packet.size or packet.is_discard:
            continue
        time = packet.pts if packet.pts is not None else packet.dts
        if time is None and (not found.pts or found.has_no_times):
            found.has_no_times = True
            time = clock
            clock += ticks_per_frame
        if time is None:
            continue
        if len(found.pts) == MAX_FRAMES:
            raise InputError(f"{source}: more than {MAX_FRAMES:,} frames; cut it into parts")
        found.pts.append(time)
        found.durations.append(packet.duration or 0)
        if packet.is_keyframe:
            found.keys.append(time)
    return found


def _first_frame(packet: av.Packet) -> av.VideoFrame | None:
    try:
        return next(iter(packet.decode()), None)
    except av.error.FFmpegError:
        # The damaged packet is met again, and counted, when the frames are read.
        return None


def _rate(pts_F: np.ndarray, durations: list[int], time_base: Fraction, stated: Fraction | None) -> tuple[float, float]:
    """Average frames a second, and how long the last frame is shown, in seconds."""
    stated_fps = float(stated) if stated else 0.0
    if len(pts_F) == 1:
        seconds = float(max(durations[-1], 0) * time_base) or (1.0 / stated_fps if stated_fps else 1.0)
        return 1.0 / seconds, seconds
    span_seconds = float(int(pts_F[-1] - pts_F[0]) * time_base)
    measured_fps = (len(pts_F) - 1) / span_seconds
    # A container's clock may be coarse (milliseconds in mkv): its stated rate is the exact one where both agree to a tick.
    if abs(stated_fps / measured_fps - 1.0) <= 2.0 * float(time_base) / span_seconds + 1e-6:
        return stated_fps, 1.0 / stated_fps
    if is_even(pts_F):
        return measured_fps, 1.0 / measured_fps
    typical_seconds = float(np.median(np.diff(pts_F))) * float(time_base)
    return len(pts_F) / (span_seconds + typical_seconds), typical_seconds


def is_even(pts_F: np.ndarray) -> bool:
    """Whether every frame stands within half a frame of an even spacing."""
    even_F = np.linspace(pts_F[0], pts_F[-1], len(pts_F))
    return len(pts_F) < 3 or float(np.abs(pts_F - even_F).max()) <= 0.5 * float(even_F[1] - even_F[0])


def _without_stray_times(pts_F: np.ndarray, time_base: Fraction) -> np.ndarray:
    """Times without the few that damage has thrown far away (a broadcast stream repeats its time several times a second)."""
    breaks = np.flatnonzero(np.diff(pts_F) * float(time_base) > LONGEST_BROADCAST_GAP_SECONDS) + 1
    return max(np.split(pts_F, breaks), key=len) if len(breaks) and len(breaks) < 0.05 * len(pts_F) else pts_F


def _is_cut_off(packets: _PacketTimes, num_indexed: int, stream: av.video.stream.VideoStream) -> bool:
    """Whether the file ends before its index or its header says."""
    # The index is asked and not the header's frame count, which edit lists and skipped frames make too high.
    if num_indexed > packets.num_packets + 2:
        return True
    end_seconds = float(max(packets.pts) * (stream.time_base or 0))
    stated_end = _stated_end_seconds(stream)
    return stated_end is not None and stated_end > end_seconds * 1.02 + 0.5


def _scan_notes(packets: _PacketTimes, is_cut_off: bool, pts_F: np.ndarray, time_base: Fraction, fps: float) -> list[str]:
    notes = []
    start_seconds = float(int(pts_F[0]) * time_base)
    shown_seconds = float(int(pts_F[-1] - pts_F[0]) * time_base) + 1.0 / fps
    if packets.has_no_times:
        notes.append(f"the file stores no frame times; {fps:g} frames a second are assumed")
    if is_cut_off:
        notes.append(f"the file is cut off: only its first {shown_seconds:.1f} s are there and are used")
    elif packets.read_error:
        notes.append(f"reading stopped after {shown_seconds:.1f} s ({packets.read_error}); what came before is used")
    if start_seconds > 1.0:
        notes.append(f"the stream's clock starts at {start_seconds:.3f} s; times here count from its first frame")
    return notes


def _stated_end_seconds(stream: av.video.stream.VideoStream) -> float | None:
    """The end time in the header: beside a Matroska stream ("00:00:12.000000000"), or as avi's count of ticks."""
    if stream.container.format.name == "avi":
        return float(stream.frames * (stream.time_base or 0))
    hours, _, rest = stream.metadata.get("DURATION", "").partition(":")
    minutes, _, seconds = rest.partition(":")
    try:
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return None
