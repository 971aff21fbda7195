"""`Batch`: the tokens of one model call, and `PagedPast`: the past they see in the pages.

Letters: T new tokens of all segments, S tokens of a segment's context, H query heads, G KV heads, D head width, K picked
tokens; B segments of one token, P pages of the longest.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from itertools import takewhile

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from openkeye.engine.pages import PagedCaches
from openkeye.engine.request import Request
from openkeye.kernels.dispatch import (
    can_decode_in_pages,
    decode_in_pages,
    dense_attention,
    indexer_select,
    sparse_attention,
)
from openkeye.model.past import IndexerOutput


@dataclass(frozen=True)
class Segment:
    """New tokens of one request in a batch."""

    request: Request
    start: int
    # index in the request's sequence of the first new token
    count: int
    slots_S: Tensor
    # [start + count] int64: cache slot of every token up to and with the new ones


@dataclass(frozen=True)
class Batch:
    """Segments run together, token after token; answers under way, of one token each, come first."""

    segments: list[Segment]

    @property
    def num_tokens(self) -> int:
        return sum(segment.count for segment in self.segments)

    @property
    def keeps_evidence(self) -> bool:
        return any(segment.request.evidence is not None for segment in self.segments)

    @cached_property
    def singles(self) -> list[Segment]:
        """The leading segments of one token: rows [0, B) of the batch, which attention decodes together."""
        return list(takewhile(lambda segment: segment.count == 1, self.segments))

    def page_table(self, page_size: int) -> tuple[Tensor, Tensor]:
        """[B, P] int32, the pages of every single's context in order (0 behind its last), and [B] int32, its tokens."""
        firsts = [segment.slots_S[::page_size] for segment in self.singles]
        lengths = [segment.start + segment.count for segment in self.singles]
        table = (pad_sequence(firsts, batch_first=True) // page_size).int()
        return table, torch.tensor(lengths, dtype=torch.int32, device=table.device)


class PagedPast:
    """The past of a batch: writes new keys to their pages, selects per query over its own sequence, attends."""

    def __init__(
        self,
        batch: Batch,
        caches: PagedCaches,
        attention: str,
        top_k: int,
        dense_up_to: int | None = None,
        keeps_evidence: bool = False,
    ) -> None:
        """dense_up_to: see `EngineConfig.dense_up_to`. keeps_evidence: whether requests may ask what their answers rest on."""
        self.batch = batch
        self.caches = caches
        self.attention = attention
        self.top_k = top_k
        self.dense_up_to = top_k if dense_up_to is None else dense_up_to
        self.keeps_evidence = keeps_evidence
        self.new_slots = torch.cat([segment.slots_S[segment.start :] for segment in batch.segments])

    @cached_property
    def page_table(self) -> tuple[Tensor, Tensor]:
        """`Batch.page_table`, made once for all layers."""
        return self.batch.page_table(self.caches.page_size)

    @property
    def needs_index(self) -> bool:
        # Index keys are written in dense mode too, so that a cached prefix serves either mode.
        return True

    def attend(
        self,
        layer_index: int,
        query_THD: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        index: IndexerOutput | None,
    ) -> Tensor:
        """See `Past.attend`."""
        assert index is not None
        self.caches.write(layer_index, self.new_slots, key_TGD, value_TGD, index.key_TI)
        # Answers under way keep their way, which moves no context, whatever prompts run beside them.
        first = len(self.batch.singles) if self.attention == "sparse" else 0
        outputs = [self._decode(layer_index, query_THD[:first], _rows(index, first))] if first else []
        for segment in self.batch.segments[first:]:
            rows = slice(first, first + segment.count)
            outputs.append(self._attend_segment(layer_index, segment, rows, query_THD[rows], index))
            first += segment.count
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _num_dense(self, segment: Segment) -> int:
        """How many of a segment's new tokens, from its first on, attend to every key up to their own.

        A token's position alone decides, so that a request's result does not depend on how it is cut into segments. Where a
        token sees at most top_k keys, selecting would take them all: the same result, without scores.
        """
        if self.attention == "dense":
            return segment.count
        return min(max(self.dense_up_to - segment.start, 0), segment.count)

    def _select(self, layer_index: int, segment: Segment, rows: slice, index: IndexerOutput, positions_T: Tensor) -> Tensor:
        """[t, K] positions of the segment's sequence that the new tokens in these rows of the batch attend to."""
        keys_SI = self.caches.index_keys[layer_index].index_select(0, segment.slots_S)
        return indexer_select(index.query_TJI[rows], index.gates_TJ[rows], keys_SI, self.top_k, positions_T)

    def _keep_evidence(self, layer_index: int, segment: Segment, query_HD: Tensor, picked_K: Tensor | None) -> None:
        """Of a segment's last token, where it chooses a token of the answer. picked_K: None where it sees all."""
        if not self.keeps_evidence or segment.request.evidence is None:
            return
        if segment.start + segment.count == segment.request.num_known:
            segment.request.evidence.add(query_HD, self.caches.keys[layer_index], segment.slots_S, picked_K)

    def _attend_segment(
        self, layer_index: int, segment: Segment, rows: slice, query_THD: Tensor, index: IndexerOutput
    ) -> Tensor:
        """[t, H, D]: the segment's first tokens to all keys before them, those behind `_num_dense` to selected ones."""
        keys = self.caches.keys[layer_index].index_select(0, segment.slots_S)
        values = self.caches.values[layer_index].index_select(0, segment.slots_S)
        scale, positions = query_THD.shape[-1] ** -0.5, _positions(segment)
        num_dense = self._num_dense(segment)
        outputs, picked = [], None
        if num_dense:
            # Dense attention asks that the queries be the last of the keys.
            end = segment.start + num_dense
            outputs.append(dense_attention(query_THD[:num_dense], keys[:end], values[:end], positions[:num_dense], scale))
        if num_dense < segment.count:
            rest = slice(rows.start + num_dense, rows.stop)
            indices = self._select(layer_index, segment, rest, index, positions[num_dense:])
            outputs.append(sparse_attention(query_THD[num_dense:], keys, values, indices, scale))
            picked = indices[-1]
        self._keep_evidence(layer_index, segment, query_THD[-1], picked)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _decode(self, layer_index: int, query_THD: Tensor, index: IndexerOutput) -> Tensor:
        """One token a request, [B, H, D]: from the pages, but for requests whose `dense_up_to` is more than is picked there."""
        widened = [number for number, segment in enumerate(self.batch.singles) if self._is_widened(segment)]
        if len(widened) < len(self.batch.singles):
            attended = self._decode_picked(layer_index, query_THD, index)
        else:
            attended = torch.empty_like(query_THD)
        for number in widened:
            row = slice(number, number + 1)
            attended[row] = self._attend_segment(layer_index, self.batch.singles[number], row, query_THD[row], index)
        return attended

    def _is_widened(self, segment: Segment) -> bool:
        return self.top_k <= segment.start < self.dense_up_to

    def _keep_decoded(self, layer_index: int, query_BHD: Tensor, picked_BK: Tensor | list[Tensor]) -> None:
        """The evidence of those singles whose way is `_decode_picked`."""
        for segment, query_HD, picked_K in zip(self.batch.singles, query_BHD, picked_BK, strict=True):
            if not self._is_widened(segment):
                self._keep_evidence(layer_index, segment, query_HD, picked_K)

    def _decode_picked(self, layer_index: int, query_THD: Tensor, index: IndexerOutput) -> Tensor:
        """Picked keys are read straight from the pages, the rest of the context never moves."""
        keys, values = self.caches.keys[layer_index], self.caches.values[layer_index]
        scale = query_THD.shape[-1] ** -0.5
        if can_decode_in_pages(query_THD, index.query_TJI, keys, self.top_k, self.caches.page_size):
            queries, caches = (query_THD, index.query_TJI, index.gates_TJ), (keys, values, self.caches.index_keys[layer_index])
            keep = partial(self._keep_decoded, layer_index, query_THD) if self.keeps_evidence else None
            return decode_in_pages(*queries, caches, *self.page_table, self.top_k, self.caches.page_size, scale, keep)
        outputs, picked = [], []
        for number, segment in enumerate(self.batch.singles):
            row = slice(number, number + 1)
            indices = self._select(layer_index, segment, row, index, _positions(segment))
            # The picked keys and no others: what nobody wrote may be anything, even where its weight is zero.
            slots = segment.slots_S[indices[0].clamp_min(0).long()]
            places = torch.where(indices < 0, -1, torch.arange(indices.shape[1], device=indices.device)).int()
            outputs.append(sparse_attention(query_THD[row], keys[slots], values[slots], places, scale))
            picked.append(indices[0])
        if self.keeps_evidence:
            self._keep_decoded(layer_index, query_THD, picked)
        return torch.cat(outputs)


def _rows(index: IndexerOutput, count: int) -> IndexerOutput:
    """The first rows of a batch."""
    return IndexerOutput(index.query_TJI[:count], index.gates_TJ[:count], index.key_TI[:count])


def _positions(segment: Segment) -> Tensor:
    return torch.arange(segment.start, segment.start + segment.count, device=segment.slots_S.device)
