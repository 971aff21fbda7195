"""Clips for training, made in worker processes as plain records; the pictures are drawn later, on the training device.

Training and files draw from separate seed spaces, so a clip of an evaluation can never have been trained on.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openkeye.frameforge.questions import Question, make_questions
from openkeye.frameforge.render import RenderJob, scene_job
from openkeye.frameforge.scene import Scene, SceneSettings, make_scene

TRAINING_SPACE = 0
FILE_SPACE = 1
# first word of every seed


@dataclass(frozen=True)
class TrainingClip:
    """One clip as its training batch needs it."""

    frame_times: np.ndarray
    # [N] seconds
    scene: Scene
    job: RenderJob
    questions: list[Question]


def make_training_clip(seed: int, index: int, num_frames: int, num_rounds: int = 1) -> TrainingClip:
    """A clip of `num_frames` frames sampled at about 2 frames a second, with `num_rounds` rounds of questions.

    Half of the clips begin somewhere within the first 5 minutes, so that times of every length are seen on short clips too.
    """
    rng = np.random.default_rng([TRAINING_SPACE, seed, index])
    # Even sampling over a file's own frames gives spacings slightly above half a second.
    spacing = 0.5 if rng.random() < 0.2 else float(rng.uniform(0.5, 0.54))
    start = 0.0 if rng.random() < 0.5 else round(float(rng.uniform(0.0, 300.0)), 2)
    frame_times = start + spacing * np.arange(num_frames)
    settings = SceneSettings(min_event_seconds=1.5 if num_frames <= 64 else 2.0)
    scene = make_scene(rng, start, start + spacing * num_frames, settings)
    questions = make_questions(scene, rng, frame_times, num_rounds)
    return TrainingClip(frame_times, scene, scene_job(scene, frame_times), questions)


def codec_like(frames_FHWC: Tensor, generator: torch.Generator) -> Tensor:
    """Damage like a video codec's on a third of the frames: gain, blur, half-resolution colour, quantised 8x8 blocks.

    uint8 [F, H, W, 3] with H = W a multiple of 8 -> the same. The generator lives on the host, so that drawing waits for no
    device; each chunk of frames gets its own strength.
    """
    outputs = []
    for chunk in frames_FHWC.chunk(12):
        is_hit, strength, gain, blur = torch.rand(4, generator=generator).tolist()
        outputs.append(_damage(chunk, strength, 0.95 + 0.1 * gain, blur < 0.4) if is_hit < 1 / 3 else chunk)
    return torch.cat(outputs)


def _damage(frames: Tensor, strength: float, gain: float, is_blurred: bool) -> Tensor:
    # Half precision is finer than the quantisation that follows, and the transforms run on the matrix units.
    dtype = torch.float16 if frames.is_cuda else torch.float32
    pixels = frames.permute(0, 3, 1, 2).to(dtype) * gain
    if is_blurred:
        pixels = (F.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False) + pixels) * 0.5
    red, green, blue = pixels.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    chroma = torch.stack([0.564 * (blue - luma), 0.713 * (red - luma)], dim=1)
    chroma = F.interpolate(F.avg_pool2d(chroma, 2), scale_factor=2.0, mode="nearest")
    planes = torch.cat([luma[:, None], chroma], dim=1)
    side = frames.shape[1]
    basis = _block_cosines(side, frames.device, dtype)
    frequency = (torch.arange(side, device=frames.device) % 8).to(dtype)
    step = 3.0 + 2.75 * strength * (2.4 + frequency[:, None] + frequency)
    spectrum = (basis @ planes @ basis.t() / step).round() * step
    luma, blue_difference, red_difference = (basis.t() @ spectrum @ basis).unbind(1)
    red, blue = luma + red_difference / 0.713, luma + blue_difference / 0.564
    green = (luma - 0.299 * red - 0.114 * blue) / 0.587
    return torch.stack([red, green, blue], dim=-1).clamp(0, 255).round().to(torch.uint8)


@lru_cache(maxsize=4)
def _block_cosines(side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[side, side]: the orthonormal 8-point cosine transform of every block of 8 pixels, rows by frequency."""
    n = torch.arange(8, dtype=torch.float64)
    basis = torch.cos(torch.pi * (n[None] + 0.5) * n[:, None] / 8) * 0.5
    basis[0] *= 2**-0.5
    return torch.block_diag(*[basis] * (side // 8)).to(device, dtype)
