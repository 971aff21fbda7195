"""One new token a request: `DecodeRows`, which they are, and `DecodePast`, attention of each over its pages.

Nothing here waits for the device and no shape depends on how long the sequences are, so that a captured graph serves them as
they grow. Letters: B requests, P pages of the longest, L positions of P pages, H query heads, D head width, K picked tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openkeye.engine.pages import PagedCaches
from openkeye.kernels.dispatch import attend_in_pages, decode_in_pages
from openkeye.kernels.layer_caches import LayerCaches
from openkeye.model.past import CachedIndex, CachedPast

if TYPE_CHECKING:
    from openkeye.kernels.sparse_decode import DecodeScratch


OnPicked = Callable[[int, Tensor, Tensor | None], None]


@dataclass(frozen=True)
class DecodeRows:
    """Answers under way, with one new token each."""

    slots_B: Tensor
    # int64, of the new tokens; -1: a row that pads
    page_table_BP: Tensor
    # int32, every sequence's pages in order; anything behind its last
    lengths_B: Tensor
    # int32, tokens of each with the new one; 0 attends to nothing and gives zeros

    def positions(self, page_size: int) -> Tensor:
        """[B, L] int32: the positions of every row's sequence, -1 behind its last."""
        column = torch.arange(self.page_table_BP.shape[1] * page_size, dtype=torch.int32, device=self.lengths_B.device)
        return torch.where(column < self.lengths_B[:, None], column, -1)


class DecodePast(CachedPast):
    """The past of rows that decode: each attends to what the indexer picks of its sequence, or to all of it."""

    def __init__(
        self,
        rows: DecodeRows,
        caches: PagedCaches,
        attention: str,
        top_k: int,
        scratch: "DecodeScratch | None" = None,
        on_picked: OnPicked | None = None,
    ) -> None:
        """scratch: see `decode_in_pages`; one serves all layers of one step at a time.

        on_picked: called in every layer with its number, the queries and the picked positions [B, K] int32, -1 for none; None
        where everything is attended to.
        """
        self.on_picked = on_picked
        self.rows = rows
        self.scratch = scratch
        self.paged = caches
        self.attention = attention
        self.top_k = top_k

    @property
    def needs_index(self) -> bool:
        return self.attention == "sparse"

    @property
    def new_slots_T(self) -> Tensor:
        return self.rows.slots_B

    def caches(self, layer_index: int) -> LayerCaches:
        """See `CachedPast.caches`."""
        return self.paged.layer(layer_index)

    @cached_property
    def _everything(self) -> Tensor:
        """The same list for all layers."""
        return self.rows.positions(self.paged.page_size)

    def attend(self, layer_index: int, query_THD: Tensor, index: CachedIndex | None) -> Tensor:
        """See `CachedPast.attend`."""
        caches, rows, scale = self.caches(layer_index), self.rows, query_THD.shape[-1] ** -0.5
        if index is None:
            if self.on_picked is not None:
                self.on_picked(layer_index, query_THD, None)
            return attend_in_pages(query_THD, caches, self._everything, rows.page_table_BP, scale, self.scratch)
        pages = (rows.page_table_BP, rows.lengths_B)
        queries = (query_THD, index.query_TJI, index.gates_TJ)
        attended, picked = decode_in_pages(*queries, caches, *pages, self.top_k, scale, self.scratch)
        if self.on_picked is not None:
            self.on_picked(layer_index, query_THD, picked)
        return attended
