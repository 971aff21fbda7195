"""`SlotBatch`: several clips of one length, each a video prefix with independent question slots behind it.

A clip is encoded once and answers many questions: every slot sees the prefix and itself, never another slot, and its
positions restart where the prefix ends. That gives the network about eight times the supervision per encoded frame.

Letters: B clips, L tokens of a clip (prefix and slots), N slots of a clip.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from openkeye.inputs.patches import Patches

NO_LABEL = -100
# pads the list of labels to one length for every batch of a layout


@dataclass(frozen=True)
class SlotLayout:
    """How the L tokens of a clip divide: a prefix, then `num_slots` slots of `slot_length` tokens each."""

    num_prefix: int
    num_slots: int
    slot_length: int

    @property
    def num_tokens(self) -> int:
        return self.num_prefix + self.num_slots * self.slot_length

    def slot_mask(self, device: torch.device | str) -> Tensor:
        """Which keys each slot token may see: [N * slot_length, L] bool."""
        num_slot_tokens = self.num_slots * self.slot_length
        index = torch.arange(num_slot_tokens, device=device)
        same_slot = index[:, None] // self.slot_length == index[None, :] // self.slot_length
        earlier = index[:, None] >= index[None, :]
        prefix = torch.ones(num_slot_tokens, self.num_prefix, dtype=torch.bool, device=device)
        return torch.cat([prefix, same_slot & earlier], dim=1)


@dataclass(frozen=True)
class CellLabels:
    """What is in each merged cell of each frame: int64 [M], 0 for nothing (`RenderJob.cell_labels`), offsets float32 [M, 2]."""

    colours: Tensor
    sprites: Tensor
    onsets: Tensor
    directions: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class SlotBatch:
    """Tokens, labels and pictures of one training step."""

    layout: SlotLayout
    input_ids_BL: Tensor
    # int64
    label_positions: Tensor
    # [n] int64 into the flattened B * L: positions whose next token is part of an answer
    label_ids: Tensor
    # [n] int64: that next token, or NO_LABEL
    label_slots: Tensor
    # [n] int64 into the flattened B * N
    position_ids_3L: Tensor
    # int64, the same for every clip
    task_ids_BN: Tensor
    # int64, index into the stream's list of tasks
    patches: Patches
    # every frame of every clip, clip after clip
    cells: CellLabels
    cell_tokens: Tensor
    # [M] int64 into the flattened B * L: the token of each cell, frame after frame
    token_tracks_BL: Tensor
    # int16: 1-based number of the thing whose centre lies in each cell token, 0 elsewhere
    token_frames_L: Tensor
    # int16: frame of each prefix token, -1 elsewhere
    hints: Tensor
    # [hops, B, hints, 4] int64 (`hints.hint_table`)

    def __post_init__(self) -> None:
        shape = (self.task_ids_BN.shape[0], self.layout.num_tokens)
        if tuple(self.input_ids_BL.shape) != shape:
            raise ValueError(f"SlotBatch expects tokens {shape}, got {tuple(self.input_ids_BL.shape)}")
        if not self.label_positions.shape == self.label_ids.shape == self.label_slots.shape:
            raise ValueError("SlotBatch expects label_positions, label_ids and label_slots of one length")
        if tuple(self.position_ids_3L.shape) != (3, self.layout.num_tokens):
            raise ValueError(
                f"SlotBatch expects positions (3, {self.layout.num_tokens}), got {tuple(self.position_ids_3L.shape)}"
            )

    @property
    def num_clips(self) -> int:
        return self.input_ids_BL.shape[0]
