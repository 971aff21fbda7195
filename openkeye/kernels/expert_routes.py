"""Routes: the picks of a batch sorted by expert, and tiles of rows that each belong to one expert.

A stable counting sort that never asks the device for a count: the number of tiles is bounded by the shapes alone, and tiles
beyond the last used one say so. The same bits on every run.

Letters: T tokens, K picked experts, E experts, R rows (the T * K picks, sorted by expert), N tiles.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

STEP = 64
# picks that a program ranks at a time, each against every expert
SPAN = 256
# picks of one program
MAX_ALONE = 512
# picks that one program sorts by itself: three launches cost more than its few steps
MAX_UNSORTED = 32
# picks that are better not sorted at all: an expert that two of them chose is read twice


@dataclass(frozen=True)
class Routes:
    """Which row serves which pick. Row r holds pick order_R[r]; rows of an expert lie together, in the order of their picks."""

    order_R: Tensor
    # int32: t * K + k
    ends_E: Tensor
    # int32: end of the rows of each expert
    tile_experts_N: Tensor
    # int32, -1: not used
    tile_rows_N: Tensor
    # int32: the first row of the tile
    block_rows: int
    # rows of a tile; the last of an expert may have fewer
    is_each_alone: bool = False
    # every pick is a tile of its own (`route_few`); ends_E then has an entry a tile and not an expert


def route_few(expert_ids_TK: Tensor, block_rows: int) -> Routes:
    """Routes of so few picks that hardly two chose one expert: none is sorted, so that nothing is launched."""
    places, ends = _few_places(expert_ids_TK.numel(), expert_ids_TK.device)
    return Routes(places, ends, expert_ids_TK.flatten(), places, block_rows, is_each_alone=True)


@functools.cache
def _few_places(num_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    places = torch.arange(num_rows, dtype=torch.int32, device=device)
    return places, places + 1


def build_routes(expert_ids_TK: Tensor, num_experts: int, block_rows: int) -> Routes:
    """Sort the picks by expert and cut each expert's rows into tiles of block_rows.

    Args:
        expert_ids_TK: int32 or int64 below num_experts.
    """
    num_rows = expert_ids_TK.numel()
    # Every expert with rows may have one tile that is not full.
    num_tiles = (num_rows + min(num_experts, num_rows) * (block_rows - 1)) // block_rows
    device = expert_ids_TK.device
    order, ends, tile_experts, tile_rows = (
        torch.empty(size, dtype=torch.int32, device=device) for size in (num_rows, num_experts, num_tiles, num_tiles)
    )
    routes = Routes(order, ends, tile_experts, tile_rows, block_rows)
    ids = expert_ids_TK.contiguous()
    constants = {"EXPERTS": max(16, triton.next_power_of_2(num_experts)), "STEP": STEP, "num_warps": 8}
    if num_rows <= MAX_ALONE:
        _sort_alone[(1,)](
            ids, order, ends, tile_experts, tile_rows, num_rows, num_experts, num_tiles, BLOCK_ROWS=block_rows, **constants
        )
        return routes
    num_spans = triton.cdiv(num_rows, SPAN)
    counts, starts = (torch.empty(num_spans, num_experts, dtype=torch.int32, device=device) for _ in range(2))
    _count[(num_spans,)](ids, counts, num_rows, num_experts, SPAN=SPAN, **constants)
    _scan[(1,)](
        counts, starts, ends, tile_experts, tile_rows, num_spans, num_experts, num_tiles, BLOCK_ROWS=block_rows, **constants
    )
    _place[(num_spans,)](ids, starts, order, num_rows, num_experts, SPAN=SPAN, **constants)
    return routes


@triton.jit
def _is_own(ids, first, num_rows, EXPERTS: tl.constexpr, STEP: tl.constexpr):
    """[STEP, E] of 1 where the pick chose the expert."""
    pick_C = first + tl.arange(0, STEP)
    id_C = tl.load(ids + pick_C, mask=pick_C < num_rows, other=-1).to(tl.int32)
    return (id_C[:, None] == tl.arange(0, EXPERTS)[None, :]).to(tl.int32)


@triton.jit
def _put(ids, order, first, num_rows, next_E, EXPERTS: tl.constexpr, STEP: tl.constexpr):
    """Write a step's picks behind those before them; returns where the next ones go."""
    own_CE = _is_own(ids, first, num_rows, EXPERTS, STEP)
    before_CE = tl.cumsum(own_CE, 0) - own_CE
    row_C = tl.sum(own_CE * (before_CE + next_E[None, :]), 1)
    pick_C = first + tl.arange(0, STEP)
    tl.store(order + row_C, pick_C, mask=pick_C < num_rows)
    return next_E + tl.sum(own_CE, 0)


