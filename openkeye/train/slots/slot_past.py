"""`SlotPast`: the past of a `SlotBatch`, dense or sparse, with the indexer's loss taken in the same walk.

Letters: B clips, L keys, R query rows, H query heads, G KV heads, D head width, J indexer heads, I indexer width.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from openkeye.data.slots.slot_batch import SlotLayout
from openkeye.model.past import IndexerOutput
from openkeye.train.slots.hint_loss import AttentionHints
from openkeye.train.slots.indexer_loss import IndexerLoss, index_scores, indexer_loss


@dataclass
class SlotPast:
    """Attention inside clips: the prefix is causal, each slot sees the prefix and itself.

    With `attention="sparse"` each query attends to the `top_k` positions that the indexer scores highest among those it
    may see. With `loss_rows` the indexer's KL is measured on as many prefix rows and slot rows of every clip.
    """

    layout: SlotLayout
    num_clips: int
    attention: str = "dense"
    top_k: int = 0
    loss_rows: Tensor | None = None
    # [layers, 2, R] in 0..1: which rows of the prefix and of the slots, as shares of their number
    learns_from: str = "visible"
    # "visible" or "selected" (`indexer_loss`)
    wants_figures: bool = True
    # recall and mass of the indexer's choice beside its loss
    losses: list[IndexerLoss] = field(default_factory=list)
    hints: AttentionHints | None = None
    hint_losses: dict[int, Tensor] = field(default_factory=dict)
    # by hop

    @property
    def needs_index(self) -> bool:
        return self.attention == "sparse" or self.loss_rows is not None

    def attend(
        self,
        layer_index: int,
        query_THD: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        index: IndexerOutput | None,
    ) -> Tensor:
        """See `Past.attend`; tokens are clip after clip, T = B * L."""
        shape = (self.num_clips, self.layout.num_tokens)
        group = query_THD.shape[1] // key_TGD.shape[1]
        query_BHLD = query_THD.unflatten(0, shape).transpose(1, 2)
        key_BHLD = key_TGD.unflatten(0, shape).transpose(1, 2).repeat_interleave(group, dim=1)
        value_BHLD = value_TGD.unflatten(0, shape).transpose(1, 2).repeat_interleave(group, dim=1)
        if self.hints is not None:
            self.hint_losses |= self.hints.losses(layer_index, query_BHLD, key_BHLD)
        if index is not None:
            index = IndexerOutput(
                index.query_TJI.unflatten(0, shape), index.gates_TJ.unflatten(0, shape), index.key_TI.unflatten(0, shape)
            )
        outputs = [
            self._attend_part(layer_index, query_BHLD, key_BHLD, value_BHLD, index, is_prefix) for is_prefix in (True, False)
        ]
        return torch.cat(outputs, dim=2).transpose(1, 2).flatten(0, 1)

    def _attend_part(
        self,
        layer_index: int,
        query_BHLD: Tensor,
        key_BHLD: Tensor,
        value_BHLD: Tensor,
        index: IndexerOutput | None,
        is_prefix: bool,
    ) -> Tensor:
        split = self.layout.num_prefix
        queries = slice(0, split) if is_prefix else slice(split, None)
        keys = slice(0, split) if is_prefix else slice(0, None)
        query, key, value = query_BHLD[:, :, queries], key_BHLD[:, :, keys], value_BHLD[:, :, keys]
        allowed = None if is_prefix else self.layout.slot_mask(query.device)
        selected = None
        if index is not None:
            part = IndexerOutput(index.query_TJI[:, queries], index.gates_TJ[:, queries], index.key_TI[:, keys])
            if self.attention == "sparse":
                selected = self._select(part, allowed)
            if self.loss_rows is not None:
                shares = self.loss_rows[layer_index, 0 if is_prefix else 1]
                self.losses.append(self._loss(shares, query, key, part, allowed, selected))
        if selected is not None:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=selected[:, None])
        if is_prefix:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)

    @torch.no_grad()
    def _select(self, part: IndexerOutput, allowed: Tensor | None) -> Tensor:
        """[B, R, L] bool: the top_k allowed keys of every row."""
        num_rows, num_keys = part.query_TJI.shape[1], part.key_TI.shape[1]
        selected = torch.zeros(self.num_clips, num_rows, num_keys, dtype=torch.bool, device=part.key_TI.device)
        # Rows in slabs, so that the scores of a long clip never stand whole in memory.
        slab = max(16, (1 << 29) // (4 * self.num_clips * num_keys * part.query_TJI.shape[2]))
        for start in range(0, num_rows, slab):
            rows = slice(start, min(start + slab, num_rows))
            # The prefix is causal: keys after the slab's last row are visible to none of its rows.
            last = num_keys if allowed is not None else rows.stop
            scores = index_scores(part.query_TJI[:, rows], part.gates_TJ[:, rows], part.key_TI[:, :last])
            visible = _visible(allowed, rows, last, scores.device)
            # ReLU makes exact zeros common: among them the smaller position wins, as in answering.
            scores = torch.where(scores == 0, -1e-30 * (1 + torch.arange(last, device=scores.device)), scores)
            scores.masked_fill_(~visible, -torch.inf)
            best = scores.topk(min(self.top_k, last), dim=-1, sorted=False).indices
            selected[:, rows, :last].scatter_(2, best, True)
            selected[:, rows, :last] &= visible
        return selected

    def _loss(
        self,
        shares_R: Tensor,
        query: Tensor,
        key: Tensor,
        part: IndexerOutput,
        allowed: Tensor | None,
        selected: Tensor | None,
    ) -> IndexerLoss:
        """KL on the rows at these shares of the part."""
        num_rows, num_keys = query.shape[2], key.shape[2]
        rows = (shares_R * num_rows).long().clamp_max(num_rows - 1)
        if allowed is not None:
            visible = allowed[rows].expand(self.num_clips, -1, -1)
        else:
            visible = (rows[:, None] >= torch.arange(num_keys, device=rows.device)).expand(self.num_clips, -1, -1)
        return indexer_loss(
            query[:, :, rows].detach(),
            key.detach(),
            IndexerOutput(part.query_TJI[:, rows], part.gates_TJ[:, rows], part.key_TI),
            visible,
            self.top_k if self.wants_figures else 0,
            selected[:, rows] if selected is not None and self.learns_from == "selected" else None,
        )


def _visible(allowed: Tensor | None, rows: slice, num_keys: int, device: torch.device) -> Tensor:
    if allowed is not None:
        return allowed[rows]
    return torch.arange(rows.start, rows.stop, device=device)[:, None] >= torch.arange(num_keys, device=device)
