"""The sprite atlas: one fill mask and one rim mask per sprite, drawn once with Pillow, large, then scaled down."""

import math
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from openkeye.frameforge.catalogue import NUM_OBJECT_SPRITES, SHAPES, SPRITES

CELL_ASPECT = 2.75
# width of a cell over its height; words need it, shapes stand in the middle square
DRAWN_HEIGHT = 96
# pixels of a cell before it is scaled down


@lru_cache(maxsize=4)
def atlas_masks(side: int, device: torch.device) -> Tensor:
    """Masks for a canvas of `side` pixels: float32 [sprites, 2, cell height, cell width], fill and rim coverage in 0..1.

    Cells are about as large as the largest sprite on that canvas, so that sampling neither blurs nor aliases.
    """
    height = max(16, round(side * 0.24))
    width = round(height * CELL_ASPECT)
    cells = []
    for number, name in enumerate(SPRITES):
        fill = _draw_object(name) if number < NUM_OBJECT_SPRITES else _draw_text(name)
        rim = fill.filter(ImageFilter.MaxFilter(9))
        cells.append([np.asarray(mask.resize((width, height), Image.Resampling.BOX)) for mask in (fill, rim)])
    return torch.from_numpy(np.asarray(cells)).float().to(device) / 255


def _canvas() -> tuple[Image.Image, float, float, float]:
    """An empty cell, its centre, and the radius that sprites may fill (0.8 of the half height)."""
    size = (round(DRAWN_HEIGHT * CELL_ASPECT), DRAWN_HEIGHT)
    return Image.new("L", size, 0), size[0] / 2, size[1] / 2, 0.8 * DRAWN_HEIGHT / 2


def _draw_object(name: str) -> Image.Image:
    cell, x, y, r = _canvas()
    draw = ImageDraw.Draw(cell)
    if name == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif name == "square":
        side = 0.85 * r
        draw.rectangle((x - side, y - side, x + side, y + side), fill=255)
    elif name == "triangle":
        draw.polygon([(x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)], fill=255)
    elif name == "star":
        points = [(r if n % 2 == 0 else 0.42 * r, -math.pi / 2 + n * math.pi / 5) for n in range(10)]
        draw.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for radius, a in points], fill=255)
    elif name == "heart":
        turns = np.linspace(0, 2 * math.pi, 80)
        across = 16 * np.sin(turns) ** 3
        up = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
        draw.polygon([(x + r * a / 16, y - r * (b + 2) / 16) for a, b in zip(across, up, strict=True)], fill=255)
    elif name == "cross":
        arm = 0.33 * r
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=255)
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=255)
    else:
        assert name not in SHAPES
        _centre_text(draw, name, x, y, 2.1 * r)
    return cell


def _draw_text(text: str) -> Image.Image:
    cell, x, y, r = _canvas()
    _centre_text(ImageDraw.Draw(cell), text, x, y, 1.9 * r, widest=0.8 * cell.width)
    return cell


def _centre_text(draw: ImageDraw.ImageDraw, text: str, x: float, y: float, height: float, widest: float = math.inf) -> None:
    """Text in Pillow's own font, slightly bold, scaled so that capitals and figures fill the height but never the width."""
    size = height
    font = ImageFont.load_default(size)
    left, _, right, _ = font.getbbox(text, stroke_width=2)
    size *= min(1.0 * height / (font.getbbox("0")[3] - font.getbbox("0")[1]) * 0.85, widest / (right - left))
    font = ImageFont.load_default(size)
    draw.text((x, y), text, fill=255, font=font, anchor="mm", stroke_width=2, stroke_fill=255)
