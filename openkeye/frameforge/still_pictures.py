"""Still scenes as pictures of any shape: what to draw, the pixels, and the boxes of what is on them."""

from dataclasses import replace
from functools import lru_cache
from math import ceil, floor

import numpy as np
import torch

from openkeye.frameforge.atlas import CELL_ASPECT, atlas_masks
from openkeye.frameforge.catalogue import SPRITES
from openkeye.frameforge.render import RenderJob, render, scene_job
from openkeye.frameforge.scene import Scene
from openkeye.frameforge.stream import codec_like_by_frame, damage_table

CANVASES = (112, 168, 224)
# pixels; a still image is cut from the smallest that holds it
FILL_SHARE = 0.8
# of a cell that a sprite's own square takes; the rest is for its rim
BOX_CANVAS = 224
SOLID = 0.5
# coverage from which a pixel belongs to a sprite


def still_job(scene: Scene, height: int, width: int) -> tuple[RenderJob, int]:
    """(what to draw, pixels of its square canvas) for a picture that is the canvas' middle.

    Places are shares of the picture, sizes shares of its shorter side.
    """
    canvas = next(side for side in CANVASES if side >= max(height, width))
    job = scene_job(scene, np.zeros(1))
    rows = job.instances.copy()
    rows[:, 2] = 0.5 + (rows[:, 2] - 0.5) * (width / canvas)
    rows[:, 3] = 0.5 + (rows[:, 3] - 0.5) * (height / canvas)
    rows[:, 4] *= min(height, width) / canvas
    return replace(job, instances=rows), canvas


def draw_still(scene: Scene, height: int, width: int, seed: int) -> np.ndarray:
    """The picture, uint8 [H, W, 3], drawn on the CPU; `seed` is of the damage, as a codec does it."""
    job, canvas = still_job(scene, height, width)
    pixels = codec_like_by_frame(render(job, canvas, "cpu"), damage_table(seed, 1))[0]
    top, left = (canvas - height) // 2, (canvas - width) // 2
    return pixels[top : top + height, left : left + width].numpy()


def object_boxes(scene: Scene, height: int, width: int) -> list[tuple[int, int, int, int]]:
    """Box of each of `scene.tracks` in thousandths of the picture's sides, outwards, without its dark rim."""
    extents = _sprite_extents()
    boxes = []
    for track in scene.tracks:
        _, x, y = track.path[0]
        half = track.half_height * min(height, width)
        left, top, right, bottom = (half * edge for edge in extents[track.sprite])
        corners = (x * width + left, y * height + top, x * width + right, y * height + bottom)
        scaled = [1000 * corner / side for corner, side in zip(corners, (width, height) * 2, strict=True)]
        low, high = [max(0, floor(edge)) for edge in scaled[:2]], [min(1000, ceil(edge)) for edge in scaled[2:]]
        boxes.append((low[0], low[1], high[0], high[1]))
    return boxes


@lru_cache(maxsize=1)
def _sprite_extents() -> list[tuple[float, float, float, float]]:
    """Left, top, right and bottom of each sprite around its centre, in halves of its height."""
    masks = atlas_masks(BOX_CANVAS, torch.device("cpu"))[:, 0].numpy() >= SOLID
    _, height, width = masks.shape
    assert len(masks) == len(SPRITES)
    extents = []
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        horizontal = [(2 * edge / width - 1) * CELL_ASPECT / FILL_SHARE for edge in (columns[0], columns[-1] + 1)]
        vertical = [(2 * edge / height - 1) / FILL_SHARE for edge in (rows[0], rows[-1] + 1)]
        extents.append((horizontal[0], vertical[0], horizontal[1], vertical[1]))
    return extents
