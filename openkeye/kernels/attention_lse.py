"""The log-sum-exp of causal attention over packed documents, in Triton, for whoever has no forward pass that returns it.

Twin: `reference.attention_lse`. Letters as in `sparse_attention`.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from openkeye.kernels.sparse_attention import MAX_HEADS, check_supported

TILE = 16
# queries of a program: with 8 heads they fill the matrix unit's 128 rows
BLOCK = 64
# keys of a step: two programs share an SM of Hopper


def attention_lse(
    query_THD: Tensor,
    key_SGD: Tensor,
    query_positions_T: Tensor,
    scale: float,
    first_keys_T: Tensor | None = None,
    gaps: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """log of the sum of exp(q . k * scale) over the keys that each query sees, float32 [T, H]; -inf where it sees none.

    Args:
        query_positions_T: int32 or int64, the last key that a query sees.
        first_keys_T: the first one, where documents are packed; None: 0.
        gaps: starts and ends [T] of keys between them that a query does not see, equal where it sees all; None: no gaps.
    """
    check_supported(query_THD, key_SGD, key_SGD)
    num_queries, num_heads, width = query_THD.shape
    num_keys, num_groups, _ = key_SGD.shape
    group = num_heads // num_groups
    block_heads = min(MAX_HEADS, triton.next_power_of_2(group))
    lse = torch.empty(num_queries, num_heads, dtype=torch.float32, device=query_THD.device)
    _attention_lse[(triton.cdiv(num_queries, TILE), num_groups * triton.cdiv(group, block_heads))](
        query_THD.contiguous(),
        key_SGD,
        query_positions_T,
        query_positions_T if first_keys_T is None else first_keys_T,
        *(gaps or (query_positions_T, query_positions_T)),
        lse,
        num_queries,
        num_keys,
        key_SGD.stride(0),
        key_SGD.stride(1),
        scale * math.log2(math.e),
        HAS_FIRST=first_keys_T is not None,
        HAS_GAPS=gaps is not None,
        TILE=TILE,
        HEADS=num_heads,
        GROUP=group,
        BLOCK_HEADS=block_heads,
        WIDTH=width,
        BLOCK=BLOCK,
        PRECISION="ieee" if query_THD.dtype == torch.float32 else "tf32",
        num_warps=8 if block_heads == MAX_HEADS else 4,
        num_stages=3,
    )
    return lse


@triton.jit
def _attention_lse(
    query,
    key,
    positions,
    first_keys,
    gap_starts,
    gap_ends,
    lse,
    num_queries,
    num_keys,
    key_row,
    key_group,
    scale_log2,
    HAS_FIRST: tl.constexpr,
    HAS_GAPS: tl.constexpr,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The last tiles see most keys: they begin first.
    tile, program = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    programs_per_group: tl.constexpr = (GROUP + BLOCK_HEADS - 1) // BLOCK_HEADS
    group = program // programs_per_group
    row = tl.arange(0, TILE * BLOCK_HEADS)
    in_group = program % programs_per_group * BLOCK_HEADS + row % BLOCK_HEADS
    token = (tile * TILE + row // BLOCK_HEADS).to(tl.int64)
    is_query = (token < num_queries) & (in_group < GROUP)
    dim = tl.arange(0, WIDTH)
    place_M = token * HEADS + group * GROUP + in_group
    q_MD = tl.load(query + place_M[:, None] * WIDTH + dim[None, :], mask=is_query[:, None], other=0.0)
    last_M = tl.load(positions + token, mask=token < num_queries, other=-1).to(tl.int32)
    end = tl.minimum(tl.max(last_M, 0) + 1, num_keys)
    begin = 0
    first_M = tl.zeros([TILE * BLOCK_HEADS], tl.int32)
    if HAS_FIRST:
        first_M = tl.load(first_keys + token, mask=token < num_queries, other=num_keys).to(tl.int32)
        begin = tl.min(first_M, 0) // BLOCK * BLOCK
    if HAS_GAPS:
        gap_start_M = tl.load(gap_starts + token, mask=token < num_queries, other=0)
        gap_end_M = tl.load(gap_ends + token, mask=token < num_queries, other=0)
    top_M = tl.full([TILE * BLOCK_HEADS], float("-inf"), tl.float32)
    sum_M = tl.zeros([TILE * BLOCK_HEADS], tl.float32)
    key += group * key_group
    for start in range(begin, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        place_ND = column.to(tl.int64)[:, None] * key_row + dim[None, :]
        k_ND = tl.load(key + place_ND, mask=(column < num_keys)[:, None], other=0.0)
        s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION) * scale_log2
        is_visible = (column[None, :] <= last_M[:, None]) & (column[None, :] >= first_M[:, None])
        if HAS_GAPS:
            is_visible &= (column[None, :] < gap_start_M[:, None]) | (column[None, :] >= gap_end_M[:, None])
        s_MN = tl.where(is_visible, s_MN, float("-inf"))
        new_top_M = tl.maximum(top_M, tl.max(s_MN, 1))
        safe_M = tl.where(new_top_M == float("-inf"), 0.0, new_top_M)
        sum_M = sum_M * tl.exp2(top_M - safe_M) + tl.sum(tl.exp2(s_MN - safe_M[:, None]), 1)
        top_M = new_top_M
    has_keys = sum_M > 0
    lse_M = (top_M + tl.log2(tl.where(has_keys, sum_M, 1.0))) * 0.6931471805599453
    tl.store(lse + place_M, tl.where(has_keys, lse_M, float("-inf")), mask=is_query)
