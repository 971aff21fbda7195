"""`top_k_positions` on CUDA GPUs: exact, ties to the smaller position, the same bits on every run.

Twin: `reference.top_k_positions`. On Hopper `top_k.cu` serves, with one block a row, or with a cluster of blocks a row where
there are few rows. Everywhere else a Triton kernel does, which reads a row once as a rule: a sample of the row gives a
threshold, what reaches it is kept beside, and among that a radix select finds the k-th largest to the bit, eight bits at a
time. Where the sample promised too much or too little the same selection goes over the row itself.
Letters: T rows, S columns, K picked.
"""

import ctypes

import torch
import triton
import triton.language as tl
from torch import Tensor

from openkeye.kernels.build import check_launch, cuda_library

MAX_K = 4096
BLOCK = 2048
# Candidates that the Triton kernel keeps of a row, and rows that it works on at a time on each multiprocessor.
CAPACITY = 8192
ROWS_PER_SM = 3
# Up to how many rows several blocks work on one, and how many blocks do (measured on an H100, scores not in the L2).
MAX_CLUSTER_ROWS = 32
CLUSTER_SIZE = 8
# The fewest rows leave room for clusters of twice the size.
FEWEST_ROWS = 4


def top_k_positions(scores_TS: Tensor, k: int, num_valid_T: Tensor, out_TK: Tensor | None = None) -> Tensor:
    """See `reference.top_k_positions`; columns past a row's num_valid are never read.

    How long the rows are stays on the device: a captured CUDA graph serves other num_valid too.

    Args:
        scores_TS: float32, rows of any stride.
        num_valid_T: int32 or int64; 0 gives a row of -1, more than S counts as S.
        out_TK: int32 rows without gaps that the result is written to, at any stride; None: a new tensor.

    Raises:
        ValueError: k is not in 1..4096, or a tensor is of another type.
    """
    library = cuda_library("top_k") if scores_TS.is_cuda else None
    if library is None:
        return top_k_triton(scores_TS, k, num_valid_T, out_TK)
    num_rows, num_columns = scores_TS.shape
    if num_rows <= MAX_CLUSTER_ROWS and num_columns <= library.openkeye_top_k_cluster_columns(CLUSTER_SIZE):
        cluster_size = 2 * CLUSTER_SIZE if num_rows <= FEWEST_ROWS else CLUSTER_SIZE
        return top_k_clusters(scores_TS, k, num_valid_T, out_TK, cluster_size)
    return top_k_rows(scores_TS, k, num_valid_T, out_TK)


def top_k_rows(scores_TS: Tensor, k: int, num_valid_T: Tensor, out_TK: Tensor | None = None) -> Tensor:
    """`top_k_positions` by CUDA C++ with one block a row."""
    return _launch("openkeye_top_k_rows", scores_TS, k, num_valid_T, out_TK)


def top_k_clusters(
    scores_TS: Tensor, k: int, num_valid_T: Tensor, out_TK: Tensor | None = None, cluster_size: int = CLUSTER_SIZE
) -> Tensor:
    """`top_k_positions` by CUDA C++ with a cluster of 1 to 16 blocks a row, whose shared memory must hold the row."""
    return _launch("openkeye_top_k_clusters", scores_TS, k, num_valid_T, out_TK, cluster_size)


def top_k_triton(scores_TS: Tensor, k: int, num_valid_T: Tensor, out_TK: Tensor | None = None) -> Tensor:
    """`top_k_positions` in Triton, on any CUDA GPU."""
    out_TK = _prepare(scores_TS, k, num_valid_T, out_TK)
    num_rows = scores_TS.shape[0]
    if num_rows:
        device = scores_TS.device
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count if scores_TS.is_cuda else 1
        num_programs = min(num_rows, ROWS_PER_SM * num_sms)
        kept = torch.empty(num_programs, 2, CAPACITY, dtype=torch.int32, device=device)
        _select[(num_programs,)](
            scores_TS,
            num_valid_T.contiguous(),
            out_TK,
            kept,
            num_rows,
            scores_TS.shape[1],
            scores_TS.stride(0),
            out_TK.stride(0),
            k,
            BLOCK=BLOCK,
            CAPACITY=CAPACITY,
            num_warps=8,
            # Three programs stay on a multiprocessor at a time.
            maxnreg=80,
        )
    return out_TK


