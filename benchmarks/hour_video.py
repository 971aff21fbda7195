"""Makes a long H.264 file for the benchmarks: a minute of FrameForge's moving things under film grain, encoded once.

The minute's packets are then copied as often as the file is long, so that an hour costs no more than a minute. A decoder does
the work of an hour: nothing tells it that what comes has been before.
"""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from openkeye.frameforge.render import render, scene_job
from openkeye.frameforge.writer import make_clip

MINUTE_SECONDS = 60
NUM_GRAINS = 16
# pictures of grain, taken in turn


def long_video(folder: Path, height: int, width: int, minutes: int, fps: int = 24, gop: int = 250) -> Path:
    """The file, made where it is not there: constant quality, B-frames, a keyframe every `gop` frames and at each minute."""
    path = folder / f"{height}p-{minutes}min-{fps}fps-gop{gop}.mp4"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    minute, part = path.with_suffix(".minute.mp4"), path.with_suffix(".part")
    _encode_minute(minute, height, width, fps, gop)
    _repeat(minute, part, minutes)
    minute.unlink()
    os.replace(part, path)
    return path


def _encode_minute(path: Path, height: int, width: int, fps: int, gop: int) -> None:
    scene = make_clip(9, 0, "long", (MINUTE_SECONDS, MINUTE_SECONDS)).scene
    rng = np.random.default_rng(0)
    grains = torch.from_numpy(rng.normal(0.0, 4.0, (NUM_GRAINS, height, width, 1)).astype(np.float32))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "23", "preset": "veryfast", "bf": "3"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = gop
        for second in range(MINUTE_SECONDS):
            times = second + np.arange(fps) / fps
            squares = render(scene_job(scene, times), 360, "cpu").float().permute(0, 3, 1, 2)
            pictures = torch.nn.functional.interpolate(squares, size=(height, width), mode="bilinear").permute(0, 2, 3, 1)
            for number, picture in enumerate(pictures):
                grain = grains[(second * fps + number) % NUM_GRAINS]
                pixels = (picture + grain).clamp(0, 255).to(torch.uint8).numpy()
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def _repeat(source: Path, path: Path, times: int) -> None:
    """The packets of a file, one copy after the other."""
    with av.open(str(path), "w", format="mp4") as writer:
        out = None
        for number in range(times):
            with av.open(str(source)) as reader:
                stream = reader.streams.video[0]
                assert stream.time_base is not None
                out = out or writer.add_stream_from_template(stream)
                shift = int(number * MINUTE_SECONDS / Fraction(stream.time_base))
                for packet in reader.demux(stream):
                    if packet.dts is None or packet.pts is None:
                        continue
                    packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, out
                    writer.mux(packet)
