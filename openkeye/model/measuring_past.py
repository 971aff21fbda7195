"""A past that measures: what the indexer selects beside what attention itself looks at, and attention over either selection.

Letters: T tokens, S keys, N tokens of branches, H query heads, G KV heads, D head width, K picked tokens, C choices of top-k.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openkeye.kernels.dispatch import dense_attention, index_scores, indexer_select, sparse_attention, top_k_positions, widen
from openkeye.model.past import IndexerOutput

MODES = ("dense", "sparse", "oracle")
SLAB_BYTES = 128 << 20
# of the pairs of one head that stand in memory at a time


@dataclass
class MeasuringPast:
    """Documents of one length, one behind the other, none of which sees another; nothing before them.

    "sparse" attends to the indexer's top-k, "oracle" to the top-k of attention's own probabilities summed over heads: what no
    selection of that size could better by much. With `measured` (of "dense" alone) it says for each of these k how the
    indexer's selection compares. Behind a single document may stand branches: continuations that see it and themselves.
    """

    length: int
    # tokens of a document
    attention: str = "dense"
    # of MODES
    top_k: int = 0
    measured: tuple[int, ...] = ()
    branches_N: Tensor | None = None
    # number of the branch of each token behind the document
    results: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    # layer -> for each document [C, 3]: recall, mass selected, largest mass that k keys could hold (all means over queries)

    def __post_init__(self) -> None:
        assert self.attention in MODES and (self.attention == "dense" or self.top_k > 0)
        assert not self.measured or self.attention == "dense"

    @property
    def needs_index(self) -> bool:
        return self.attention == "sparse" or bool(self.measured)

    def attend(
        self, layer_index: int, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, index: IndexerOutput | None
    ) -> Tensor:
        """See `Past.attend`."""
        num_branch_tokens = 0 if self.branches_N is None else self.branches_N.shape[0]
        end = query_THD.shape[0] - num_branch_tokens
        assert end % self.length == 0 and (not num_branch_tokens or end == self.length)
        outputs = []
        for start in range(0, end, self.length):
            rows = slice(start, start + self.length)
            part = None if index is None else IndexerOutput(index.query_TJI[rows], index.gates_TJ[rows], index.key_TI[rows])
            outputs.append(self._attend_document(query_THD[rows], key_TGD[rows], value_TGD[rows], part))
            if self.measured:
                assert part is not None
                self.results[layer_index].append(self._measure(query_THD[rows], key_TGD[rows], part))
        if num_branch_tokens:
            outputs.append(self._attend_branches(query_THD[end:], key_TGD, value_TGD, index))
        return torch.cat(outputs)

    def _attend_document(self, query_THD: Tensor, key_SGD: Tensor, value_SGD: Tensor, index: IndexerOutput | None) -> Tensor:
        positions, scale = torch.arange(self.length, device=query_THD.device), query_THD.shape[2] ** -0.5
        if self.attention == "dense":
            return dense_attention(query_THD, key_SGD, value_SGD, positions, scale)
        if self.attention == "sparse":
            assert index is not None
            picked = indexer_select(index.query_TJI, index.gates_TJ, index.key_TI, self.top_k, positions)
        else:
            slabs = _slabs(self.length, self.length)
            scores = (
                (rows, _probabilities(query_THD[rows], key_SGD, _is_past(rows, self.length, positions))) for rows in slabs
            )
            picked = torch.cat([top_k_positions(p, self.top_k, positions[rows] + 1) for rows, p in scores])
        return sparse_attention(query_THD, key_SGD, value_SGD, picked, scale)

    def _measure(self, query_THD: Tensor, key_SGD: Tensor, index: IndexerOutput) -> Tensor:
        """[C, 3] means over the queries that see more keys than k; zeros where no query does."""
        columns = torch.arange(self.length, device=query_THD.device)
        most = min(max(self.measured), self.length)
        sums = torch.zeros(len(self.measured), 3, device=query_THD.device)
        for rows in _slabs(self.length, self.length):
            is_past = _is_past(rows, self.length, columns)
            share = _probabilities(query_THD[rows], key_SGD, is_past) / query_THD.shape[1]
            scores = index_scores(index.query_TJI[rows], index.gates_TJ[rows], index.key_TI).masked_fill(~is_past, -torch.inf)
            # Stable: equal scores leave the smaller position in front, as the selection does.
            best, order = share.masked_fill(~is_past, -1.0).sort(dim=1, descending=True, stable=True)
            rank = torch.empty_like(order).scatter_(1, order, columns.expand_as(order))
            picked = scores.sort(dim=1, descending=True, stable=True).indices[:, :most]
            rank_of_picked, share_of_picked = rank.gather(1, picked), share.gather(1, picked)
            for number, k in enumerate(self.measured):
                counts = (columns[rows] >= k).to(share.dtype)
                hits = (rank_of_picked[:, :k] < k).sum(dim=1) / k
                figures = (hits, share_of_picked[:, :k].sum(dim=1), best[:, :k].clamp_min(0.0).sum(dim=1))
                sums[number] += torch.stack([(figure * counts).sum() for figure in figures])
        num_queries = torch.tensor([max(1, self.length - k) for k in self.measured], device=sums.device)
        return sums / num_queries[:, None]

    def _attend_branches(self, query_NHD: Tensor, key_SGD: Tensor, value_SGD: Tensor, index: IndexerOutput | None) -> Tensor:
        """A few tokens: all pairs of them stand in memory."""
        assert self.branches_N is not None
        branches, count = self.branches_N, query_NHD.shape[0]
        own = (branches[:, None] == branches) & torch.ones(count, count, device=branches.device).tril().bool()
        is_seen = torch.cat([torch.ones(count, self.length, dtype=torch.bool, device=own.device), own], dim=1)
        if self.attention != "dense":
            if self.attention == "sparse":
                assert index is not None
                scores = index_scores(index.query_TJI[self.length :], index.gates_TJ[self.length :], index.key_TI)
            else:
                scores = _probabilities(query_NHD, key_SGD, is_seen)
            order = scores.masked_fill(~is_seen, -torch.inf).sort(dim=1, descending=True, stable=True).indices
            is_seen &= torch.zeros_like(is_seen).scatter_(1, order[:, : self.top_k], True)
        group = query_NHD.shape[1] // key_SGD.shape[1]
        keys, values = (widen(x).repeat_interleave(group, dim=1) for x in (key_SGD, value_SGD))
        logits = torch.einsum("nhd,shd->nhs", widen(query_NHD), keys) * query_NHD.shape[2] ** -0.5
        weights = logits.masked_fill(~is_seen[:, None], -torch.inf).softmax(dim=2)
        return torch.einsum("nhs,shd->nhd", weights, values).to(query_NHD.dtype)


def _slabs(num_queries: int, num_keys: int) -> list[slice]:
    rows = max(1, SLAB_BYTES // (4 * num_keys))
    return [slice(start, min(start + rows, num_queries)) for start in range(0, num_queries, rows)]


def _is_past(rows: slice, num_keys: int, columns: Tensor) -> Tensor:
    return columns[:num_keys] <= columns[rows, None]


def _probabilities(query_THD: Tensor, key_SGD: Tensor, is_seen_TS: Tensor) -> Tensor:
    """Attention's probabilities summed over heads, [T, S] in fp32, one head after the other."""
    total = torch.zeros(is_seen_TS.shape, device=query_THD.device)
    group = query_THD.shape[1] // key_SGD.shape[1]
    for head in range(query_THD.shape[1]):
        logits = (query_THD[:, head] @ key_SGD[:, head // group].t()).float() * query_THD.shape[2] ** -0.5
        total += logits.masked_fill_(~is_seen_TS, -torch.inf).softmax(dim=1)
    return total
