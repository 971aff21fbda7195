"""`Document`: one sample as the network reads it, alone; several of them make a `PackedBatch`.

Letters: L tokens of a document, M media tokens (pads that a picture's vectors replace).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from openkeye.common.device import upload
from openkeye.inputs.patches import Patches, join_patches, patches_from_pixels


class Pictures(Protocol):
    """Pictures on their way to the device that computes: pixels, or what draws them there."""

    @property
    def num_pictures(self) -> int: ...

    def patches(self, device: torch.device | str) -> Patches:
        """All of them as patches on the device, in order."""
        ...


@runtime_checkable
class JointlyDrawn(Pictures, Protocol):
    """Pictures that cost less when several records of their class are drawn at once."""

    def patches_of_all(self, group: Sequence[Any], device: torch.device | str) -> list[Patches]:
        """The patches of each record of a group, all of this class, the same as each one's own."""
        ...


def draw_pictures(pictures: Sequence[Pictures], device: torch.device | str) -> Patches | None:
    """All pictures as patches on the device, in order, records of one class together where that helps; None for none."""
    parts: dict[int, Patches] = {}
    groups: dict[type, dict[int, JointlyDrawn]] = {}
    for number, record in enumerate(pictures):
        if isinstance(record, JointlyDrawn):
            groups.setdefault(type(record), {})[number] = record
        else:
            parts[number] = record.patches(device)
    for group in groups.values():
        records = list(group.values())
        parts |= zip(group, records[0].patches_of_all(records, device), strict=True)
    return join_patches([parts[number] for number in range(len(pictures))])


@dataclass(frozen=True)
class PixelPictures:
    """Pictures as uint8 pixels, a quarter of the bytes of patches."""

    pixels: Sequence[np.ndarray]
    # each [N, H, W, 3] uint8, H and W multiples of two patches; one entry a still image or a video
    patch_size: int = 14

    @property
    def num_pictures(self) -> int:
        return sum(part.shape[0] for part in self.pixels)

    def patches(self, device: torch.device | str) -> Patches:
        """See `Pictures.patches`."""
        parts = [patches_from_pixels(upload(torch.from_numpy(part), device), self.patch_size) for part in self.pixels]
        joined = join_patches(parts)
        assert joined is not None, "a document without pictures has none to draw"
        return joined


@dataclass(frozen=True)
class Document:
    """Tokens, positions, what is learnt, and pictures of one sample.

    The tokens before the first branch are the trunk. A branch sees the trunk and itself, never another branch; its positions go
    on from the trunk's. A document without branches is all trunk.
    """

    name: str
    input_ids: Tensor
    # [L] int64
    position_ids: Tensor
    # [3, L] int64 (`inputs.positions`)
    is_learnt: Tensor
    # [L] bool: tokens that the model is to predict
    is_media: Tensor
    # [L] bool: pads that a picture's vectors replace; a placeholder that somebody wrote in prose is none
    pictures: Sequence[Pictures] = ()
    # in the order of their pads
    branches: tuple[int, ...] = ()
    # where each branch begins, rising
    task: str = ""

    def __post_init__(self) -> None:
        length = self.input_ids.shape[0]
        shapes = [tuple(x.shape) for x in (self.input_ids, self.position_ids, self.is_learnt, self.is_media)]
        if shapes != [(length,), (3, length), (length,), (length,)]:
            raise ValueError(f"{self.name}: a document needs ids [L], positions [3, L] and two masks [L], got {shapes}")
        if any(a >= b for a, b in pairwise((0, *self.branches, length))):
            raise ValueError(f"{self.name}: branches {self.branches} must rise inside 1..{length - 1}")
        if self.branches and bool(self.is_media[self.branches[0] :].any()):
            raise ValueError(f"{self.name}: pictures stand in the trunk, not in a branch")

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """(start, end) of the trunk and of every branch."""
        return tuple(pairwise((0, *self.branches, self.num_tokens)))

    @property
    def num_learnt(self) -> int:
        """Tokens that count in the loss; the first token of a segment has nobody to predict it."""
        return int(self.is_learnt.sum()) - sum(bool(self.is_learnt[start]) for start, _ in self.segments)
