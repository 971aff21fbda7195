"""Unions: what a tile of neighbouring queries selects together, so that every key is fetched once for all of them.

Neighbouring queries choose alike: 16 lists of 2,048 keys share about 8,192 distinct ones at 128K. A union moves four times
fewer bytes than one gather a query, and 16 queries x 8 heads fill the matrix units where 8 heads leave them mostly empty.

Letters: T queries, K picked keys, S keys, N tiles, U room of a tile's union.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 16
# queries of a tile; a key's mask has one bit for each
SCRATCH_BYTES = 256 << 20
MARK_BLOCK = 1024
SCAN_BLOCK = 4096


@dataclass(frozen=True)
class Unions:
    """The distinct keys of every tile of 16 queries, ascending, each with the queries that selected it."""

    keys_NU: Tensor
    # int32; the first counts_N of each row are filled, the rest is not written
    masks_NU: Tensor
    # int32: bit i is set where query 16 n + i selected the key
    counts_N: Tensor
    # int32


def build_unions(indices_TK: Tensor, num_keys: int, scratch_bytes: int = SCRATCH_BYTES) -> Unions:
    """Unions of the lists of every 16 neighbouring queries; the same bits on every run.

    Args:
        indices_TK: int32 positions below num_keys, -1 for none, in any order.
        num_keys: S.
        scratch_bytes: bound on the marks that stand in memory at a time (at least one tile's).
    """
    num_queries, num_picked = indices_TK.shape
    num_tiles = triton.cdiv(num_queries, TILE)
    room = min(TILE * num_picked, num_keys)
    device = indices_TK.device
    keys = torch.empty(num_tiles, room, dtype=torch.int32, device=device)
    masks = torch.empty_like(keys)
    counts = torch.empty(num_tiles, dtype=torch.int32, device=device)
    slab = min(num_tiles, max(1, scratch_bytes // (4 * num_keys)))
    marks = torch.zeros(slab, num_keys, dtype=torch.int32, device=device)
    for first in range(0, num_tiles, slab):
        size = min(slab, num_tiles - first)
        rows = indices_TK[first * TILE : (first + size) * TILE]
        _mark[(rows.shape[0], triton.cdiv(num_picked, MARK_BLOCK))](
            rows, marks, num_keys, num_picked, rows.stride(0), TILE=TILE, BLOCK=MARK_BLOCK
        )
        part = slice(first, first + size)
        _collect[(size,)](marks, keys[part], masks[part], counts[part], num_keys, room, BLOCK=SCAN_BLOCK)
    return Unions(keys, masks, counts)


@triton.jit
def _mark(indices, marks, num_keys, num_picked, row_stride, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Set the bit of every query at every key that it selected."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(indices + row.to(tl.int64) * row_stride + column, mask=column < num_picked, other=-1)
    place = (row // TILE).to(tl.int64) * num_keys + key
    tl.atomic_or(marks + place, 1 << (row % TILE), mask=key >= 0, sem="relaxed")


@triton.jit
def _collect(marks, keys, masks, counts, num_keys, room, BLOCK: tl.constexpr):
    """Move the marked keys of one tile to the front, in order, and leave the marks clean for the next slab."""
    tile = tl.program_id(0).to(tl.int64)
    count = 0
    for start in range(0, num_keys, BLOCK):
        key = start + tl.arange(0, BLOCK)
        place = marks + tile * num_keys + key
        bits = tl.load(place, mask=key < num_keys, other=0)
        is_marked = bits != 0
        rank = count + tl.cumsum(is_marked.to(tl.int32), 0) - 1
        tl.store(keys + tile * room + rank, key, mask=is_marked)
        tl.store(masks + tile * room + rank, bits, mask=is_marked)
        tl.store(place, tl.zeros([BLOCK], tl.int32), mask=is_marked)
        count += tl.sum(is_marked.to(tl.int32), 0)
    tl.store(counts + tile, count)
