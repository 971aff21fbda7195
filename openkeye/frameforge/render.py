"""Scenes to pixels, on any device: one batched draw per layer for all frames of all clips.

Letters: F frames (of all clips together), B clips, S canvas side in pixels, N sprite instances of a layer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from openkeye.common.device import upload
from openkeye.frameforge.atlas import CELL_ASPECT, atlas_masks
from openkeye.frameforge.catalogue import CAPTION_HALF_HEIGHT, COLOURS, HALF_SIZES
from openkeye.frameforge.scene import BACKGROUNDS, Background, Scene

COLUMNS = ("frame", "layer", "x", "y", "half_height", "sprite", "colour", "texture", "is_caption", "track")
NOISE_CELLS = 28
PHOTOGRAPH_SIDE = 192
MIN_STEP = 0.012
# share of the canvas that a thing must move between two frames to count as moving
OUTLINE = 18.0
# grey level of the thin dark rim that keeps sprites apart from any background


@dataclass(frozen=True)
class RenderJob:
    """What to draw, as plain arrays: cheap to send between processes."""

    instances: np.ndarray
    # [n, 10] float32, one row per (frame, visible sprite), columns as COLUMNS, in drawing order
    part_sizes: tuple[int, ...]
    # rows that are drawn at once; no part names a frame twice, so writes of one part never meet
    backgrounds: np.ndarray
    # [B, 12] float32: kind, first RGB, second RGB, angle, photograph, crop x, crop y, crop scale
    noise: np.ndarray
    # [B, NOISE_CELLS, NOISE_CELLS] float32 in -1..1
    num_frames: tuple[int, ...]
    # of each clip

    def cell_labels(self, num_cells: int) -> dict[str, np.ndarray]:
        """What the uppermost sprite centred in each cell is and has become, 0 for none; arrays over F * cells^2.

        `colours`, `sprites` and `tracks` (each + 1); `onsets`: 1 the same track stood in the frame before, 2 its first
        appearance, 3 a return; `directions`: 1 at rest or not there before, 2 left, 3 right, 4 up, 5 down;
        `offsets` [.., 2]: the centre's place in its cell, -0.5 to 0.5.
        """
        rows = self.instances
        onsets, directions = self._changes()
        place = np.clip(rows[:, 2:4] * num_cells, 0, num_cells - 1e-4)
        inside = place.astype(np.int64)
        cell = (rows[:, 0].astype(np.int64) * num_cells + inside[:, 1]) * num_cells + inside[:, 0]
        size = sum(self.num_frames) * num_cells * num_cells
        values = {
            "colours": rows[:, 6] + 1,
            "sprites": rows[:, 5] + 1,
            "tracks": rows[:, 9] + 1,
            "onsets": onsets,
            "directions": directions,
        }
        labels = {name: np.zeros(size, np.int16) for name in values}
        for name, value in values.items():
            labels[name][cell] = value
        labels["offsets"] = np.zeros((size, 2), np.float32)
        labels["offsets"][cell] = place - inside - 0.5
        return labels

    def _changes(self) -> tuple[np.ndarray, np.ndarray]:
        """Onset and direction of every row, by comparing it with the same track's row of the frame before."""
        rows = self.instances
        clip = np.repeat(np.arange(len(self.num_frames)), self.num_frames)[rows[:, 0].astype(np.int64)]
        order = np.lexsort((rows[:, 0], rows[:, 9], clip))
        ordered, clip = rows[order], clip[order]
        is_known = np.zeros(len(rows), bool)
        is_known[1:] = (ordered[1:, 9] == ordered[:-1, 9]) & (clip[1:] == clip[:-1])
        follows = is_known.copy()
        follows[1:] &= ordered[1:, 0] == ordered[:-1, 0] + 1
        step = np.zeros((len(rows), 2), np.float32)
        step[1:] = np.where(follows[1:, None], ordered[1:, 2:4] - ordered[:-1, 2:4], 0.0)
        is_across = np.abs(step[:, 0]) >= np.abs(step[:, 1])
        direction = np.where(is_across, np.where(step[:, 0] < 0, 2, 3), np.where(step[:, 1] < 0, 4, 5))
        direction = np.where(np.abs(step).max(axis=1) < MIN_STEP, 1, direction)
        onset = np.where(follows, 1, np.where(is_known, 3, 2))
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return onset[back], direction[back]


