"""Makes small video files whose frames carry their own number as a barcode, and reads the number back.

A frame of 160x96 shows 16 bars in its upper half (bit k of the number: white or black) over their complement, so that a
reading that is not a clean frame is refused.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT, NUM_BITS = 160, 96, 16


def barcode(number: int) -> np.ndarray:
    """[96, 160, 3] uint8 picture of a number below 65,536."""
    bits = (number >> np.arange(NUM_BITS)) & 1
    upper = np.repeat(np.where(bits, 235, 20), WIDTH // NUM_BITS)
    picture = np.empty((HEIGHT, WIDTH), dtype=np.uint8)
    picture[: HEIGHT // 2], picture[HEIGHT // 2 :] = upper, 255 - upper
    return np.repeat(picture[:, :, None], 3, axis=2)


def read_barcode(picture: np.ndarray) -> int:
    """The number that a picture of any size shows; raises where the two halves disagree."""
    height, width = picture.shape[:2]
    columns = ((np.arange(NUM_BITS) + 0.5) * width / NUM_BITS).astype(int)
    grey = picture.astype(np.float64).mean(axis=2)
    upper, lower = grey[height // 4, columns], grey[3 * height // 4, columns]
    assert (np.abs(upper - lower) > 60).all(), "not a clean barcode frame"
    return int(((upper > lower).astype(int) << np.arange(NUM_BITS)).sum())


@dataclass
class Clip:
    """A file and the truth about it: frame k is shown from times_seconds[k] on."""

    path: Path
    times_seconds: list[float] = field(default_factory=list)


def make_clip(
    path: Path,
    times: list[Fraction],
    codec: str = "libx264",
    max_b_frames: int = 3,
    gop: int = 24,
    time_base: Fraction = Fraction(1, 12800),
    rotation: int = 0,
    rate: int = 30,
    with_audio: bool = False,
) -> Clip:
    """Write one frame at each time (seconds); times need not be even."""
    options = {"preset": "ultrafast", "bf": str(max_b_frames)} if codec == "libx264" else {}
    if codec == "libvpx-vp9":
        options = {"cpu-used": "8", "deadline": "realtime"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = time_base
        if codec != "libvpx-vp9" and codec != "gif":
            stream.codec_context.max_b_frames = max_b_frames
        if rotation:
            stream.set_display_rotation(rotation)
        audio = container.add_stream("aac", rate=16000) if with_audio else None
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(barcode(number), format="rgb24")
            frame.pts, frame.time_base = int(time / time_base), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio is not None:
            write_silence(container, audio, float(times[-1]) + 1.0)
    return Clip(path, [float(time - times[0]) for time in times])


def write_silence(container: av.container.OutputContainer, stream: av.audio.stream.AudioStream, seconds: float) -> None:
    for index in range(int(seconds * 16000 / 1024)):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, index * 1024, Fraction(1, 16000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def make_audio(path: Path, seconds: float = 2.0) -> Path:
    with av.open(str(path), "w") as container:
        write_silence(container, container.add_stream("aac", rate=16000), seconds)
    return path


def copy_with_shift(source: Clip, path: Path, first_shown: int, shift_seconds: float = 0.0) -> Clip:
    """Remux without encoding so that frame `first_shown` is the first on screen.

    In mp4 the frames before it stay in the file and an edit list hides them.
    """
    with av.open(str(source.path)) as reader, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as writer:
        stream = reader.streams.video[0]
        out = writer.add_stream_from_template(stream)
        for packet in reader.demux(stream):
            if packet.dts is None:
                continue
            shift = math.ceil((shift_seconds - source.times_seconds[first_shown]) / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, out
            writer.mux(packet)
    origin = source.times_seconds[first_shown]
    return Clip(path, [time - origin for time in source.times_seconds])


def even_times(num_frames: int, rate: int, start_seconds: int = 0) -> list[Fraction]:
    return [start_seconds + Fraction(number, rate) for number in range(num_frames)]


def uneven_times(num_frames: int, seed: int = 0) -> list[Fraction]:
    """Between 5 and 200 ms a frame, with two long holds."""
    gaps = np.random.default_rng(seed).integers(5, 200, num_frames - 1)
    gaps[num_frames // 3], gaps[num_frames // 2] = 2400, 1700
    return [Fraction(int(time), 1000) for time in np.concatenate([[0], gaps.cumsum()])]
