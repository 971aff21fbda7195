"""`PackedBatch`: documents one after the other, as one step's pass of the network reads them. None sees another.

Letters: T tokens, n tokens with a label, N documents, M media tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openkeye.common.device import upload
from openkeye.data.document import Document, Pictures
from openkeye.inputs.patches import Patches, join_patches

NO_LABEL = -1


@dataclass(frozen=True)
class DocumentSpan:
    """Where a document stands in a pack: the trunk is start..trunk_end-1, branches follow it."""

    start: int
    trunk_end: int
    branches: tuple[int, ...]
    # where each begins; the next one's beginning, or `end`, is its end
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class PackedLayout:
    """Which tokens see which: numbers on the host, so that nobody waits for the device to ask for them."""

    spans: tuple[DocumentSpan, ...]

    @property
    def num_tokens(self) -> int:
        return self.spans[-1].end if self.spans else 0


@dataclass(frozen=True)
class PackedBatch:
    """One pack. Every tensor lies on one device."""

    layout: PackedLayout
    input_ids: Tensor
    # [T] int64
    position_ids: Tensor
    # [3, T] int64
    labels: Tensor
    # [T] int64: the token that each token is to predict, NO_LABEL where it learns nothing
    learnt_positions: Tensor
    # [n] int64, rising: where labels are not NO_LABEL, so that the head runs on these alone and nobody asks the device for them
    media_positions: Tensor
    # [M] int64, rising: the tokens that the pictures' vectors replace, in their order
    tasks: tuple[str, ...]
    # of each document
    names: tuple[str, ...]
    pictures: tuple[Pictures, ...] = ()
    # of all documents in order, drawn by `patches`

    @property
    def num_learnt(self) -> int:
        """Labels that are not NO_LABEL."""
        return self.learnt_positions.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    def patches(self) -> Patches | None:
        """All pictures as patches on the batch's device; None where there are none."""
        return join_patches([pictures.patches(self.device) for pictures in self.pictures])

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same on a device; pictures are drawn there."""
        tensors = ("input_ids", "position_ids", "labels", "learnt_positions", "media_positions")
        moved = {name: upload(getattr(self, name), device) for name in tensors}
        return PackedBatch(**vars(self) | moved)


def pack(documents: Sequence[Document]) -> PackedBatch:
    """Documents as one pack, in order; positions stay those that each has alone.

    Raises:
        ValueError: no document.
    """
    if not documents:
        raise ValueError("pack got no documents; give at least one")
    spans: list[DocumentSpan] = []
    labels = []
    start = 0
    for document in documents:
        branches = tuple(start + branch for branch in document.branches)
        end = start + document.num_tokens
        spans.append(DocumentSpan(start, branches[0] if branches else end, branches, end))
        labels.append(labels_of(document))
        start = end
    joined = torch.cat(labels)
    return PackedBatch(
        layout=PackedLayout(tuple(spans)),
        input_ids=torch.cat([document.input_ids for document in documents]),
        position_ids=torch.cat([document.position_ids for document in documents], dim=1),
        labels=joined,
        learnt_positions=(joined != NO_LABEL).nonzero()[:, 0],
        media_positions=torch.cat([document.is_media for document in documents]).nonzero()[:, 0],
        tasks=tuple(document.task for document in documents),
        names=tuple(document.name for document in documents),
        pictures=tuple(pictures for document in documents for pictures in document.pictures),
    )


def labels_of(document: Document) -> Tensor:
    """[L] int64: the next token of the same segment where that is learnt, else NO_LABEL."""
    labels = torch.full_like(document.input_ids, NO_LABEL)
    for start, end in document.segments:
        following = document.input_ids[start + 1 : end]
        labels[start : end - 1] = torch.where(document.is_learnt[start + 1 : end], following, NO_LABEL)
    return labels
