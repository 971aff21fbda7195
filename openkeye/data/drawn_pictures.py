"""`DrawnPictures`: FrameForge pictures as a record of kilobytes, drawn on the device that computes.

Letters: F frames, S canvas side in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from openkeye.frameforge.render import RenderJob, join_jobs, render, split_job
from openkeye.frameforge.stream import codec_like_by_frame, damage_table
from openkeye.inputs.patches import Patches, patches_from_pixels

MAX_DRAWN_FRAMES = 1024
# at once: a frame of 112 pixels takes half a megabyte of canvas


@dataclass(frozen=True)
class DrawnPictures:
    """Pictures of one clip, or one still image: what to draw, at which size, and how a codec would damage it."""

    job: RenderJob
    canvas: int
    # pixels; the side of the square that the job is drawn on, a multiple of 8
    height: int
    width: int
    # of the canvas' middle, which is the picture
    seed: int
    # of the damage

    def __post_init__(self) -> None:
        if self.canvas % 8 or not (0 < self.height <= self.canvas and 0 < self.width <= self.canvas):
            raise ValueError(
                f"a picture of {self.width}x{self.height} must lie in its canvas of {self.canvas}, a multiple of 8 pixels"
            )

    @property
    def num_pictures(self) -> int:
        return sum(self.job.num_frames)

    def patches(self, device: torch.device | str) -> Patches:
        """See `Pictures.patches`."""
        return self.patches_of_all([self], device)[0]

    def patches_of_all(self, group: "Sequence[DrawnPictures]", device: torch.device | str) -> list[Patches]:
        """One drawing for each size of canvas, then one cutting for each size of picture."""
        parts: dict[int, Patches] = {}
        for canvas in sorted({record.canvas for record in group}):
            numbers = [number for number, record in enumerate(group) if record.canvas == canvas]
            parts |= zip(numbers, _draw([group[number] for number in numbers], canvas, device), strict=True)
        return [parts[number] for number in range(len(group))]


def _draw(group: list[DrawnPictures], canvas: int, device: torch.device | str) -> list[Patches]:
    """Patches of records that share a canvas' side."""
    job = join_jobs([record.job for record in group])
    damage = np.concatenate([damage_table(record.seed, record.num_pictures) for record in group])
    drawn, first = [], 0
    for part in split_job(job, MAX_DRAWN_FRAMES):
        pixels = render(part, canvas, device)
        drawn.append(codec_like_by_frame(pixels, damage[first : first + len(pixels)]))
        first += len(pixels)
    frames = torch.cat(drawn) if len(drawn) > 1 else drawn[0]
    bounds = list(pairwise([0, *np.cumsum([record.num_pictures for record in group]).tolist()]))
    parts: dict[int, Patches] = {}
    for height, width in sorted({(record.height, record.width) for record in group}):
        numbers = [number for number, record in enumerate(group) if (record.height, record.width) == (height, width)]
        top, left = (canvas - height) // 2, (canvas - width) // 2
        chosen = [frames[slice(*bounds[number]), top : top + height, left : left + width] for number in numbers]
        cut = patches_from_pixels(torch.cat(chosen) if len(chosen) > 1 else chosen[0])
        start = 0
        for number in numbers:
            parts[number] = cut.slice_pictures(start, start + group[number].num_pictures)
            start += group[number].num_pictures
    return [parts[number] for number in range(len(group))]