def _prepare(scores_TS: Tensor, k: int, num_valid_T: Tensor, out_TK: Tensor | None) -> Tensor:
    """Checks the arguments; the tensor to write to comes back."""
    if not 1 <= k <= MAX_K:
        raise ValueError(f"top_k_positions serves k from 1 to {MAX_K}, got {k}")
    if scores_TS.dtype != torch.float32 or scores_TS.stride(1) != 1:
        raise ValueError(
            f"top_k_positions serves float32 rows without gaps, got {scores_TS.dtype} of strides {scores_TS.stride()}"
        )
    num_rows = scores_TS.shape[0]
    if num_valid_T.dtype not in (torch.int32, torch.int64) or num_valid_T.shape != (num_rows,):
        raise ValueError(
            f"top_k_positions needs num_valid as {num_rows} int32 or int64, got {num_valid_T.dtype} {tuple(num_valid_T.shape)}"
        )
    if out_TK is None:
        return torch.empty(num_rows, k, dtype=torch.int32, device=scores_TS.device)
    if out_TK.dtype != torch.int32 or out_TK.shape != (num_rows, k) or out_TK.stride(1) != 1:
        raise ValueError(f"top_k_positions writes int32 of {(num_rows, k)}, got {out_TK.dtype} of {tuple(out_TK.shape)}")
    return out_TK


def _launch(launcher: str, scores_TS: Tensor, k: int, num_valid_T: Tensor, out_TK: Tensor | None, *cluster_size: int) -> Tensor:
    library = cuda_library("top_k")
    if library is None:
        raise ValueError(f"{launcher} needs a GPU of compute capability 9.0 and nvcc; top_k_triton serves everywhere")
    out_TK = _prepare(scores_TS, k, num_valid_T, out_TK)
    num_rows, num_columns = scores_TS.shape
    if num_rows:
        num_valid_T = num_valid_T.contiguous()
        status = getattr(library, launcher)(
            ctypes.c_void_p(scores_TS.data_ptr()),
            ctypes.c_void_p(num_valid_T.data_ptr()),
            ctypes.c_int(num_valid_T.dtype == torch.int64),
            ctypes.c_void_p(out_TK.data_ptr()),
            ctypes.c_int(num_rows),
            ctypes.c_int(num_columns),
            ctypes.c_int64(scores_TS.stride(0)),
            ctypes.c_int64(out_TK.stride(0)),
            ctypes.c_int(k),
            *map(ctypes.c_int, cluster_size),
            ctypes.c_void_p(torch.cuda.current_stream(scores_TS.device).cuda_stream),
        )
        check_launch(status, launcher)
    return out_TK


@triton.jit
def _ordered(score):
    """Float bits as an unsigned number that orders as the floats do; both zeros alike."""
    bits = (score + 0.0).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)


@triton.jit
def _digit(counts, rank):
    """The digit of the rank-th largest number by the counts of all digits, and its rank among those of that digit."""
    digit = tl.arange(0, 256)
    larger = tl.sum(counts, 0) - tl.cumsum(counts, 0)
    is_digit = (larger < rank) & (larger + counts >= rank)
    chosen = tl.sum(tl.where(is_digit, digit, 0), 0)
    return chosen.to(tl.uint32), rank - tl.sum(tl.where(is_digit, larger, 0), 0)


@triton.jit
def _count_digits(ordered, is_counted, step: tl.constexpr):
    """How many of the counted numbers have each digit."""
    # What is not counted goes to digit 0 and is taken off again.
    bucket = tl.where(is_counted, (ordered >> (24 - 8 * step)) & 0xFF, 0).to(tl.int32)
    num_others = tl.sum(1 - is_counted.to(tl.int32), 0)
    return tl.histogram(bucket, 256) - tl.where(tl.arange(0, 256) == 0, num_others, 0)


@triton.jit
def _sample_threshold(line, valid, k, BLOCK: tl.constexpr, CAPACITY: tl.constexpr):
    """The ordered bits of a score that somewhat more than k of the row's should reach."""
    # 16 columns out of every stretch of the row, at a place that differs from stretch to stretch.
    lane = tl.arange(0, BLOCK)
    unit = lane // 16
    stretch = valid // BLOCK
    place = unit * stretch + (unit * 40503) % stretch
    ordered = _ordered(tl.load(line + place * 16 + lane % 16))
    # As many as lie midway between k and what can be kept, but never fewer than six standard deviations above k.
    share = BLOCK / valid.to(tl.float32)
    expected = k * share
    midway = tl.sqrt(expected * CAPACITY * share)
    rank = tl.maximum(midway, expected + 6 * tl.sqrt(expected) + 4).to(tl.int32)
    prefix = tl.full([], 0, tl.uint32)
    for step in tl.static_range(4):
        is_counted = lane >= 0
        if step > 0:
            is_counted = (ordered >> (32 - 8 * step)) == prefix
        chosen, rank = _digit(_count_digits(ordered, is_counted, step), rank)
        prefix = (prefix << 8) | chosen
    return prefix