def scene_job(scene: Scene, frame_times: np.ndarray) -> RenderJob:
    """The drawing of one scene at the given times (seconds)."""
    rows = []
    for number, track in enumerate(scene.tracks):
        visible = np.zeros(len(frame_times), bool)
        for first, last in track.intervals:
            visible |= (frame_times >= first) & (frame_times < last)
        frames = np.flatnonzero(visible)
        path = np.asarray(track.path)
        table = np.empty((len(frames), len(COLUMNS)), np.float32)
        table[:, 0], table[:, 1] = frames, track.layer
        table[:, 2] = np.interp(frame_times[frames], path[:, 0], path[:, 1])
        table[:, 3] = np.interp(frame_times[frames], path[:, 0], path[:, 2])
        table[:, 4:] = (track.half_height, track.sprite, track.colour, track.texture, track.is_caption, number)
        rows.append(table)
    background = scene.background
    noise = np.random.default_rng(background.seed).uniform(-1, 1, (1, NOISE_CELLS, NOISE_CELLS)).astype(np.float32)
    return RenderJob(*_in_drawing_order(np.concatenate(rows)), _background_row(background), noise, (len(frame_times),))


def _background_row(background: Background) -> np.ndarray:
    row = [
        BACKGROUNDS.index(background.kind),
        *background.first,
        *background.second,
        background.angle,
        background.photograph % num_photographs(),
        *background.crop,
    ]
    return np.array([row], np.float32)


def join_jobs(jobs: list[RenderJob]) -> RenderJob:
    """Several clips as one job, frames numbered through."""
    offset, tables = 0, []
    for job in jobs:
        table = job.instances.copy()
        table[:, 0] += offset
        offset += sum(job.num_frames)
        tables.append(table)
    return RenderJob(
        *_in_drawing_order(np.concatenate(tables)),
        np.concatenate([job.backgrounds for job in jobs]),
        np.concatenate([job.noise for job in jobs]),
        tuple(count for job in jobs for count in job.num_frames),
    )


def split_job(job: RenderJob, max_frames: int) -> Iterator[RenderJob]:
    """The same frames as jobs of at most `max_frames`, in order; clips are cut where a job is full."""
    clip_of_frame = np.repeat(np.arange(len(job.num_frames)), job.num_frames)
    for first in range(0, len(clip_of_frame), max_frames):
        clips, counts = np.unique(clip_of_frame[first : first + max_frames], return_counts=True)
        is_inside = (job.instances[:, 0] >= first) & (job.instances[:, 0] < first + max_frames)
        table = job.instances[is_inside]
        table[:, 0] -= first
        yield RenderJob(*_in_drawing_order(table), job.backgrounds[clips], job.noise[clips], tuple(counts.tolist()))


def render(job: RenderJob, side: int, device: torch.device | str) -> Tensor:
    """Draw a job on square canvases: uint8 [F, side, side, 3]."""
    margin = int(side * (HALF_SIZES[1] * 1.2 + CAPTION_HALF_HEIGHT * CELL_ASPECT)) + 2
    # Every upload here goes through `upload`: one blocking copy would make the host wait for all work before it.
    clip_of_frame = upload(torch.from_numpy(np.repeat(np.arange(len(job.num_frames)), job.num_frames)), device)
    backgrounds = _backgrounds(job, side, device)
    canvas = F.pad(backgrounds, (0, 0, margin, margin, margin, margin))[clip_of_frame]
    masks = atlas_masks(side, torch.device(device))
    palette = _palette(torch.device(device))
    # One upload for all parts: a copy for each would wait for the device each time.
    instances = upload(torch.from_numpy(job.instances), device)
    start = 0
    for size in job.part_sizes:
        # A single row would be compiled anew, since compilers treat a size of 1 apart.
        draw = _draw_compiled if canvas.is_cuda and size > 1 else _draw
        draw(canvas, instances[start : start + size], masks, palette, side, margin, bool(job.instances[start, 8]))
        start += size
    return canvas[:, margin : margin + side, margin : margin + side].clamp(0, 255).round().to(torch.uint8)


