"""`sparse_attention` for prefill on any CUDA GPU, in Triton: one program serves 16 neighbouring queries of one KV head.

Twin: `reference.sparse_attention`. Letters: T queries, S keys, H query heads, G KV heads, D head width, K picked keys,
M rows of a program (16 queries x up to 8 heads of a group), N keys of a step.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from openkeye.kernels.unions import TILE, Unions, build_unions

WIDTHS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEADS = 8
# of a group in one program: with 16 queries they fill the matrix unit's 128 rows


def check_supported(query_THD: Tensor, key_SGD: Tensor, value_SGD: Tensor) -> None:
    """Raises ValueError with one sentence where these tensors are not served."""
    heads, groups, width = query_THD.shape[1], key_SGD.shape[1], query_THD.shape[2]
    if heads % groups:
        raise ValueError(f"sparse_attention serves the same number of query heads for each KV head, got {heads} and {groups}")
    if width not in WIDTHS or key_SGD.shape != value_SGD.shape or key_SGD.shape[2] != width:
        raise ValueError(
            f"sparse_attention serves heads of {' or '.join(map(str, WIDTHS))} for queries, keys and values alike, got "
            f"{tuple(query_THD.shape)}, {tuple(key_SGD.shape)} and {tuple(value_SGD.shape)}"
        )
    if query_THD.dtype not in DTYPES or not query_THD.dtype == key_SGD.dtype == value_SGD.dtype:
        raise ValueError(
            f"sparse_attention serves bfloat16, float16 and float32, all three alike, got {query_THD.dtype}, {key_SGD.dtype} "
            f"and {value_SGD.dtype}"
        )


def sparse_attention_with_lse(
    query_THD: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    indices_TK: Tensor,
    scale: float,
    unions: Unions | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q . k * scale) v over the keys named by each row of indices_TK, and the logarithm of the softmax's sum.

    Args:
        indices_TK: int32 positions into S, -1 for none; a row of -1 gives zeros and -inf.
        unions: `build_unions(indices_TK, S)` where it is at hand already.

    Returns:
        output [T, H, D] in the queries' dtype, lse [T, H] float32 (natural logarithm).
    """
    check_supported(query_THD, key_SGD, value_SGD)
    num_queries, num_heads, width = query_THD.shape
    num_keys, num_groups, _ = key_SGD.shape
    unions = unions or build_unions(indices_TK, num_keys)
    output = torch.empty_like(query_THD, memory_format=torch.contiguous_format)
    lse = torch.empty(num_queries, num_heads, dtype=torch.float32, device=query_THD.device)
    # The tile is the fast index: the programs of one KV head run together and find its keys in the cache.
    group = num_heads // num_groups
    block_heads = min(MAX_HEADS, triton.next_power_of_2(group))
    num_blocks = triton.cdiv(group, block_heads)
    grid = (unions.counts_N.shape[0], num_groups * num_blocks)
    _attend[grid](
        query_THD.contiguous(),
        key_SGD,
        value_SGD,
        unions.keys_NU,
        unions.masks_NU,
        unions.counts_N,
        output,
        lse,
        num_queries,
        unions.keys_NU.shape[1],
        key_SGD.stride(0),
        key_SGD.stride(1),
        value_SGD.stride(0),
        value_SGD.stride(1),
        scale * math.log2(math.e),
        TILE=TILE,
        HEADS=num_heads,
        GROUP=group,
        BLOCK_HEADS=block_heads,
        WIDTH=width,
        BLOCK=64,
        PRECISION="ieee" if query_THD.dtype == torch.float32 else "tf32",
        num_warps=8 if block_heads == MAX_HEADS else 4,
        num_stages=3,
    )
    return output, lse


def sparse_attention(
    query_THD: Tensor, key_SGD: Tensor, value_SGD: Tensor, indices_TK: Tensor, scale: float, unions: Unions | None = None
) -> Tensor:
    """See `reference.sparse_attention`."""
    return sparse_attention_with_lse(query_THD, key_SGD, value_SGD, indices_TK, scale, unions)[0]


@triton.jit
def _attend(
    query,
    key,
    value,
    union_keys,
    union_masks,
    union_counts,
    output,
    lse,
    num_queries,
    room,
    key_row,
    key_group,
    value_row,
    value_group,
    scale_log2,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, block = tl.program_id(0), tl.program_id(1)
    num_blocks: tl.constexpr = (GROUP + BLOCK_HEADS - 1) // BLOCK_HEADS
    group = block // num_blocks
    row = tl.arange(0, TILE * BLOCK_HEADS)
    in_tile = row // BLOCK_HEADS
    in_group = block % num_blocks * BLOCK_HEADS + row % BLOCK_HEADS
    token = (tile * TILE + in_tile).to(tl.int64)
    head = group * GROUP + in_group
    dim = tl.arange(0, WIDTH)
    is_query = (token < num_queries) & (in_group < GROUP)
    place_MD = (token * HEADS + head)[:, None] * WIDTH + dim[None, :]
    q_MD = tl.load(query + place_MD, mask=is_query[:, None], other=0.0)
    top_M = tl.full([TILE * BLOCK_HEADS], float("-inf"), tl.float32)
    sum_M = tl.zeros([TILE * BLOCK_HEADS], tl.float32)
    acc_MD = tl.zeros([TILE * BLOCK_HEADS, WIDTH], tl.float32)
    count = tl.load(union_counts + tile)
    first = tile.to(tl.int64) * room
    for start in range(0, count, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_key = column < count
        key_N = tl.load(union_keys + first + column, mask=is_key, other=0).to(tl.int64)
        bits_N = tl.load(union_masks + first + column, mask=is_key, other=0)
        k_ND = tl.load(key + group * key_group + key_N[:, None] * key_row + dim[None, :], mask=is_key[:, None], other=0.0)
        s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION) * scale_log2
        is_chosen = ((bits_N[None, :] >> in_tile[:, None]) & 1) != 0
        s_MN = tl.where(is_chosen, s_MN, float("-inf"))
        new_top_M = tl.maximum(top_M, tl.max(s_MN, 1))
        # A row that has met none of its keys yet keeps an infinite top; zero stands in, so that no infinity is subtracted.
        safe_M = tl.where(new_top_M == float("-inf"), 0.0, new_top_M)
        p_MN = tl.exp2(s_MN - safe_M[:, None])
        shrink_M = tl.exp2(top_M - safe_M)
        sum_M = sum_M * shrink_M + tl.sum(p_MN, 1)
        v_ND = tl.load(value + group * value_group + key_N[:, None] * value_row + dim[None, :], mask=is_key[:, None], other=0.0)
        acc_MD = acc_MD * shrink_M[:, None] + tl.dot(p_MN.to(v_ND.dtype), v_ND, input_precision=PRECISION)
        top_M = new_top_M
    has_keys = sum_M > 0
    safe_sum_M = tl.where(has_keys, sum_M, 1.0)
    out_MD = acc_MD / safe_sum_M[:, None]
    tl.store(output + place_MD, out_MD.to(output.dtype.element_ty), mask=is_query[:, None])
    lse_M = tl.where(has_keys, (top_M + tl.log2(safe_sum_M)) * 0.6931471805599453, float("-inf"))
    tl.store(lse + token * HEADS + head, lse_M, mask=is_query)