@triton.jit
def _load(line, kept, start, num_kept, num_columns, BLOCK: tl.constexpr, CAPACITY: tl.constexpr):
    """BLOCK candidates as ordered bits, with their columns: out of what was kept, or out of the row; the other count is 0."""
    place = start + tl.arange(0, BLOCK)
    is_kept, is_column = place < num_kept, place < num_columns
    score = tl.load(line + place, mask=is_column, other=0.0)
    column = tl.load(kept + place, mask=is_kept, other=0)
    bits = tl.load(kept + CAPACITY + place, mask=is_kept, other=0)
    ordered = tl.where(is_kept, bits.to(tl.uint32, bitcast=True), _ordered(score))
    return ordered, tl.where(is_kept, column, place), is_kept | is_column


@triton.jit
def _select(
    scores,
    num_valid,
    indices,
    kept,
    num_rows,
    row_columns,
    row_stride,
    out_stride,
    k,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    kept += tl.program_id(0).to(tl.int64) * (2 * CAPACITY)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        valid = tl.minimum(tl.load(num_valid + row), row_columns).to(tl.int32)
        wide_row = tl.zeros([], tl.int64) + row
        line = scores + wide_row * row_stride
        out = indices + wide_row * out_stride
        if valid <= k:
            for start in range(0, k, BLOCK):
                column = start + lane
                tl.store(out + column, tl.where(column < valid, column, -1), mask=column < k)
        else:
            threshold = tl.full([], 0, tl.uint32)
            if valid > CAPACITY:
                threshold = _sample_threshold(line, valid, k, BLOCK, CAPACITY)
            count = tl.zeros([], tl.int32)
            # The next scores are on their way while these are looked at.
            following = tl.load(line + lane, mask=lane < valid, other=0.0)
            for start in range(0, valid, BLOCK):
                column = start + lane
                ordered = _ordered(following)
                following = tl.load(line + column + BLOCK, mask=column + BLOCK < valid, other=0.0)
                is_kept = (ordered >= threshold) & (column < valid)
                place = count + tl.cumsum(is_kept.to(tl.int32), 0) - 1
                is_stored = is_kept & (place < CAPACITY)
                tl.store(kept + place, column, mask=is_stored)
                tl.store(kept + CAPACITY + place, ordered.to(tl.int32, bitcast=True), mask=is_stored)
                count += tl.sum(is_kept.to(tl.int32), 0)
            # What some threads have written others read now.
            tl.debug_barrier()
            is_usable = (count >= k) & (count <= CAPACITY)
            num_kept = tl.where(is_usable, count, 0)
            num_columns = tl.where(is_usable, 0, valid)
            # Of the scores that begin with the bits of `prefix`, the `rank`-th largest is sought.
            prefix = tl.full([], 0, tl.uint32)
            rank = tl.zeros([], tl.int32) + k
            for step in tl.static_range(4):
                counts = tl.zeros([256], tl.int32)
                for start in range(0, num_kept + num_columns, BLOCK):
                    ordered, column, is_counted = _load(line, kept, start, num_kept, num_columns, BLOCK, CAPACITY)
                    if step > 0:
                        is_counted &= (ordered >> (32 - 8 * step)) == prefix
                    counts += _count_digits(ordered, is_counted, step)
                chosen, rank = _digit(counts, rank)
                prefix = (prefix << 8) | chosen
            # Now `prefix` is the k-th largest itself, and `rank` says how many scores equal to it belong to the k.
            num_written = 0
            num_equal = 0
            for start in range(0, num_kept + num_columns, BLOCK):
                ordered, column, is_candidate = _load(line, kept, start, num_kept, num_columns, BLOCK, CAPACITY)
                is_equal = (ordered == prefix) & is_candidate
                nth = num_equal + tl.cumsum(is_equal.to(tl.int32), 0)
                is_taken = ((ordered > prefix) & is_candidate) | (is_equal & (nth <= rank))
                place = num_written + tl.cumsum(is_taken.to(tl.int32), 0) - 1
                tl.store(out + place, column, mask=is_taken)
                num_equal += tl.sum(is_equal.to(tl.int32), 0)
                num_written += tl.sum(is_taken.to(tl.int32), 0)
            # The next row's candidates take the place of these.
            tl.debug_barrier()
