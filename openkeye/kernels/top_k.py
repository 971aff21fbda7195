"""`top_k_positions` on any CUDA GPU, in Triton: exact, ties to the smaller position, the same bits on every run.

Twin: `reference.top_k_positions`. A radix select: four passes count the digits of a row's scores, from the highest eight bits
to the lowest, until the k-th largest is known to the bit; a last pass writes every larger score's position and fills up with
the leftmost equal ones, in order. Letters: T rows, S columns, K picked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_K = 4096
BLOCK = 4096


def top_k_positions(scores_TS: Tensor, k: int, num_valid_T: Tensor) -> Tensor:
    """See `reference.top_k_positions`; columns past a row's num_valid are never read.

    Args:
        scores_TS: float32, rows of any stride.
        num_valid_T: int32 or int64, at most S each; 0 gives a row of -1.

    Raises:
        ValueError: k is not in 1..4096, or the scores are not float32.
    """
    if not 1 <= k <= MAX_K:
        raise ValueError(f"top_k_positions serves k from 1 to {MAX_K}, got {k}")
    if scores_TS.dtype != torch.float32 or scores_TS.stride(1) != 1:
        raise ValueError(
            f"top_k_positions serves float32 rows without gaps, got {scores_TS.dtype} of strides {scores_TS.stride()}"
        )
    num_rows = scores_TS.shape[0]
    indices = torch.empty(num_rows, k, dtype=torch.int32, device=scores_TS.device)
    if num_rows:
        _select[(num_rows,)](scores_TS, num_valid_T, indices, scores_TS.stride(0), k, BLOCK=BLOCK, num_warps=8)
    return indices


@triton.jit
def _ordered(score):
    """Float bits as an unsigned number that orders as the floats do; both zeros alike."""
    bits = (score + 0.0).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)


@triton.jit
def _select(scores, num_valid, indices, row_stride, k, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    valid = tl.load(num_valid + row).to(tl.int32)
    line = scores + row.to(tl.int64) * row_stride
    out = indices + row.to(tl.int64) * k
    lane = tl.arange(0, BLOCK)
    if valid <= k:
        for start in range(0, k, BLOCK):
            column = start + lane
            tl.store(out + column, tl.where(column < valid, column, -1), mask=column < k)
    else:
        digit = tl.arange(0, 256)
        # Of the scores that begin with the bits of `prefix`, the `rank`-th largest is sought.
        prefix = tl.zeros([1], tl.uint32)
        rank = tl.zeros([1], tl.int32) + k
        for step in tl.static_range(4):
            counts = tl.zeros([256], tl.int32)
            for start in range(0, valid, BLOCK):
                column = start + lane
                ordered = _ordered(tl.load(line + column, mask=column < valid, other=0.0))
                is_candidate = column < valid
                if step > 0:
                    is_candidate &= (ordered >> (32 - 8 * step)) == prefix
                # What is no candidate is counted as digit 0 and taken off again.
                bucket = tl.where(is_candidate, (ordered >> (24 - 8 * step)) & 0xFF, 0).to(tl.int32)
                counts += tl.histogram(bucket, 256)
                num_others = BLOCK - tl.sum(is_candidate.to(tl.int32), 0)
                counts -= tl.where(digit == 0, num_others, 0)
            # How many candidates have a larger digit.
            larger = tl.sum(counts, 0) - tl.cumsum(counts, 0)
            is_digit = (larger < rank) & (larger + counts >= rank)
            chosen = tl.sum(tl.where(is_digit, digit, 0), 0)
            rank -= tl.sum(tl.where(is_digit, larger, 0), 0)
            prefix = (prefix << 8) | chosen.to(tl.uint32)
        # Now `prefix` is the k-th largest itself, and `rank` says how many scores equal to it belong to the k.
        num_written = 0
        num_equal = 0
        room = tl.sum(rank, 0)
        for start in range(0, valid, BLOCK):
            column = start + lane
            ordered = _ordered(tl.load(line + column, mask=column < valid, other=0.0))
            is_equal = (ordered == prefix) & (column < valid)
            nth = num_equal + tl.cumsum(is_equal.to(tl.int32), 0)
            is_taken = ((ordered > prefix) & (column < valid)) | (is_equal & (nth <= room))
            place = num_written + tl.cumsum(is_taken.to(tl.int32), 0) - 1
            tl.store(out + place, column, mask=is_taken)
            num_equal += tl.sum(is_equal.to(tl.int32), 0)
            num_written += tl.sum(is_taken.to(tl.int32), 0)
