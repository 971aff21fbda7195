"""Clips for training, made in worker processes as plain records; the pictures are drawn later, on the training device.

Training and files draw from separate seed spaces, so a clip of an evaluation can never have been trained on.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openkeye.frameforge.questions import Question, make_questions
from openkeye.frameforge.render import RenderJob, scene_job
from openkeye.frameforge.scene import SceneSettings, make_scene

TRAINING_SPACE = 0
FILE_SPACE = 1
# first word of every seed


@dataclass(frozen=True)
class TrainingClip:
    """One clip as its training batch needs it."""

    frame_times: np.ndarray
    # [N] seconds
    job: RenderJob
    questions: list[Question]


def make_training_clip(seed: int, index: int, num_frames: int) -> TrainingClip:
    """A clip of `num_frames` frames sampled at about 2 frames a second, with 8 questions.

    Half of the clips begin somewhere within the first 5 minutes, so that times of every length are seen on short clips too.
    """
    rng = np.random.default_rng([TRAINING_SPACE, seed, index])
    # Even sampling over a file's own frames gives spacings slightly above half a second.
    spacing = 0.5 if rng.random() < 0.2 else float(rng.uniform(0.5, 0.54))
    start = 0.0 if rng.random() < 0.5 else round(float(rng.uniform(0.0, 300.0)), 2)
    frame_times = start + spacing * np.arange(num_frames)
    settings = SceneSettings(min_event_seconds=1.5 if num_frames <= 64 else 2.0)
    scene = make_scene(rng, start, start + spacing * num_frames, settings)
    questions = make_questions(scene, rng, frame_times)
    return TrainingClip(frame_times, scene_job(scene, frame_times), questions)


def codec_like(frames_FHWC: Tensor, generator: torch.Generator) -> Tensor:
    """Damage like a video codec's, drawn anew for every call: half-resolution colour, quantised 8x8 blocks, gain, noise, blur.

    uint8 [F, H, W, 3] with H and W multiples of 8 -> the same; each chunk of frames gets its own strength, a fifth none.
    The generator lives on the host, so that drawing waits for no device.
    """
    num_chunks = 16
    outputs = [_damage(chunk, generator) for chunk in frames_FHWC.chunk(num_chunks)]
    return torch.cat(outputs)


def _damage(frames: Tensor, generator: torch.Generator) -> Tensor:
    device = frames.device
    strength = float(torch.rand(1, generator=generator))
    if strength < 0.2:
        return frames
    gain = 1 + 0.1 * (float(torch.rand(1, generator=generator)) - 0.5)
    pixels = frames.permute(0, 3, 1, 2).float() * gain
    if float(torch.rand(1, generator=generator)) < 0.4:
        pixels = torch.nn.functional.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False) * 0.5 + pixels * 0.5
    matrix = torch.tensor([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]], device=device)
    planes = torch.einsum("ij,fjhw->fihw", matrix, pixels)
    chroma = torch.nn.functional.avg_pool2d(planes[:, 1:], 2)
    chroma = torch.nn.functional.interpolate(chroma, scale_factor=2, mode="bilinear")
    planes = torch.cat([planes[:, :1], chroma], dim=1)
    basis = _dct(device)
    blocks = planes.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
    step = 3.0 + 22.0 * strength * (0.3 + torch.arange(8, device=device)[:, None] + torch.arange(8, device=device)) / 8
    spectrum = (basis @ blocks @ basis.t() / step).round() * step
    planes = (basis.t() @ spectrum @ basis).transpose(3, 4).flatten(4).flatten(2, 3)
    inverse = torch.tensor([[1.0, 0.0, 1.402], [1.0, -0.344, -0.714], [1.0, 1.772, 0.0]], device=device)
    return torch.einsum("ij,fjhw->fhwi", inverse, planes).clamp(0, 255).round().to(torch.uint8)


def _dct(device: torch.device) -> Tensor:
    """The orthonormal 8-point cosine basis, rows by frequency."""
    n = torch.arange(8, dtype=torch.float64)
    basis = torch.cos(torch.pi * (n[None] + 0.5) * n[:, None] / 8) * 0.5
    basis[0] *= 2**-0.5
    return basis.float().to(device)
