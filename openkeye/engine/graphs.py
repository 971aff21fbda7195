"""Decoding captured in CUDA graphs: one launch a step instead of some thousand, for one new token of up to B requests.

A graph is captured at its first use, for a number of rows that are then padded, and in dense attention for a length too. It
reads fixed buffers that every step fills in one copy; rows keep their places while their requests run, so that a page table
is written only where it grows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openkeye.engine.decode import DecodeRows
from openkeye.engine.pages import PagedCaches
from openkeye.engine.request import Request
from openkeye.engine.route_cache import RouteCache
from openkeye.engine.sharded_past import decode_past
from openkeye.kernels.dispatch import can_attend_in_pages, can_decode_in_pages, decode_scratch
from openkeye.model.keye import KeyeModel
from openkeye.model.sharding import local_config

FEW_ROWS, ROW_STEP = 8, 4
# A row that pads reads its experts' weights too: there is a graph for every number of rows up to the first, and then for whole
# steps.
MIN_DENSE_PAGES = 64
# of dense attention's shortest graph; longer ones double
COLUMNS = 6
# of a step's numbers: the token, its three positions, its slot, the length of its sequence


@dataclass(frozen=True)
class StepRow:
    """One answer under way as a step of decoding sees it."""

    request: Request
    token: int
    position: int
    # on all three axes
    slot: int
    length: int
    # tokens of the sequence with this one


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits_BV: Tensor


class DecodeGraphs:
    """The model's decoding step for up to `max_rows` rows of up to `max_tokens` tokens."""

    def __init__(
        self,
        model: KeyeModel,
        caches: PagedCaches,
        attention: str,
        max_rows: int,
        max_tokens: int,
        is_fixed: bool = False,
        routes: RouteCache | None = None,
    ) -> None:
        """is_fixed: one graph of all rows serves every step. routes: where each step's are kept."""
        self._model = model
        self._caches = caches
        self._attention = attention
        self._routes = routes
        device = caches.keys.device
        self._max_rows, self._is_fixed = max_rows, is_fixed
        max_pages = -(-max_tokens // caches.page_size)
        self._numbers_BC = torch.zeros(max_rows, COLUMNS, dtype=torch.int64, device=device)
        self._staged_BC = torch.zeros(max_rows, COLUMNS, dtype=torch.int64, pin_memory=True)
        self._copied = torch.cuda.Event()
        self._table_BP = torch.zeros(max_rows, max_pages, dtype=torch.int32, device=device)
        self._written: list[tuple[list[int], int]] = [([], 0)] * max_rows
        # which request's list of pages a row of the table holds, and how many of them
        num_picked = model.config.indexer.top_k if attention == "sparse" else max_pages * caches.page_size
        heads = local_config(model.config, model.shard.size).num_attention_heads
        self._scratch = decode_scratch(max_rows, max_pages * caches.page_size, heads, caches.layer(0), num_picked)
        self._graphs: dict[tuple[int, int], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, rows: Sequence[StepRow]) -> Tensor:
        """Logits of the next tokens, [B, V], valid until the next call."""
        assert 0 < len(rows) <= self._max_rows
        # The last step's copy may not have begun where nobody has read what it gave.
        self._copied.synchronize()
        staged = self._staged_BC.numpy()
        for number, row in enumerate(rows):
            self._write_pages(number, row.request)
            numbers = (row.token, row.position, row.position, row.position, row.slot, row.length)
            staged[number] = numbers
        num_rows = self._max_rows if self._is_fixed else num_graph_rows(len(rows), self._max_rows)
        # Rows that pad write nowhere and attend to nothing.
        staged[len(rows) : num_rows] = (0, 0, 0, 0, -1, 0)
        self._numbers_BC[:num_rows].copy_(self._staged_BC[:num_rows], non_blocking=True)
        self._copied.record()
        captured = self._captured(num_rows, self._num_pages(max(row.length for row in rows)))
        captured.graph.replay()
        return captured.logits_BV[: len(rows)]

    def _num_pages(self, longest: int) -> int:
        """Columns of the page table that a graph reads: in dense attention they cost time, whatever the lengths."""
        most = self._table_BP.shape[1]
        if self._attention == "sparse":
            return most
        needed = max(MIN_DENSE_PAGES, -(-longest // self._caches.page_size))
        return min(most, 1 << (needed - 1).bit_length())

    def _write_pages(self, number: int, request: Request) -> None:
        pages = request.pages
        owner, count = self._written[number]
        # A request whose pages are taken away gets a new list.
        known = count if owner is pages else 0
        if known < len(pages):
            self._table_BP[number, known : len(pages)] = torch.tensor(pages[known:], dtype=torch.int32)
            self._written[number] = (pages, len(pages))

    def _captured(self, num_rows: int, num_pages: int) -> _Captured:
        key = (num_rows, num_pages)
        if key not in self._graphs:
            self._graphs[key] = self._capture(num_rows, num_pages)
        return self._graphs[key]

    def _capture(self, num_rows: int, num_pages: int) -> _Captured:
        numbers = self._numbers_BC[:num_rows]

        def step() -> Tensor:
            table = self._table_BP[:num_rows, :num_pages]
            rows = DecodeRows(numbers[:, 4].contiguous(), table, numbers[:, 5].int())
            top_k = self._model.config.indexer.top_k
            past = decode_past(self._model.shard, rows, self._caches, self._attention, top_k, self._scratch)
            embeds = self._model.embed(numbers[:, 0], None, None)
            hidden = self._model(embeds, numbers[:, 1:4].t(), past)
            if self._routes is not None:
                self._routes.write(rows.slots_B)
            return self._model.logits(hidden)

        return _Captured(*_capture(step, self._pool))


def _capture(step: Callable[[], Tensor], pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of a step that has run once, so that its kernels are compiled; graphs of one pool share their memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # NCCL's own thread may ask the device something meanwhile, which is no part of the step.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        output = step()
    return graph, output


def can_capture(model: KeyeModel, caches: PagedCaches, attention: str) -> bool:
    """Whether kernels serve a step's attention: a plain twin waits for the device, and a graph cannot hold that."""
    config, like = local_config(model.config, model.shard.size), model.model.embed_tokens.weight
    if not like.is_cuda:
        return False
    query = like.new_empty(1, config.num_attention_heads, config.head_dim)
    if attention == "dense":
        return can_attend_in_pages(query, caches.layer(0))
    index_query = like.new_empty(1, config.indexer.num_heads, config.indexer.head_dim)
    return can_decode_in_pages(query, index_query, caches.layer(0), config.indexer.top_k)


def num_graph_rows(num_rows: int, max_rows: int) -> int:
    """Rows of the smallest graph that serves these."""
    return num_rows if num_rows <= FEW_ROWS else min(-(-num_rows // ROW_STEP) * ROW_STEP, max_rows)
