"""`Batch`: the tokens of one model call, and `PagedPast`: the past they see in the pages.

Letters: T new tokens of all segments, S tokens of a segment's context, H query heads, D head width, K picked tokens, P pages;
B segments of one token.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from openkeye.engine.decode import DecodePast, DecodeRows
from openkeye.engine.pages import PagedCaches
from openkeye.engine.request import Request
from openkeye.kernels.dispatch import dense_attention, indexer_select, read_keys_and_values, sparse_attention_in_pages
from openkeye.kernels.layer_caches import LayerCaches
from openkeye.model.past import CachedIndex, CachedPast
from openkeye.model.sharding import ALONE, Shard


@dataclass(frozen=True)
class Segment:
    """New tokens of one request in a batch."""

    request: Request
    start: int
    # index in the request's sequence of the first new token
    count: int
    slots_S: Tensor
    # [start + count] int64: cache slot of every token up to and with the new ones

    @property
    def end(self) -> int:
        """Tokens of the sequence with the new ones."""
        return self.start + self.count

    def pages(self, page_size: int) -> Tensor:
        """[P] int32: the pages of the sequence so far, in order."""
        return (self.slots_S[::page_size] // page_size).int()


@dataclass(frozen=True)
class Batch:
    """Segments run together, token after token; answers under way, of one token each, come first."""

    segments: list[Segment]
    num_padded: int = 0
    # tokens that belong to nobody behind the last segment's
    is_prompt: bool = False
    # a part of one prompt, however short, that no answer runs beside

    @property
    def num_tokens(self) -> int:
        return sum(segment.count for segment in self.segments)

    @property
    def keeps_evidence(self) -> bool:
        return any(segment.request.evidence is not None for segment in self.segments)

    @cached_property
    def singles(self) -> list[Segment]:
        """The leading segments of one token: rows [0, B) of the batch, which attention decodes together."""
        return [] if self.is_prompt else list(takewhile(lambda segment: segment.count == 1, self.segments))

    def rows(self, page_size: int) -> DecodeRows:
        """The singles, as decoding takes them."""
        table = pad_sequence([segment.pages(page_size) for segment in self.singles], batch_first=True)
        lengths = torch.tensor([segment.end for segment in self.singles], dtype=torch.int32, device=table.device)
        slots = torch.cat([segment.slots_S[-1:] for segment in self.singles])
        if len(self.singles) < len(self.segments):
            return DecodeRows(slots, table, lengths)
        more = (0, self.num_padded)
        return DecodeRows(pad(slots, more, value=-1), pad(table, (0, 0, *more)), pad(lengths, more))


class PagedPast(CachedPast):
    """The past of a batch: selects per query over its own sequence and attends, both in the pages."""

    shard: Shard = ALONE
    # whose heads the caches hold

    def __init__(
        self,
        batch: Batch,
        caches: PagedCaches,
        attention: str,
        top_k: int,
        dense_up_to: int | None = None,
        keeps_evidence: bool = False,
        keeps_picks: bool = False,
    ) -> None:
        """dense_up_to: see `EngineConfig.dense_up_to`. keeps_evidence: whether requests may ask what their answers rest on.

        keeps_picks: whether the selected keys of tokens that choose the next one go to their requests' records.
        """
        self.batch = batch
        self.paged = caches
        self.attention = attention
        self.top_k = top_k
        self.dense_up_to = top_k if dense_up_to is None else dense_up_to
        self.keeps_evidence, self.keeps_picks = keeps_evidence, keeps_picks
        slots = torch.cat([segment.slots_S[segment.start :] for segment in batch.segments])
        self._new_slots = pad(slots, (0, batch.num_padded), value=-1)
        self._pages = [segment.pages(caches.page_size) for segment in batch.segments[len(batch.singles) :]]

    @property
    def needs_index(self) -> bool:
        return self.attention == "sparse"

    @property
    def new_slots_T(self) -> Tensor:
        return self._new_slots

    def caches(self, layer_index: int) -> LayerCaches:
        """See `CachedPast.caches`."""
        return self.paged.layer(layer_index)

    @cached_property
    def _decoding(self) -> DecodePast:
        """The singles' past, whose page table is made once for all layers."""
        on_picked = self._keep_decoded if self.keeps_evidence or self.keeps_picks else None
        return DecodePast(self.batch.rows(self.paged.page_size), self.paged, self.attention, self.top_k, on_picked=on_picked)

    def attend(self, layer_index: int, query_THD: Tensor, index: CachedIndex | None) -> Tensor:
        """See `CachedPast.attend`."""
        # Answers under way keep their way, which moves no context, whatever prompts run beside them.
        first = len(self.batch.singles)
        if first == len(self.batch.segments):
            return self._decode(layer_index, query_THD, index)
        outputs = [self._decode(layer_index, query_THD[:first], _rows(index, slice(0, first)))] if first else []
        for segment, pages in zip(self.batch.segments[first:], self._pages, strict=True):
            rows = slice(first, first + segment.count)
            outputs.append(self._attend_segment(layer_index, segment, pages, query_THD[rows], _rows(index, rows)))
            first += segment.count
        if self.batch.num_padded:
            outputs.append(torch.zeros_like(query_THD[first:]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _num_dense(self, segment: Segment) -> int:
        """How many of a segment's new tokens, from its first on, attend to every key up to their own.

        A token's position alone decides, so that a request's result does not depend on how it is cut into segments. Where a
        token sees at most top_k keys, selecting would take them all: the same result, without scores.
        """
        if self.attention == "dense":
            return segment.count
        return min(max(self.dense_up_to - segment.start, 0), segment.count)

    def _keep(self, layer_index: int, segment: Segment, query_HD: Tensor, picked_K: Tensor | None) -> None:
        """Of a segment's last token, where it chooses a token of the answer. picked_K: None where it sees all."""
        if not (self.keeps_evidence or self.keeps_picks) or segment.end != segment.request.num_known:
            return
        if self.keeps_picks and segment.request.record is not None and picked_K is not None and segment.end > self.top_k:
            segment.request.record.add_pick(segment.end - 1, layer_index, picked_K)
        if self.keeps_evidence and segment.request.evidence is not None:
            caches = self.caches(layer_index)
            segment.request.evidence.add(query_HD, caches.key_SGD, segment.slots_S, picked_K, caches.key_scales_SG, self.shard)

    def _keep_decoded(self, layer_index: int, query_BHD: Tensor, picked_BK: Tensor | None) -> None:
        """What is kept of those singles that are not widened. picked_BK: None where they see all."""
        for number, segment in enumerate(self.batch.singles):
            if not self._is_widened(segment):
                picked_K = None if picked_BK is None else picked_BK[number]
                self._keep(layer_index, segment, query_BHD[number], picked_K)

    def _is_widened(self, segment: Segment) -> bool:
        return self.attention == "sparse" and self.top_k <= segment.start < self.dense_up_to

    def _attend_segment(
        self, layer_index: int, segment: Segment, pages_P: Tensor, query_THD: Tensor, index: CachedIndex | None
    ) -> Tensor:
        """[t, H, D]: the segment's first tokens to all keys before them, those behind `_num_dense` to selected ones."""
        caches, scale = self.caches(layer_index), query_THD.shape[-1] ** -0.5
        positions = torch.arange(segment.start, segment.end, device=pages_P.device)
        num_dense = self._num_dense(segment)
        outputs, picked = [], None
        if num_dense:
            # Dense attention asks that the queries be the last of the keys.
            keys, values = read_keys_and_values(caches, pages_P, segment.start + num_dense, query_THD.dtype)
            outputs.append(dense_attention(query_THD[:num_dense], keys, values, positions[:num_dense], scale))
        if num_dense < segment.count:
            assert index is not None
            rest = CachedIndex(index.query_TJI[num_dense:], index.gates_TJ[num_dense:])
            indices = self._select(caches, rest, positions[num_dense:], pages_P)
            outputs.append(sparse_attention_in_pages(query_THD[num_dense:], caches, indices, pages_P, segment.end, scale))
            picked = indices[-1]
        self._keep(layer_index, segment, query_THD[-1], picked)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _select(self, caches: LayerCaches, index: CachedIndex, positions_T: Tensor, pages_P: Tensor) -> Tensor:
        """[T, K] positions of one sequence that its new tokens attend to."""
        assert caches.index_key_SI is not None
        return indexer_select(
            index.query_TJI,
            index.gates_TJ,
            caches.index_key_SI,
            self.top_k,
            positions_T,
            key_scales_S=caches.index_scales_S,
            page_table_P=pages_P,
            page_size=caches.page_size,
        )

    def _decode(self, layer_index: int, query_THD: Tensor, index: CachedIndex | None) -> Tensor:
        """One token a request, [B, H, D]; those whose `dense_up_to` is more than is picked there attend to all they see."""
        singles = self.batch.singles
        widened = [number for number, segment in enumerate(singles) if self._is_widened(segment)]
        if len(widened) < len(singles):
            attended = self._decoding.attend(layer_index, query_THD, index)
        else:
            attended = torch.empty_like(query_THD)
        for number in widened:
            row = slice(number, number + 1)
            pages = singles[number].pages(self.paged.page_size)
            attended[row] = self._attend_segment(layer_index, singles[number], pages, query_THD[row], _rows(index, row))
        return attended


def _rows(index: CachedIndex | None, rows: slice) -> CachedIndex | None:
    """These tokens of a batch."""
    return None if index is None else CachedIndex(index.query_TJI[rows], index.gates_TJ[rows])
