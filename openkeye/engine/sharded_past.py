"""`ShardedPast`: the past of one rank of several. Each scores only its share for the indexer, and all end with the same lists.

Prompts: every rank selects for every size-th new token. Answers under way: for every size-th request, or, where there are
fewer requests than ranks, each scores every size-th page of all, and the best of each rank are merged. Both are exact: ties go
to the smaller position as if one rank had done it all.

Letters: T new tokens, H query heads, K picked tokens, B requests, J indexer heads, I indexer width.
"""

import torch
from torch import Tensor

from openkeye.engine.batch import PagedPast, Segment
from openkeye.kernels.dispatch import (
    attend_in_pages,
    merge_candidates,
    rank_candidates,
    scores_in_pages,
    top_k_positions,
)
from openkeye.model.past import IndexerOutput
from openkeye.model.sharding import ALONE, Shard


class ShardedPast(PagedPast):
    """A `PagedPast` over the KV heads of one rank, and over the index keys of all tokens."""

    shard: Shard = ALONE

    def _select(self, layer_index: int, segment: Segment, rows: slice, index: IndexerOutput, positions_T: Tensor) -> Tensor:
        """See `PagedPast._select`."""
        shard = self.shard
        # Neighbours go to different ranks: later tokens see more keys.
        own = slice(rows.start + shard.rank, rows.stop, shard.size)
        num_each = -(-positions_T.shape[0] // shard.size)
        picked_TK = positions_T.new_full((num_each, self.top_k), -1, dtype=torch.int32)
        query_TJI, gates_TJ = index.query_TJI[own].contiguous(), index.gates_TJ[own].contiguous()
        count = query_TJI.shape[0]
        if count:
            mine = IndexerOutput(query_TJI, gates_TJ, index.key_TI)
            positions_T = positions_T[shard.rank :: shard.size].contiguous()
            picked_TK[:count] = super()._select(layer_index, segment, slice(0, count), mine, positions_T)
        return shard.gather(picked_TK).transpose(0, 1).flatten(0, 1)[: rows.stop - rows.start]

    def _decode_picked(self, layer_index: int, query_THD: Tensor, index: IndexerOutput) -> Tensor:
        """See `PagedPast._decode_picked`."""
        keys, values = self.caches.keys[layer_index], self.caches.values[layer_index]
        pick = pick_by_request if query_THD.shape[0] >= self.shard.size else pick_by_page
        queries, table = (index.query_TJI, index.gates_TJ), self.page_table
        picked_BK = pick(self.shard, *queries, self.caches.index_keys[layer_index], *table, self.top_k, self.caches.page_size)
        return attend_in_pages(query_THD, keys, values, picked_BK, query_THD.shape[-1] ** -0.5, table[0], self.caches.page_size)


def pick_by_request(
    shard: Shard,
    query_BJI: Tensor,
    gates_BJ: Tensor,
    key_SI: Tensor,
    page_table_BP: Tensor,
    lengths_B: Tensor,
    k: int,
    page_size: int,
) -> Tensor:
    """What each new token attends to: [B, k] int32 positions of its request; each rank picks for some of the requests."""
    num_requests = query_BJI.shape[0]
    num_each = -(-num_requests // shard.size)
    # A rank without a request of its own does another's again, which is left out below: all do the same amount of work.
    own = (torch.arange(num_each, device=query_BJI.device) * shard.size + shard.rank).clamp_max(num_requests - 1)
    lengths = lengths_B[own]
    scores_BL = scores_in_pages(query_BJI[own], gates_BJ[own], key_SI, page_table_BP[own], lengths, page_size)
    picked_BK = top_k_positions(scores_BL, k, lengths)
    return shard.gather(picked_BK).transpose(0, 1).flatten(0, 1)[:num_requests]


def pick_by_page(
    shard: Shard,
    query_BJI: Tensor,
    gates_BJ: Tensor,
    key_SI: Tensor,
    page_table_BP: Tensor,
    lengths_B: Tensor,
    k: int,
    page_size: int,
) -> Tensor:
    """As `pick_by_request`; each rank scores every size-th page of all requests.

    A position among the k best of all is among the k best of its rank, so that the ranks' best are enough to merge.
    """
    own = torch.arange(shard.rank, page_table_BP.shape[1] + shard.rank, shard.size, device=key_SI.device)
    # As many pages on every rank; where there is no such page no length reaches it.
    pages_BP = page_table_BP[:, own.clamp_max(page_table_BP.shape[1] - 1)].contiguous()
    lengths = (lengths_B[:, None] - own * page_size).clamp(0, page_size).sum(dim=1).int()
    scores_BL = scores_in_pages(query_BJI, gates_BJ, key_SI, pages_BP, lengths, page_size)
    columns_BK = top_k_positions(scores_BL, k, lengths).long()
    best_BK = scores_BL.gather(1, columns_BK.clamp(0, scores_BL.shape[1] - 1))
    positions_BK = own[columns_BK.clamp_min(0) // page_size] * page_size + columns_BK % page_size
    numbers_BK = rank_candidates(best_BK, torch.where(columns_BK < 0, -1, positions_BK))
    return merge_candidates(shard.gather(numbers_BK).transpose(0, 1).flatten(1), k)
