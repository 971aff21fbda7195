"""`ShardedPast`: the past of one rank of several. Each scores only its share for the indexer, and all end with the same lists.

Prompts: every rank selects for every size-th new token. Answers under way: for every size-th request, or, where there are
fewer requests than ranks, each scores every size-th page of all, and the best of each rank are merged. Both are exact: ties go
to the smaller position as if one rank had done it all. No shape depends on what the device holds, so that both can be captured.

Letters: T new tokens, H query heads, K picked tokens, B requests, J indexer heads, I indexer width.
"""

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openkeye.engine.batch import PagedPast
from openkeye.engine.decode import DecodePast, DecodeRows, OnPicked
from openkeye.engine.pages import PagedCaches
from openkeye.kernels.dispatch import (
    attend_in_pages,
    merge_candidates,
    rank_candidates,
    scores_in_pages,
    top_k_positions,
)
from openkeye.kernels.layer_caches import LayerCaches
from openkeye.model.past import CachedIndex
from openkeye.model.sharding import ALONE, Shard

if TYPE_CHECKING:
    from openkeye.kernels.sparse_decode import DecodeScratch


class ShardedPast(PagedPast):
    """A `PagedPast` over the KV heads of one rank, and over the index keys of all tokens."""

    @cached_property
    def _decoding(self) -> DecodePast:
        rows = self.batch.rows(self.paged.page_size)
        on_picked = self._keep_decoded if self.keeps_evidence or self.keeps_picks else None
        return decode_past(self.shard, rows, self.paged, self.attention, self.top_k, on_picked=on_picked)

    def _select(self, caches: LayerCaches, index: CachedIndex, positions_T: Tensor, pages_P: Tensor) -> Tensor:
        """See `PagedPast._select`."""
        num_tokens, shard = positions_T.shape[0], self.shard
        picked_TK = positions_T.new_full((-(-num_tokens // shard.size), self.top_k), -1, dtype=torch.int32)
        # Neighbours go to different ranks: later tokens see more keys.
        own = slice(shard.rank, None, shard.size)
        positions_T = positions_T[own].contiguous()
        if count := positions_T.shape[0]:
            mine = CachedIndex(index.query_TJI[own].contiguous(), index.gates_TJ[own].contiguous())
            picked_TK[:count] = super()._select(caches, mine, positions_T, pages_P)
        return shard.gather(picked_TK).transpose(0, 1).flatten(0, 1)[:num_tokens]


class ShardedDecodePast(DecodePast):
    """A `DecodePast` over the KV heads of one rank."""

    shard: Shard = ALONE

    def attend(self, layer_index: int, query_THD: Tensor, index: CachedIndex | None) -> Tensor:
        """See `CachedPast.attend`."""
        if index is None:
            return super().attend(layer_index, query_THD, index)
        caches, rows = self.caches(layer_index), self.rows
        pick = pick_by_request if query_THD.shape[0] >= self.shard.size else pick_by_page
        picked_BK = pick(self.shard, index, caches, rows.page_table_BP, rows.lengths_B, self.top_k)
        if self.on_picked is not None:
            self.on_picked(layer_index, query_THD, picked_BK)
        return attend_in_pages(query_THD, caches, picked_BK, rows.page_table_BP, query_THD.shape[-1] ** -0.5, self.scratch)


def decode_past(
    shard: Shard,
    rows: DecodeRows,
    caches: PagedCaches,
    attention: str,
    top_k: int,
    scratch: "DecodeScratch | None" = None,
    on_picked: OnPicked | None = None,
) -> DecodePast:
    """The past of rows that decode, on one rank or alone; see `DecodePast`."""
    if shard.size == 1:
        return DecodePast(rows, caches, attention, top_k, scratch, on_picked)
    past = ShardedDecodePast(rows, caches, attention, top_k, scratch, on_picked)
    past.shard = shard
    return past


def pick_by_request(
    shard: Shard, index: CachedIndex, caches: LayerCaches, page_table_BP: Tensor, lengths_B: Tensor, k: int
) -> Tensor:
    """What each new token attends to: [B, k] int32 positions of its request; each rank picks for some of the requests."""
    num_requests = page_table_BP.shape[0]
    num_each = -(-num_requests // shard.size)
    # A rank without a request of its own does another's again, which is left out below: all do the same amount of work.
    own = (torch.arange(num_each, device=lengths_B.device) * shard.size + shard.rank).clamp_max(num_requests - 1)
    query_BJI, lengths = index.query_TJI.contiguous(), lengths_B[own]
    # Bytes, because not every device copies e4m3 by index.
    query_BJI = query_BJI.view(torch.uint8)[own].view(query_BJI.dtype)
    scores_BL = scores_in_pages(query_BJI, index.gates_TJ[own], caches, page_table_BP[own], lengths)
    picked_BK = top_k_positions(scores_BL, k, lengths)
    return shard.gather(picked_BK).transpose(0, 1).flatten(0, 1)[:num_requests]


def pick_by_page(
    shard: Shard, index: CachedIndex, caches: LayerCaches, page_table_BP: Tensor, lengths_B: Tensor, k: int
) -> Tensor:
    """As `pick_by_request`; each rank scores every size-th page of all requests.

    A position among the k best of all is among the k best of its rank, so that the ranks' best are enough to merge.
    """
    num_pages, size = page_table_BP.shape[1], caches.page_size
    own = torch.arange(shard.rank, num_pages + shard.rank, shard.size, device=lengths_B.device)
    # As many pages on every rank; where there is no such page no length reaches it.
    pages_BP = page_table_BP[:, own.clamp_max(num_pages - 1)].contiguous()
    lengths = (lengths_B[:, None] - own * size).clamp(0, size).sum(dim=1).int()
    scores_BL = scores_in_pages(index.query_TJI, index.gates_TJ, caches, pages_BP, lengths)
    columns_BK = top_k_positions(scores_BL, k, lengths).long()
    best_BK = scores_BL.gather(1, columns_BK.clamp(0, scores_BL.shape[1] - 1))
    positions_BK = own[columns_BK.clamp_min(0) // size] * size + columns_BK % size
    numbers_BK = rank_candidates(best_BK, torch.where(columns_BK < 0, -1, positions_BK))
    return merge_candidates(shard.gather(numbers_BK).transpose(0, 1).flatten(1), k)
