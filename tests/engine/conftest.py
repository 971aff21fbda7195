"""The bundled checkpoint and a small video at hand."""

import numpy as np
import pytest

from openkeye.frameforge.render import render, scene_job
from openkeye.frameforge.writer import make_clip
from openkeye.inputs.processor import Processor
from openkeye.inputs.video import Frames


@pytest.fixture(scope="session")
def processor() -> Processor:
    return Processor.load("openkeye-tiny")


def frames_of_clip(index: int, num_frames: int = 24) -> Frames:
    clip = make_clip(5, index)
    times = np.arange(num_frames) * 0.5
    pixels = render(scene_job(clip.scene, times), 112, "cpu").numpy()
    return Frames(pixels, times.tolist(), f"clip {index}", num_frames * 0.5)


@pytest.fixture(scope="session")
def video() -> Frames:
    return frames_of_clip(0)


@pytest.fixture(scope="session")
def other_video() -> Frames:
    return frames_of_clip(1)
