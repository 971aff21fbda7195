"""Gradients of `sparse_attention` on any CUDA GPU, in Triton, and the attention probabilities that the indexer learns from.

A tile of 16 queries walks its union again: probabilities are made anew from the log-sum-exp of the forward pass, the queries'
gradient stays in registers, and the products with keys contract queries and heads at once, so that a key's gradient leaves the
chip once a tile and not once a query. Letters as in `sparse_attention`; U room of a tile's union, N tiles.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from openkeye.kernels.sparse_attention import MAX_HEADS, check_supported, sparse_attention_with_lse
from openkeye.kernels.unions import TILE, Unions, build_unions

SLAB_BYTES = 512 << 20
# of partial sums that the deterministic mode keeps at a time
BLOCK = 32
# keys of a step: both gradients of the keys stand beside the queries' in registers


def sparse_attention_backward(
    query_THD: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    unions: Unions,
    output_THD: Tensor,
    lse_TH: Tensor,
    output_gradient_THD: Tensor,
    scale: float,
    is_deterministic: bool = False,
    slab_bytes: int = SLAB_BYTES,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries [T, H, D] (their dtype), keys and values [S, G, D] (float32).

    Args:
        unions, output_THD, lse_TH: of the forward pass.
        is_deterministic: the same bits on every run. Otherwise tiles add to a key's gradient in whatever order they finish;
            with it their parts are kept (at most slab_bytes at a time, at least one tile's) and added tile after tile.
    """
    check_supported(query_THD, key_SGD, value_SGD)
    num_queries, num_heads, width = query_THD.shape
    num_keys, num_groups, _ = key_SGD.shape
    room = unions.keys_NU.shape[1]
    num_tiles = unions.counts_N.shape[0]
    group = num_heads // num_groups
    block_heads = min(MAX_HEADS, triton.next_power_of_2(group))
    num_blocks = num_groups * triton.cdiv(group, block_heads)
    query, output_gradient = query_THD.contiguous(), output_gradient_THD.contiguous()
    delta_TH = (output_gradient.float() * output_THD.float()).sum(dim=-1)
    query_gradient = torch.empty_like(query)
    key_gradient, value_gradient = (
        torch.zeros(num_keys, num_groups, width, dtype=torch.float32, device=query.device) for _ in range(2)
    )
    slab, parts = num_tiles, key_gradient.new_empty(0)
    if is_deterministic:
        slab = min(num_tiles, max(1, slab_bytes // (2 * num_blocks * room * width * 4)))
        parts = torch.empty(2, slab, num_blocks, room, width, dtype=torch.float32, device=query.device)
    for first in range(0, num_tiles, slab):
        size = min(slab, num_tiles - first)
        _attend_backward[(size, num_blocks)](
            query,
            key_SGD,
            value_SGD,
            unions.keys_NU,
            unions.masks_NU,
            unions.counts_N,
            lse_TH,
            delta_TH,
            output_gradient,
            query_gradient,
            key_gradient,
            value_gradient,
            parts,
            first,
            num_queries,
            room,
            slab,
            key_SGD.stride(0),
            key_SGD.stride(1),
            value_SGD.stride(0),
            value_SGD.stride(1),
            scale,
            TILE=TILE,
            HEADS=num_heads,
            GROUPS=num_groups,
            GROUP=group,
            BLOCK_HEADS=block_heads,
            WIDTH=width,
            BLOCK=BLOCK,
            KEEPS_PARTS=is_deterministic,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=8 if block_heads == MAX_HEADS else 4,
            num_stages=2,
        )
        if is_deterministic:
            ranks = _ranks(unions, first, size, num_keys)
            _add_parts[(num_keys, num_groups)](
                parts,
                ranks,
                key_gradient,
                value_gradient,
                num_keys,
                size,
                room,
                slab,
                GROUPS=num_groups,
                BLOCKS_PER_GROUP=num_blocks // num_groups,
                WIDTH=width,
                num_warps=1,
            )
    return query_gradient, key_gradient, value_gradient


def _ranks(unions: Unions, first: int, size: int, num_keys: int) -> Tensor:
    """[size, S] int32: where a key stands in each tile's union, -1 where it does not."""
    keys, counts = unions.keys_NU[first : first + size], unions.counts_N[first : first + size]
    place = torch.arange(keys.shape[1], dtype=torch.int32, device=keys.device).expand_as(keys)
    ranks = torch.full((size, num_keys + 1), -1, dtype=torch.int32, device=keys.device)
    # Room beyond a union's end was never written: one column more takes it.
    ranks.scatter_(1, torch.where(place < counts[:, None], keys, num_keys).long(), place)
    return ranks[:, :num_keys].contiguous()


class SparseAttention(torch.autograd.Function):
    """`sparse_attention` with gradients for queries, keys and values."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query_THD: Tensor,
        key_SGD: Tensor,
        value_SGD: Tensor,
        indices_TK: Tensor,
        scale: float,
        is_deterministic: bool,
    ) -> Tensor:
        """See `reference.sparse_attention`."""
        unions = build_unions(indices_TK, key_SGD.shape[0])
        output, lse = sparse_attention_with_lse(query_THD, key_SGD, value_SGD, indices_TK, scale, unions)
        ctx.save_for_backward(query_THD, key_SGD, value_SGD, output, lse, unions.keys_NU, unions.masks_NU, unions.counts_N)
        ctx.scale, ctx.is_deterministic = scale, is_deterministic  # type: ignore[attr-defined]
        return output

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the three tensors, none for the lists and settings."""
        query, key, value, output, lse, *unions = ctx.saved_tensors  # type: ignore[attr-defined]
        query_gradient, key_gradient, value_gradient = sparse_attention_backward(
            query,
            key,
            value,
            Unions(*unions),
            output,
            lse,
            gradients[0],
            ctx.scale,  # type: ignore[attr-defined]
            ctx.is_deterministic,  # type: ignore[attr-defined]
        )
        return query_gradient, key_gradient.to(key.dtype), value_gradient.to(value.dtype), None, None, None


def summed_probabilities(
    query_THD: Tensor, key_SGD: Tensor, unions: Unions, lse_TH: Tensor, top_k: int, scale: float
) -> Tensor:
    """Attention probability of every selected key, summed over all heads, float32 [T, K] in the order of ascending keys.

    What the indexer learns from in the sparse adaptation; rows with fewer than K keys end in zeros.
    """
    num_queries, num_heads, width = query_THD.shape
    num_groups = key_SGD.shape[1]
    group = num_heads // num_groups
    block_heads = min(MAX_HEADS, triton.next_power_of_2(group))
    sums = torch.zeros(num_queries, top_k, dtype=torch.float32, device=query_THD.device)
    _sum_probabilities[(unions.counts_N.shape[0],)](
        query_THD.contiguous(),
        key_SGD,
        unions.keys_NU,
        unions.masks_NU,
        unions.counts_N,
        lse_TH,
        sums,
        num_queries,
        unions.keys_NU.shape[1],
        top_k,
        key_SGD.stride(0),
        key_SGD.stride(1),
        scale * math.log2(math.e),
        TILE=TILE,
        HEADS=num_heads,
        GROUP=group,
        BLOCK_HEADS=block_heads,
        NUM_BLOCKS=num_groups * triton.cdiv(group, block_heads),
        WIDTH=width,
        BLOCK=64,
        PRECISION="ieee" if query_THD.dtype == torch.float32 else "tf32",
        num_warps=8 if block_heads == MAX_HEADS else 4,
        num_stages=2,
    )
    return sums


@triton.jit
def _attend_backward(
    query,
    key,
    value,
    union_keys,
    union_masks,
    union_counts,
    lse,
    delta,
    output_gradient,
    query_gradient,
    key_gradient,
    value_gradient,
    parts,
    first_tile,
    num_queries,
    room,
    slab,
    key_row,
    key_group,
    value_row,
    value_group,
    scale,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    KEEPS_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    in_slab, block = tl.program_id(0), tl.program_id(1)
    tile = first_tile + in_slab
    blocks_per_group: tl.constexpr = (GROUP + BLOCK_HEADS - 1) // BLOCK_HEADS
    group = block // blocks_per_group
    row = tl.arange(0, TILE * BLOCK_HEADS)
    in_tile = row // BLOCK_HEADS
    in_group = block % blocks_per_group * BLOCK_HEADS + row % BLOCK_HEADS
    token = (tile * TILE + in_tile).to(tl.int64)
    head = group * GROUP + in_group
    dim = tl.arange(0, WIDTH)
    is_query = (token < num_queries) & (in_group < GROUP)
    place_MD = (token * HEADS + head)[:, None] * WIDTH + dim[None, :]
    q_MD = tl.load(query + place_MD, mask=is_query[:, None], other=0.0)
    do_MD = tl.load(output_gradient + place_MD, mask=is_query[:, None], other=0.0)
    lse_M = tl.load(lse + token * HEADS + head, mask=is_query, other=float("inf"))
    # A query that selected nothing has no probabilities: an infinite sum makes them zero.
    lse_M = tl.where(lse_M == float("-inf"), float("inf"), lse_M)
    delta_M = tl.load(delta + token * HEADS + head, mask=is_query, other=0.0)
    dq_MD = tl.zeros([TILE * BLOCK_HEADS, WIDTH], tl.float32)
    count = tl.load(union_counts + tile)
    first = tile.to(tl.int64) * room
    num_blocks: tl.constexpr = GROUPS * blocks_per_group
    part = (in_slab.to(tl.int64) * num_blocks + block) * room
    for start in range(0, count, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_key = column < count
        key_N = tl.load(union_keys + first + column, mask=is_key, other=0).to(tl.int64)
        bits_N = tl.load(union_masks + first + column, mask=is_key, other=0)
        k_ND = tl.load(key + group * key_group + key_N[:, None] * key_row + dim[None, :], mask=is_key[:, None], other=0.0)
        v_ND = tl.load(value + group * value_group + key_N[:, None] * value_row + dim[None, :], mask=is_key[:, None], other=0.0)
        s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION) * scale
        is_chosen = ((bits_N[None, :] >> in_tile[:, None]) & 1) != 0
        p_MN = tl.where(is_chosen, tl.exp(s_MN - lse_M[:, None]), 0.0)
        dp_MN = tl.dot(do_MD, tl.trans(v_ND), input_precision=PRECISION)
        ds_MN = p_MN * (dp_MN - delta_M[:, None]) * scale
        dq_MD += tl.dot(ds_MN.to(k_ND.dtype), k_ND, input_precision=PRECISION)
        dk_ND = tl.dot(tl.trans(ds_MN.to(q_MD.dtype)), q_MD, input_precision=PRECISION)
        dv_ND = tl.dot(tl.trans(p_MN.to(do_MD.dtype)), do_MD, input_precision=PRECISION)
        if KEEPS_PARTS:
            place_ND = (part + column)[:, None] * WIDTH + dim[None, :]
            values = tl.cast(slab, tl.int64) * num_blocks * room * WIDTH
            tl.store(parts + place_ND, dk_ND, mask=is_key[:, None])
            tl.store(parts + values + place_ND, dv_ND, mask=is_key[:, None])
        else:
            place_ND = (key_N * GROUPS + group)[:, None] * WIDTH + dim[None, :]
            tl.atomic_add(key_gradient + place_ND, dk_ND, mask=is_key[:, None], sem="relaxed")
            tl.atomic_add(value_gradient + place_ND, dv_ND, mask=is_key[:, None], sem="relaxed")
    tl.store(query_gradient + place_MD, dq_MD.to(query_gradient.dtype.element_ty), mask=is_query[:, None])


@triton.jit
def _add_parts(
    parts,
    ranks,
    key_gradient,
    value_gradient,
    num_keys,
    num_tiles,
    room,
    slab,
    GROUPS: tl.constexpr,
    BLOCKS_PER_GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add one key's parts of all tiles of a slab, tile after tile."""
    key, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = tl.arange(0, WIDTH)
    place = (key * GROUPS + group) * WIDTH + dim
    dk = tl.load(key_gradient + place)
    dv = tl.load(value_gradient + place)
    num_blocks: tl.constexpr = GROUPS * BLOCKS_PER_GROUP
    wide_room = tl.cast(room, tl.int64)
    values = slab * num_blocks * wide_room * WIDTH
    for tile in range(num_tiles):
        rank = tl.load(ranks + tile * tl.cast(num_keys, tl.int64) + key)
        if rank >= 0:
            for number in tl.static_range(BLOCKS_PER_GROUP):
                block = (tile * num_blocks + group * BLOCKS_PER_GROUP + number) * wide_room
                dk += tl.load(parts + (block + rank) * WIDTH + dim)
                dv += tl.load(parts + values + (block + rank) * WIDTH + dim)
    tl.store(key_gradient + place, dk)
    tl.store(value_gradient + place, dv)


@triton.jit
def _sum_probabilities(
    query,
    key,
    union_keys,
    union_masks,
    union_counts,
    lse,
    sums,
    num_queries,
    room,
    top_k,
    key_row,
    key_group,
    scale_log2,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All heads of one tile in one program, so that the sums need no atomic adds and have the same bits on every run."""
    tile = tl.program_id(0)
    blocks_per_group: tl.constexpr = (GROUP + BLOCK_HEADS - 1) // BLOCK_HEADS
    row = tl.arange(0, TILE * BLOCK_HEADS)
    in_tile = row // BLOCK_HEADS
    dim = tl.arange(0, WIDTH)
    query_Q = tl.arange(0, TILE)
    token_Q = (tile * TILE + query_Q).to(tl.int64)
    count = tl.load(union_counts + tile)
    first = tile.to(tl.int64) * room
    # How many keys of its list each query has met.
    met_Q = tl.zeros([TILE], tl.int32)
    for start in range(0, count, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_key = column < count
        key_N = tl.load(union_keys + first + column, mask=is_key, other=0).to(tl.int64)
        bits_N = tl.load(union_masks + first + column, mask=is_key, other=0)
        sum_QN = tl.zeros([TILE, BLOCK], tl.float32)
        for block in range(NUM_BLOCKS):
            group = block // blocks_per_group
            in_group = block % blocks_per_group * BLOCK_HEADS + row % BLOCK_HEADS
            token = (tile * TILE + in_tile).to(tl.int64)
            head = group * GROUP + in_group
            is_query = (token < num_queries) & (in_group < GROUP)
            place_MD = (token * HEADS + head)[:, None] * WIDTH + dim[None, :]
            q_MD = tl.load(query + place_MD, mask=is_query[:, None], other=0.0)
            lse_M = tl.load(lse + token * HEADS + head, mask=is_query, other=float("inf"))
            k_ND = tl.load(key + group * key_group + key_N[:, None] * key_row + dim[None, :], mask=is_key[:, None], other=0.0)
            s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION) * scale_log2
            p_MN = tl.where(lse_M[:, None] > float("-inf"), tl.exp2(s_MN - lse_M[:, None] * 1.4426950408889634), 0.0)
            sum_QN += tl.sum(tl.reshape(p_MN, (TILE, BLOCK_HEADS, BLOCK)), 1)
        is_chosen = ((bits_N[None, :] >> query_Q[:, None]) & 1) != 0
        rank_QN = met_Q[:, None] + tl.cumsum(is_chosen.to(tl.int32), 1) - 1
        is_stored = is_chosen & (token_Q < num_queries)[:, None]
        tl.store(sums + token_Q[:, None] * top_k + rank_QN, sum_QN, mask=is_stored)
        met_Q += tl.sum(is_chosen.to(tl.int32), 1)
