"""The loss of attention hints: the share of one head's attention that falls on the hinted keys, as minus its logarithm.

Letters: B clips, L tokens of a clip, H heads, D head width; hints are [B, hints of a clip].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from openkeye.data.slots.hints import ANY, NUM_HOPS
from openkeye.data.slots.slot_batch import SlotBatch

HINTED_LAYERS = (2, 3, 4, 3, 1)
# decoder layer of each hop; the first layer gathers times
HINTED_HEADS = (0, 0, 0, 4, 0)
# query head of each hop; 4 reads another KV head than 0 wherever there are two


@dataclass(frozen=True)
class AttentionHints:
    """The hints of a batch, each applied to one head of one layer."""

    batch: SlotBatch

    def losses(self, layer_index: int, query_BHLD: Tensor, key_BHLD: Tensor) -> dict[int, Tensor]:
        """Mean of -log(attention on the hinted keys) by hop, for the hops that this layer serves."""
        return {
            hop: self._hop_loss(hop, query_BHLD[:, HINTED_HEADS[hop]], key_BHLD[:, HINTED_HEADS[hop]])
            for hop in range(NUM_HOPS)
            if HINTED_LAYERS[hop] == layer_index
        }

    def _hop_loss(self, hop: int, query_BLD: Tensor, key_BLD: Tensor) -> Tensor:
        batch, layout = self.batch, self.batch.layout
        row, track, frame, key = batch.hints[hop].unbind(-1)
        picked = query_BLD.gather(1, row.clamp_min(0)[..., None].expand(-1, -1, query_BLD.shape[-1]))
        logits = (picked @ key_BLD.transpose(1, 2)).float() * query_BLD.shape[-1] ** -0.5
        column = torch.arange(layout.num_tokens, device=logits.device)
        slot_start = layout.num_prefix + (row - layout.num_prefix) // layout.slot_length * layout.slot_length
        is_visible = (column < layout.num_prefix) | (column >= slot_start[..., None])
        is_visible &= column <= row[..., None]
        if hop == 2:
            is_target = column == key[..., None]
        else:
            is_target = batch.token_tracks_BL[:, None] == track[..., None]
            is_target &= (frame[..., None] == ANY) | (batch.token_frames_L == frame[..., None])
        log_probability = logits.masked_fill(~is_visible, -1e9).log_softmax(dim=-1)
        log_share = log_probability.masked_fill(~is_target, -1e9).logsumexp(dim=-1)
        # A thing may lie under another one in its cell: hints without a target count for nothing.
        weight = ((row >= 0) & is_target.any(dim=-1)).float()
        return -(log_share.clamp_min(-50.0) * weight).sum() / weight.sum().clamp_min(1)
