"""Unions: what a tile of neighbouring queries selects together, so that every key is fetched once for all of them.

Neighbouring queries choose alike: 16 lists of 2,048 keys share about 8,192 distinct ones at 128K. A union moves four times
fewer bytes than one gather a query, and 16 queries x 8 heads fill the matrix units where 8 heads leave them mostly empty.
On Hopper GPUs `unions.cu` makes them, elsewhere Triton.

Letters: T queries, K picked keys, S keys, N tiles, U room of a tile's union.
"""

import ctypes
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from openkeye.kernels.build import check_launch, cuda_library

TILE = 16
# queries of a tile; a key's mask has one bit for each
CUDA_MAX_PICKED = 4096
SCRATCH_BYTES = 256 << 20
MARK_BLOCK = 1024
SCAN_BLOCK = 4096
SCAN_WARPS = 8


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
        scratch_bytes: bound on the marks that the Triton kernels keep in memory at a time (at least one tile's).
    """
    num_queries, num_picked = indices_TK.shape
    num_tiles = triton.cdiv(num_queries, TILE)
    room = min(TILE * num_picked, num_keys)
    keys = torch.empty(num_tiles, room, dtype=torch.int32, device=indices_TK.device)
    masks = torch.empty_like(keys)
    counts = torch.empty(num_tiles, dtype=torch.int32, device=indices_TK.device)
    unions = Unions(keys, masks, counts)
    indices = indices_TK if indices_TK.stride(1) == 1 else indices_TK.contiguous()
    library = cuda_library("unions") if indices.is_cuda and num_picked <= CUDA_MAX_PICKED else None
    if library is None:
        fill_unions(unions, indices, num_keys, scratch_bytes)
    else:
        fill_unions_in_cuda(library, unions, indices, num_keys)
    return unions


def fill_unions_in_cuda(library: ctypes.CDLL, unions: Unions, indices_TK: Tensor, num_keys: int) -> None:
    """Through unions.cu, which needs no marks in memory."""
    num_queries, num_picked = indices_TK.shape
    status = library.unions_build(
        *(ctypes.c_void_p(x.data_ptr()) for x in (indices_TK, unions.keys_NU, unions.masks_NU, unions.counts_N)),
        ctypes.c_int(num_queries),
        ctypes.c_int(num_picked),
        ctypes.c_longlong(indices_TK.stride(0)),
        ctypes.c_int(num_keys),
        ctypes.c_int(unions.keys_NU.shape[1]),
        ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
    )
    check_launch(status, "build_unions")


def fill_unions(unions: Unions, indices_TK: Tensor, num_keys: int, scratch_bytes: int) -> None:
    """In Triton: every list marks its keys in memory, two keys to a word, then every tile collects its marks."""
    num_tiles, room = unions.keys_NU.shape
    num_picked = indices_TK.shape[1]
    num_words = triton.cdiv(num_keys, 2)
    slab = min(num_tiles, max(1, scratch_bytes // (4 * num_words)))
    marks = torch.zeros(slab, num_words, dtype=torch.int32, device=indices_TK.device)
    for first in range(0, num_tiles, slab):
        size = min(slab, num_tiles - first)
        rows = indices_TK[first * TILE : (first + size) * TILE]
        _mark[(rows.shape[0], triton.cdiv(num_picked, MARK_BLOCK))](
            rows, marks, num_words, num_picked, rows.stride(0), TILE=TILE, BLOCK=MARK_BLOCK
        )
        part = slice(first, first + size)
        _collect[(size,)](
            marks,
            unions.keys_NU[part],
            unions.masks_NU[part],
            unions.counts_N[part],
            num_words,
            room,
            BLOCK=SCAN_BLOCK,
            num_warps=SCAN_WARPS,
        )


@triton.jit
def _mark(indices, marks, num_words, num_picked, row_stride, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Set the bit of every query at every key that it selected."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(indices + row.to(tl.int64) * row_stride + column, mask=column < num_picked, other=-1)
    place = (row // TILE).to(tl.int64) * num_words + (key >> 1)
    tl.atomic_or(marks + place, 1 << (row % TILE + (key & 1) * TILE), mask=key >= 0, sem="relaxed")


@triton.jit
def _collect(marks, keys, masks, counts, num_words, room, BLOCK: tl.constexpr):
    """Move the marked keys of one tile to the front, in order, and leave the marks clean for the next slab."""
    tile = tl.program_id(0).to(tl.int64)
    count = 0
    for start in range(0, num_words, BLOCK):
        word = start + tl.arange(0, BLOCK)
        place = marks + tile * num_words + word
        bits = tl.load(place, mask=word < num_words, other=0)
        even, odd = bits & 0xFFFF, (bits >> 16) & 0xFFFF
        num_marked = (even != 0).to(tl.int32) + (odd != 0).to(tl.int32)
        last = count + tl.cumsum(num_marked, 0) - 1
        to_even, to_odd = tile * room + last - (odd != 0).to(tl.int32), tile * room + last
        tl.store(keys + to_even, 2 * word, mask=even != 0)
        tl.store(masks + to_even, even, mask=even != 0)
        tl.store(keys + to_odd, 2 * word + 1, mask=odd != 0)
        tl.store(masks + to_odd, odd, mask=odd != 0)
        tl.store(place, tl.zeros([BLOCK], tl.int32), mask=bits != 0)
        count += tl.sum(num_marked, 0)
    tl.store(counts + tile, count)
