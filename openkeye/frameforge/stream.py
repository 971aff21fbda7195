"""Clips for training, made in worker processes as plain records; the pictures are drawn later, on the training device.

Training and files draw from separate seed spaces, so a clip of an evaluation can never have been trained on.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openkeye.common.device import upload
from openkeye.frameforge.needles import make_sparse_scene
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


def make_training_clip(
    seed: int,
    index: int,
    num_frames: int,
    num_rounds: int = 1,
    max_start_seconds: float = 300.0,
    is_sparse: bool = False,
) -> TrainingClip:
    """A clip of `num_frames` frames sampled at about 2 frames a second, with `num_rounds` rounds of questions.

    Half of the clips begin somewhere up to `max_start_seconds` (default: the first 5 minutes), so that times of every length
    are seen on short clips too. `is_sparse`: a few short events and nothing between them (`needles.make_sparse_scene`).
    """
    rng = np.random.default_rng([TRAINING_SPACE, seed, index])
    # Even sampling over a file's own frames gives spacings slightly above half a second.
    spacing = 0.5 if rng.random() < 0.2 else float(rng.uniform(0.5, 0.54))
    start = 0.0 if rng.random() < 0.5 else round(float(rng.uniform(0.0, max_start_seconds)), 2)
    frame_times = start + spacing * np.arange(num_frames)
    end = start + spacing * num_frames
    if is_sparse:
        scene = make_sparse_scene(rng, start, end)
    else:
        scene = make_scene(rng, start, end, SceneSettings(min_event_seconds=1.5 if num_frames <= 64 else 2.0))
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


def damage_table(seed: int, num_frames: int) -> np.ndarray:
    """[F, 3] float32: what `codec_like_by_frame` does to each frame of one clip; strength (below 0: nothing), gain and blur.

    As in `codec_like`, runs of frames share their strength. A clip's table depends on its seed alone, so that its pixels are
    the same whatever is drawn beside it.
    """
    num_runs = min(12, num_frames)
    is_hit, strength, gain, blur = np.random.default_rng(seed).random((4, num_runs))
    table = np.stack([np.where(is_hit < 1 / 3, strength, -1.0), 0.95 + 0.1 * gain, blur < 0.4], axis=1)
    return table[np.arange(num_frames) * num_runs // num_frames].astype(np.float32)


def codec_like_by_frame(frames_FHWC: Tensor, table_F3: np.ndarray) -> Tensor:
    """`codec_like` with the damage of each frame given (`damage_table`), in two goes for all frames: blurred ones, and others.

    uint8 [F, H, W, 3] with H = W a multiple of 8 -> the same tensor, changed in place.
    """
    is_hit, is_blurred = table_F3[:, 0] >= 0, table_F3[:, 2] > 0
    for kind in (False, True):
        numbers = np.flatnonzero(is_hit & (is_blurred == kind))
        if not len(numbers):
            continue
        rows = upload(torch.from_numpy(numbers), frames_FHWC.device)
        values = upload(torch.from_numpy(table_F3[numbers, :2, None, None, None]), frames_FHWC.device)
        dtype = torch.float16 if frames_FHWC.is_cuda else torch.float32
        strength, gain = values.to(dtype).unbind(1)
        frames_FHWC[rows] = _damage(frames_FHWC[rows], strength, gain, kind)
    return frames_FHWC


def _damage(frames: Tensor, strength: float | Tensor, gain: float | Tensor, is_blurred: bool) -> Tensor:
    """Strength and gain of all frames, or of each as [F, 1, 1, 1]."""
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
