"""`Patches`: normalised 14x14 squares of pictures and frames, the record that the vision tower reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Patches:
    """Pixels of one or more pictures (or frames), cut into patches row by row, picture after picture."""

    pixels: Tensor
    # [P, 3, patch, patch] float32, each value x / 127.5 - 1
    grid_thw: Tensor
    # [N, 3] int64: one row (1, h, w) per picture or frame, h and w in patches, both even

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.grid_thw.ndim != 2 or self.grid_thw.shape[1] != 3:
            raise ValueError(
                f"Patches need pixels [P, 3, p, p] and grid_thw [N, 3], got "
                f"{tuple(self.pixels.shape)} and {tuple(self.grid_thw.shape)}"
            )
        num_patches = int(self.grid_thw.prod(dim=1).sum())
        if num_patches != self.pixels.shape[0]:
            raise ValueError(
                f"grid_thw counts {num_patches} patches, pixels holds {self.pixels.shape[0]}: give one grid row per picture"
            )

    def slice_pictures(self, start: int, end: int) -> "Patches":
        """The patches of pictures start..end-1 alone."""
        sizes = self.grid_thw.prod(dim=1)
        first, size = int(sizes[:start].sum()), int(sizes[start:end].sum())
        return Patches(self.pixels[first : first + size], self.grid_thw[start:end])


def patches_from_pixels(pixels_NHWC: Tensor | np.ndarray, patch_size: int = 14) -> Patches:
    """Cut equally sized pictures into normalised patches, row by row (report, vision tower; x / 127.5 - 1).

    `pixels_NHWC`: [N, H, W, 3] values 0..255 (uint8, or float on any device); H and W multiples of 2 * patch_size.
    """
    pixels_NHWC = torch.as_tensor(pixels_NHWC)
    num_pictures, height, width, num_channels = pixels_NHWC.shape
    rows, columns = height // patch_size, width // patch_size
    assert (rows * patch_size, columns * patch_size, num_channels) == (height, width, 3), tuple(pixels_NHWC.shape)
    squares = pixels_NHWC.reshape(num_pictures, rows, patch_size, columns, patch_size, 3).permute(0, 1, 3, 5, 2, 4)
    # Contiguous in the input's own type first: the copy moves a quarter of the bytes for uint8.
    values = squares.contiguous().to(torch.float32).div(127.5).sub_(1.0)
    grid_thw = torch.tensor([[1, rows, columns]], dtype=torch.int64).repeat(num_pictures, 1)
    return Patches(values.view(-1, 3, patch_size, patch_size), grid_thw)


def join_patches(parts: Sequence[Patches]) -> Patches | None:
    """The pictures of several records in one, in order; None for no record at all."""
    if len(parts) <= 1:
        return parts[0] if parts else None
    return Patches(torch.cat([part.pixels for part in parts]), torch.cat([part.grid_thw for part in parts]))