@triton.jit
def _write_tiles(
    start_E,
    count_E,
    ends,
    tile_experts,
    tile_rows,
    num_experts,
    num_tiles,
    BLOCK_ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    STEP: tl.constexpr,
):
    expert_E = tl.arange(0, EXPERTS)
    tl.store(ends + expert_E, start_E + count_E, mask=expert_E < num_experts)
    tiles_E = (count_E + BLOCK_ROWS - 1) // BLOCK_ROWS
    first_E = tl.cumsum(tiles_E, 0) - tiles_E
    num_used = tl.sum(tiles_E, 0)
    for step in range(0, num_tiles, STEP):
        tile_N = step + tl.arange(0, STEP)
        nth_NE = tile_N[:, None] - first_E[None, :]
        own_NE = (nth_NE >= 0) & (nth_NE < tiles_E[None, :])
        expert_N = tl.sum(tl.where(own_NE, expert_E[None, :], 0), 1)
        row_N = tl.sum(tl.where(own_NE, start_E[None, :] + nth_NE * BLOCK_ROWS, 0), 1)
        tl.store(tile_experts + tile_N, tl.where(tile_N < num_used, expert_N, -1), mask=tile_N < num_tiles)
        tl.store(tile_rows + tile_N, row_N, mask=tile_N < num_tiles)


@triton.jit
def _sort_alone(
    ids,
    order,
    ends,
    tile_experts,
    tile_rows,
    num_rows,
    num_experts,
    num_tiles,
    BLOCK_ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    STEP: tl.constexpr,
):
    count_E = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, num_rows, STEP):
        count_E += tl.sum(_is_own(ids, first, num_rows, EXPERTS, STEP), 0)
    start_E = tl.cumsum(count_E, 0) - count_E
    _write_tiles(start_E, count_E, ends, tile_experts, tile_rows, num_experts, num_tiles, BLOCK_ROWS, EXPERTS, STEP)
    next_E = start_E
    for first in range(0, num_rows, STEP):
        next_E = _put(ids, order, first, num_rows, next_E, EXPERTS, STEP)


@triton.jit
def _count(ids, counts, num_rows, num_experts, EXPERTS: tl.constexpr, STEP: tl.constexpr, SPAN: tl.constexpr):
    """How often each expert was picked in one span."""
    span = tl.program_id(0)
    count_E = tl.zeros([EXPERTS], tl.int32)
    for step in range(0, SPAN, STEP):
        count_E += tl.sum(_is_own(ids, span * SPAN + step, num_rows, EXPERTS, STEP), 0)
    expert_E = tl.arange(0, EXPERTS)
    tl.store(counts + span * num_experts + expert_E, count_E, mask=expert_E < num_experts)


@triton.jit
def _scan(
    counts,
    starts,
    ends,
    tile_experts,
    tile_rows,
    num_spans,
    num_experts,
    num_tiles,
    BLOCK_ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """From the spans' counts the rows at which their picks begin."""
    expert_E = tl.arange(0, EXPERTS)
    count_E = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, num_spans, STEP):
        span_C = first + tl.arange(0, STEP)
        is_count = (span_C < num_spans)[:, None] & (expert_E < num_experts)[None, :]
        place_CE = span_C[:, None] * num_experts + expert_E[None, :]
        count_E += tl.sum(tl.load(counts + place_CE, mask=is_count, other=0), 0)
    start_E = tl.cumsum(count_E, 0) - count_E
    _write_tiles(start_E, count_E, ends, tile_experts, tile_rows, num_experts, num_tiles, BLOCK_ROWS, EXPERTS, STEP)
    next_E = start_E
    for first in range(0, num_spans, STEP):
        span_C = first + tl.arange(0, STEP)
        is_count = (span_C < num_spans)[:, None] & (expert_E < num_experts)[None, :]
        place_CE = span_C[:, None] * num_experts + expert_E[None, :]
        count_CE = tl.load(counts + place_CE, mask=is_count, other=0)
        tl.store(starts + place_CE, next_E[None, :] + tl.cumsum(count_CE, 0) - count_CE, mask=is_count)
        next_E += tl.sum(count_CE, 0)


@triton.jit
def _place(ids, starts, order, num_rows, num_experts, EXPERTS: tl.constexpr, STEP: tl.constexpr, SPAN: tl.constexpr):
    span = tl.program_id(0)
    expert_E = tl.arange(0, EXPERTS)
    next_E = tl.load(starts + span * num_experts + expert_E, mask=expert_E < num_experts, other=0)
    for step in range(0, SPAN, STEP):
        next_E = _put(ids, order, span * SPAN + step, num_rows, next_E, EXPERTS, STEP)
