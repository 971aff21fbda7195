"""`Patches`: normalised 14x14 squares of pictures and frames, the record that the vision tower reads."""

from dataclasses import dataclass

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
        edges = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        return Patches(self.pixels[int(edges[start]) : int(edges[end])], self.grid_thw[start:end])