@lru_cache(maxsize=2)
def _palette(device: torch.device) -> Tensor:
    return torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=device)


def _in_drawing_order(instances: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """Rows sorted for drawing, objects before captions and lower layers first, and the sizes of the parts drawn at once."""
    parts = []
    for is_caption in (0.0, 1.0):
        kind = instances[instances[:, 8] == is_caption]
        for layer in np.unique(kind[:, 1]):
            rows = kind[kind[:, 1] == layer]
            while len(rows):
                _, first = np.unique(rows[:, 0], return_index=True)
                is_first = np.zeros(len(rows), bool)
                is_first[first] = True
                parts.append(rows[is_first])
                rows = rows[~is_first]
    table = np.concatenate(parts) if parts else instances
    return table, tuple(len(part) for part in parts)


def _draw(canvas: Tensor, rows: Tensor, masks: Tensor, palette: Tensor, side: int, margin: int, is_caption: bool) -> None:
    """Blend one sprite a frame into the canvas, in place."""
    half_height = CAPTION_HALF_HEIGHT if is_caption else HALF_SIZES[1]
    aspect = CELL_ASPECT if is_caption else 1.0
    box_h = int(2 * half_height * side * 1.12) + 3
    box_w = int(2 * half_height * aspect * side * 1.12) + 3
    device = canvas.device
    x, y = rows[:, 2] * side + margin, rows[:, 3] * side + margin
    left, top = (x - box_w / 2).floor().long(), (y - box_h / 2).floor().long()
    line = top[:, None] + torch.arange(box_h, device=device)
    column = left[:, None] + torch.arange(box_w, device=device)
    half = rows[:, 4, None] * side
    v = (line + 0.5 - y[:, None]) / half
    u = (column + 0.5 - x[:, None]) / (half * aspect)
    fill, rim = _sample(masks, rows[:, 5].long(), u, v, is_caption)
    colour = palette[rows[:, 6].long()][:, None, None]
    shade = _texture(rows[:, 7].long(), u, v)[..., None]
    inside = colour * (1 - 0.6 * shade)
    size = canvas.shape[1]
    index = ((rows[:, 0].long() * size)[:, None, None] + line[:, :, None]) * size + column[:, None, :]
    flat = canvas.view(-1, 3)
    below = flat[index]
    mixed = below + (OUTLINE - below) * rim[..., None]
    flat[index] = mixed + (inside - mixed) * fill[..., None]


def _draw_compiled(
    canvas: Tensor, rows: Tensor, masks: Tensor, palette: Tensor, side: int, margin: int, is_caption: bool
) -> None:
    """`_draw` as a few fused kernels: its sixty small operations a part would keep the host busier than the device."""
    # Frames and rows vary from batch to batch. Everything else is best known to the compiler: a side of the canvas that has
    # become a symbol costs minutes of algebra.
    torch._dynamo.maybe_mark_dynamic(canvas, 0)
    torch._dynamo.maybe_mark_dynamic(rows, 0)
    _compiled_draw()(canvas, rows, masks, palette, side, margin, is_caption)


@lru_cache(maxsize=1)
def _compiled_draw() -> Callable[[Tensor, Tensor, Tensor, Tensor, int, int, bool], None]:
    return torch.compile(_draw, dynamic=False)


def _sample(masks: Tensor, sprite: Tensor, u_NW: Tensor, v_NH: Tensor, is_caption: bool) -> tuple[Tensor, Tensor]:
    """Fill and rim coverage [N, box, box] of each sprite at its box coordinates (-1..1 spans the sprite's cell)."""
    _, _, cell_h, cell_w = masks.shape
    scale = 1.0 if is_caption else 1 / CELL_ASPECT
    # The cell leaves a border of one eighth for the rim.
    grid_x = ((u_NW * 0.8 * scale + 1) * cell_w - 1) / 2
    grid_y = ((v_NH * 0.8 + 1) * cell_h - 1) / 2
    x0, y0 = grid_x.floor(), grid_y.floor()
    wx, wy = (grid_x - x0)[:, None, None, :], (grid_y - y0)[:, None, :, None]

    def at(line: Tensor, column: Tensor) -> Tensor:
        ok = ((line >= 0) & (line < cell_h))[:, :, None] & ((column >= 0) & (column < cell_w))[:, None, :]
        rows, columns = line.clamp(0, cell_h - 1).long(), column.clamp(0, cell_w - 1).long()
        index = (sprite[:, None, None] * cell_h + rows[:, :, None]) * cell_w + columns[:, None, :]
        both = masks.permute(0, 2, 3, 1).reshape(-1, 2)[index].permute(0, 3, 1, 2)
        return both * ok[:, None]

    top = at(y0, x0) * (1 - wx) + at(y0, x0 + 1) * wx
    bottom = at(y0 + 1, x0) * (1 - wx) + at(y0 + 1, x0 + 1) * wx
    both = top * (1 - wy) + bottom * wy
    return both[:, 0], both[:, 1]


def _texture(texture: Tensor, u_NW: Tensor, v_NH: Tensor) -> Tensor:
    """1 where the second shade shows, [N, H, W]."""
    u, v = u_NW[:, None, :], v_NH[:, :, None]
    kind = texture[:, None, None]
    stripes = ((v * 2.5).floor() % 2 == 0).expand(-1, -1, u.shape[2])
    checks = ((u * 2.0).floor() + (v * 2.0).floor()) % 2 == 0
    dots = ((u * 2.0) % 1 - 0.5) ** 2 + ((v * 2.0) % 1 - 0.5) ** 2 < 0.09
    return torch.where(kind == 1, stripes, torch.where(kind == 2, dots, (kind == 3) & checks)).float()


def _backgrounds(job: RenderJob, side: int, device: torch.device | str) -> Tensor:
    """[B, side, side, 3] float32."""
    table = upload(torch.from_numpy(job.backgrounds), device)
    kind, first, second, angle = table[:, 0], table[:, 1:4], table[:, 4:7], table[:, 7]
    line = torch.linspace(-1, 1, side, device=device)
    ramp = (line[None, None, :] * angle.cos()[:, None, None] + line[None, :, None] * angle.sin()[:, None, None]) * 0.35 + 0.5
    colour = first[:, None, None] + (second - first)[:, None, None] * ramp[..., None]
    noise = F.interpolate(upload(torch.from_numpy(job.noise)[:, None], device), size=(side, side), mode="bilinear")[:, 0]
    is_noisy, is_photo = (kind == BACKGROUNDS.index(name) for name in ("noisy", "photographic"))
    colour = colour + noise[..., None] * 38.0 * is_noisy[:, None, None, None]
    photo = _photographs(table, side, device)
    return torch.where(is_photo[:, None, None, None], photo, colour)


def _photographs(table: Tensor, side: int, device: torch.device | str) -> Tensor:
    """The chosen crops, dimmed so that sprites stand out, [B, side, side, 3]."""
    bank = photograph_bank(torch.device(device))[table[:, 8].long()]
    scale = table[:, 11]
    theta = torch.zeros(len(table), 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1] = scale, scale
    theta[:, :, 2] = table[:, 9:11]
    grid = F.affine_grid(theta, [len(table), 3, side, side], align_corners=False)
    return F.grid_sample(bank, grid, padding_mode="reflection", align_corners=False).permute(0, 2, 3, 1) * 0.75


def _photograph_paths() -> list[Path]:
    return sorted((Path(__file__).parent / "photographs").glob("*.jpg"))


@lru_cache(maxsize=1)
def num_photographs() -> int:
    """How many photographs the package holds."""
    return len(_photograph_paths())


@lru_cache(maxsize=2)
def photograph_bank(device: torch.device) -> Tensor:
    """All photographs, [n, 3, PHOTOGRAPH_SIDE, PHOTOGRAPH_SIDE] float32 0..255."""
    size = (PHOTOGRAPH_SIDE, PHOTOGRAPH_SIDE)
    pictures = [np.asarray(Image.open(path).convert("RGB").resize(size)) for path in _photograph_paths()]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().to(device)
