"""Attention of one query a request over its picked keys in paged caches, in Triton, and a decoding step's selection with it.

Twin: `reference.sparse_decode`. The picked keys of a request are split over programs, and whichever program of a request ends
last merges the parts, in the order of the splits: one launch, and the same bits on every run.

Letters: B requests, S slots of the cache, H query heads, G KV heads, D head width, K picked keys, L columns of the scores,
P pages of a request, J indexer heads, I indexer width; in a program M query heads and N rows of the caches, each one KV head of
one key.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from openkeye.kernels.indexer_decode import has_fp8, indexer_decode, num_multiprocessors
from openkeye.kernels.layer_caches import LayerCaches
from openkeye.kernels.quantize import e4m3_half, power_of_two_scale
from openkeye.kernels.sparse_attention import check_supported
from openkeye.kernels.top_k import top_k_positions

MIN_ROWS = 16
# the matrix unit's least; where a group has fewer heads the others are idle


class DecodePlan(NamedTuple):
    """How a launch is cut: KV heads of a program, picked keys of a step, splits of a list, warps, steps on the way and one."""

    num_groups: int
    block: int
    num_splits: int
    num_warps: int
    num_stages: int


def decode_plan(num_requests: int, num_heads: int, key_SGD: Tensor, num_picked: int) -> DecodePlan:
    """Steps of 64 rows (of float32 32) in about three programs on each multiprocessor.

    Where there are many requests a program takes two KV heads, whose rows lie side by side, and steps of 128 rows, fewer of
    them on their way: longer reads are faster.
    """
    num_groups = key_SGD.shape[1]
    group = num_heads // num_groups
    together = 2 if num_requests >= 16 and num_groups % 2 == 0 and 2 * group <= 32 else 1
    rows = 32 if key_SGD.dtype == torch.float32 else 64 * together
    block = rows // together
    num_steps = triton.cdiv(num_picked, block)
    num_others = num_requests * (num_groups // together) * triton.cdiv(group, MIN_ROWS if together == 1 else group)
    target = max(1, min(num_steps, 3 * num_multiprocessors(key_SGD.device) // num_others))
    # A power of two shares the steps of a full list evenly.
    return DecodePlan(together, block, 1 << (target.bit_length() - 1), 4, 2 if rows > 64 else 3)


@dataclass(frozen=True)
class DecodeScratch:
    """Buffers that decoding writes into, for captured graphs and steps that allocate nothing.

    One scratch serves one stream at a time: two launches at once would count each other's programs.
    """

    scores_BL: Tensor  # float32 [requests, max_len]: the indexer's scores
    picked_BK: Tensor  # int32 [requests, top_k]: the positions attended to
    parts: Tensor  # float32: what the splits of all lists found, unnormalised
    counters: Tensor  # int32, zero between launches: how many splits are done

    @classmethod
    def empty(
        cls, num_requests: int, max_len: int, num_heads: int, key_SGD: Tensor, top_k: int, plan: DecodePlan | None = None
    ) -> "DecodeScratch":
        """Scratch for up to num_requests requests of up to max_len keys, of which top_k are attended to."""
        largest = 0
        for count in range(1, num_requests + 1):
            splits = (plan or decode_plan(count, num_heads, key_SGD, top_k)).num_splits
            largest = max(largest, count * num_heads * splits * (key_SGD.shape[2] + 2))
        device = key_SGD.device
        return cls(
            torch.empty(num_requests, max_len, dtype=torch.float32, device=device),
            torch.empty(num_requests, top_k, dtype=torch.int32, device=device),
            torch.empty(largest, dtype=torch.float32, device=device),
            torch.zeros(num_requests * num_heads, dtype=torch.int32, device=device),
        )


def sparse_decode(
    query_BHD: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    indices_BK: Tensor,
    scale: float,
    page_table_BP: Tensor | None = None,
    page_size: int = 64,
    key_scales_SG: Tensor | None = None,
    value_scales_SG: Tensor | None = None,
    scratch: DecodeScratch | None = None,
    plan: DecodePlan | None = None,
) -> Tensor:
    """softmax(q . k * scale) v of one query a request over its picked keys, [B, H, D]. Never waits for the host.

    Args:
        key_SGD, value_SGD: the caches, all slots: the queries' dtype, or float8_e4m3fn with a float32 scale for each slot and
            KV head (`quantize_vectors`).
        indices_BK: int32, -1 for none: positions of the request's own sequence, or slots where there is no page table.
        page_table_BP: int32, the page of every page_size positions of each request.
        scratch: where to keep what the splits find; None makes it anew. Its counters must be zero.

    Raises:
        ValueError: tensors that are not served, a page table of another number of requests, or a scratch that is too small.
    """
    _check(query_BHD, key_SGD, value_SGD, indices_BK, page_table_BP, key_scales_SG, value_scales_SG)
    num_requests, num_heads, width = query_BHD.shape
    group = num_heads // key_SGD.shape[1]
    plan = plan or decode_plan(num_requests, num_heads, key_SGD, indices_BK.shape[1])
    rows = MIN_ROWS if plan.num_groups == 1 else max(MIN_ROWS, triton.next_power_of_2(plan.num_groups * group))
    num_blocks = key_SGD.shape[1] // plan.num_groups * triton.cdiv(plan.num_groups * group, rows)
    parts, counters = _parts(scratch, num_requests, num_heads, num_blocks, width, plan.num_splits, query_BHD.device)
    output = torch.empty_like(query_BHD, memory_format=torch.contiguous_format)
    indices = indices_BK.contiguous()
    is_fp8 = key_SGD.dtype == torch.float8_e4m3fn
    is_native = is_fp8 and has_fp8(key_SGD.device)
    key, value = (x.view(torch.uint8) if is_fp8 and not is_native else x for x in (key_SGD, value_SGD))
    padded_splits = triton.next_power_of_2(plan.num_splits)
    _decode[(num_requests, num_blocks, plan.num_splits)](
        query_BHD.contiguous(),
        key,
        value,
        key_scales_SG if key_scales_SG is not None else output,
        value_scales_SG if value_scales_SG is not None else output,
        indices,
        page_table_BP if page_table_BP is not None else indices,
        parts,
        counters,
        output,
        indices.shape[1],
        page_table_BP.stride(0) if page_table_BP is not None else 0,
        *(key.stride(0), key.stride(1), value.stride(0), value.stride(1)),
        scale * math.log2(math.e),
        **{"HEADS": num_heads, "GROUP": group, "GROUPS": key.shape[1], "TOGETHER": plan.num_groups, "WIDTH": width},
        **{"ROWS": rows, "MERGED": min(rows, triton.next_power_of_2(plan.num_groups * group)), "BLOCK": plan.block},
        **{"NUM_SPLITS": plan.num_splits, "PADDED_SPLITS": padded_splits, "UNROLLED": min(8, padded_splits)},
        PAGE_SIZE=page_size if page_table_BP is not None else 0,
        IS_FP8=is_fp8,
        IS_NATIVE=is_native,
        PRECISION="ieee" if query_BHD.dtype == torch.float32 else "tf32",
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    return output


def sparse_select_decode(
    query_BHD: Tensor,
    index_query_BJI: Tensor,
    gates_BJ: Tensor,
    caches: LayerCaches,
    page_table_BP: Tensor,
    lengths_B: Tensor,
    scale: float,
    scratch: DecodeScratch,
) -> Tensor:
    """Attention of one new token a request over the keys that the indexer picks of its pages, [B, H, D].

    Three operations and nothing between them: `indexer_decode`, `top_k_positions`, `sparse_decode`. Never waits for the host.

    Args:
        lengths_B: int32, keys of each request with the new token's own; a request of 0 gets zeros.
        scratch: for at least B requests; it also says how long they may be and how many keys are picked.
    """
    assert caches.index_key_SI is not None
    max_len = scratch.scores_BL.shape[1]
    num_requests = query_BHD.shape[0]
    scores, picked = scratch.scores_BL[:num_requests], scratch.picked_BK[:num_requests]
    indexer_decode(
        index_query_BJI,
        gates_BJ,
        caches.index_key_SI,
        page_table_BP,
        lengths_B,
        max_len,
        caches.index_scales_S,
        caches.page_size,
        scores,
    )
    top_k_positions(scores, picked.shape[1], lengths_B, picked)
    return sparse_decode(
        query_BHD,
        caches.key_SGD,
        caches.value_SGD,
        picked,
        scale,
        page_table_BP,
        caches.page_size,
        caches.key_scales_SG,
        caches.value_scales_SG,
        scratch,
    )


def _check(
    query_BHD: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    indices_BK: Tensor,
    page_table_BP: Tensor | None,
    key_scales_SG: Tensor | None,
    value_scales_SG: Tensor | None,
) -> None:
    is_fp8 = key_SGD.dtype == value_SGD.dtype == torch.float8_e4m3fn
    # What matters of fp8 caches beside their dtype is said of caches in the queries' dtype.
    like = [torch.empty(x.shape, dtype=query_BHD.dtype, device="meta") if is_fp8 else x for x in (key_SGD, value_SGD)]
    check_supported(query_BHD, *like)
    num_requests = query_BHD.shape[0]
    if not num_requests:
        raise ValueError("sparse_decode serves one request or more, got none")
    for scales in (key_scales_SG, value_scales_SG):
        if is_fp8 != (scales is not None) or (scales is not None and scales.shape != key_SGD.shape[:2]):
            raise ValueError(
                "sparse_decode takes a scale for each slot and KV head with caches in float8_e4m3fn and none with others, got "
                f"{key_SGD.dtype} and scales of {None if scales is None else tuple(scales.shape)}"
            )
    tensors = (key_SGD, value_SGD, key_scales_SG, value_scales_SG)
    if any(x is not None and x.stride(-1) != 1 for x in tensors) or any(
        x is not None and not x.is_contiguous() for x in tensors[2:]
    ):
        raise ValueError("sparse_decode serves caches whose rows have no gaps, and scales without any, got others")
    if page_table_BP is not None and page_table_BP.shape[0] != num_requests:
        raise ValueError(f"sparse_decode got {num_requests} queries and a page table of {page_table_BP.shape[0]} requests")
    if indices_BK.shape[0] != num_requests or indices_BK.dtype != torch.int32:
        raise ValueError(
            f"sparse_decode takes a list in int32 for each of {num_requests} queries, got {indices_BK.dtype} of "
            f"{tuple(indices_BK.shape)}"
        )


def _parts(
    scratch: DecodeScratch | None,
    num_requests: int,
    num_heads: int,
    num_blocks: int,
    width: int,
    num_splits: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Room for the splits' sums, and a counter for each request and block of heads."""
    size = num_requests * num_heads * num_splits * (width + 2)
    if scratch is None:
        counters = torch.zeros(num_requests * num_blocks, dtype=torch.int32, device=device)
        return torch.empty(size, dtype=torch.float32, device=device), counters
    if scratch.parts.numel() < size or scratch.counters.numel() < num_requests * num_blocks:
        raise ValueError(
            f"sparse_decode needs a scratch of {size} numbers and {num_requests * num_blocks} counters, got "
            f"{scratch.parts.numel()} and {scratch.counters.numel()}"
        )
    return scratch.parts, scratch.counters


@triton.jit
def _slots(page_table, request, table_row, position_N, PAGE_SIZE: tl.constexpr):
    """Slots of a request's positions, -1 of -1."""
    if PAGE_SIZE > 0:
        page_N = tl.load(page_table + request * table_row + position_N // PAGE_SIZE, mask=position_N >= 0, other=0)
        return tl.where(position_N >= 0, page_N * PAGE_SIZE + position_N % PAGE_SIZE, -1)
    return position_N


@triton.jit
def _widened(x, IS_FP8: tl.constexpr, IS_NATIVE: tl.constexpr, DTYPE: tl.constexpr):
    """Numbers of a cache as the matrix unit takes them; those of e4m3 without fp8 are 2^-8 of what they stand for."""
    if IS_FP8:
        x = x.to(DTYPE) if IS_NATIVE else e4m3_half(x).to(DTYPE)
    return x


@triton.jit
def _decode(
    query,
    key,
    value,
    key_scales,
    value_scales,
    indices,
    page_table,
    parts,
    counters,
    output,
    num_picked,
    table_row,
    key_row,
    key_group,
    value_row,
    value_group,
    scale_log2,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    TOGETHER: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    UNROLLED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    IS_FP8: tl.constexpr,
    IS_NATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    request, block, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    blocks_per_group: tl.constexpr = (TOGETHER * GROUP + ROWS - 1) // ROWS
    first_group = block // blocks_per_group * TOGETHER
    in_groups_M = block % blocks_per_group * ROWS + tl.arange(0, ROWS)
    is_head = in_groups_M < TOGETHER * GROUP
    head_M = first_group * GROUP + in_groups_M
    row_M = request * HEADS + head_M
    dim = tl.arange(0, WIDTH)
    q_MD = tl.load(query + row_M[:, None] * WIDTH + dim[None, :], mask=is_head[:, None], other=0.0)
    score_scale_M = tl.zeros([ROWS], tl.float32) + scale_log2
    if IS_FP8 and PRECISION != "ieee":
        # In float16 beside e4m3, which it holds exactly; a power of two keeps any query in its range.
        wide_MD = q_MD.to(tl.float32)
        query_scale_M, inverse_M = power_of_two_scale(tl.maximum(tl.max(tl.abs(wide_MD), 1), 1e-4))
        q_MD = (wide_MD * inverse_M[:, None]).to(tl.float16)
        score_scale_M *= query_scale_M
    if IS_FP8 and not IS_NATIVE:
        score_scale_M *= 256.0
    # A row of the caches is one KV head of one picked key: the heads of other groups do not see it.
    row_N = tl.arange(0, BLOCK * TOGETHER)
    token_N, group_N = row_N // TOGETHER, first_group + row_N % TOGETHER
    is_own = is_head[:, None] & ((first_group + in_groups_M // GROUP)[:, None] == group_N[None, :])
    key_base_N, value_base_N = key + group_N.to(tl.int64) * key_group, value + group_N.to(tl.int64) * value_group
    # Every split takes whole steps, so that a list's end falls into one of them only.
    steps_per_split = ((num_picked + BLOCK - 1) // BLOCK + NUM_SPLITS - 1) // NUM_SPLITS
    first = split * steps_per_split * BLOCK
    last = tl.minimum(first + steps_per_split * BLOCK, num_picked)
    # Slots are known a step ahead and positions two, so that no address is waited for; the rows are Triton's to load ahead.
    line = indices + request * num_picked
    position_N = tl.load(line + first + token_N, mask=first + token_N < last, other=-1)
    slot_N = _slots(page_table, request, table_row, position_N, PAGE_SIZE)
    position_N = tl.load(line + first + BLOCK + token_N, mask=first + BLOCK + token_N < last, other=-1)
    key_scale_N = tl.zeros([BLOCK * TOGETHER], tl.float32)
    value_scale_N = tl.zeros([BLOCK * TOGETHER], tl.float32)
    if IS_FP8:
        key_scale_N = tl.load(key_scales + slot_N * GROUPS + group_N, mask=slot_N >= 0, other=1.0)
        value_scale_N = tl.load(value_scales + slot_N * GROUPS + group_N, mask=slot_N >= 0, other=1.0)
    top_M = tl.full([ROWS], float("-inf"), tl.float32)
    sum_M = tl.zeros([ROWS], tl.float32)
    acc_MD = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(first, last, BLOCK):
        is_key = slot_N >= 0
        next_slot_N = _slots(page_table, request, table_row, position_N, PAGE_SIZE)
        column_N = start + 2 * BLOCK + token_N
        position_N = tl.load(line + column_N, mask=column_N < last, other=-1)
        k_ND = tl.load((key_base_N + slot_N.to(tl.int64) * key_row)[:, None] + dim[None, :], mask=is_key[:, None], other=0.0)
        k_ND = _widened(k_ND, IS_FP8, IS_NATIVE, q_MD.dtype)
        s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION) * score_scale_M[:, None]
        if IS_FP8:
            # A value's scale goes into its weight's exponent, so that weights are at most 1 however the scales differ, and
            # leaves the sum of the weights again.
            s_MN = s_MN * key_scale_N[None, :] + tl.log2(value_scale_N)[None, :]
        s_MN = tl.where(is_own & is_key[None, :], s_MN, float("-inf"))
        new_top_M = tl.maximum(top_M, tl.max(s_MN, 1))
        safe_M = tl.where(new_top_M == float("-inf"), 0.0, new_top_M)
        p_MN = tl.exp2(s_MN - safe_M[:, None])
        shrink_M = tl.exp2(top_M - safe_M)
        if IS_FP8:
            sum_M = sum_M * shrink_M + tl.sum(p_MN / value_scale_N[None, :], 1)
            key_scale_N = tl.load(key_scales + next_slot_N * GROUPS + group_N, mask=next_slot_N >= 0, other=1.0)
            value_scale_N = tl.load(value_scales + next_slot_N * GROUPS + group_N, mask=next_slot_N >= 0, other=1.0)
        else:
            sum_M = sum_M * shrink_M + tl.sum(p_MN, 1)
        v_ND = tl.load(
            (value_base_N + slot_N.to(tl.int64) * value_row)[:, None] + dim[None, :], mask=is_key[:, None], other=0.0
        )
        v_ND = _widened(v_ND, IS_FP8, IS_NATIVE, q_MD.dtype)
        acc_MD = acc_MD * shrink_M[:, None] + tl.dot(p_MN.to(v_ND.dtype), v_ND, input_precision=PRECISION)
        top_M = new_top_M
        slot_N = next_slot_N
    if IS_FP8 and not IS_NATIVE:
        acc_MD *= 256.0
    out_MD = output + row_M[:, None] * WIDTH + dim[None, :]
    if NUM_SPLITS == 1:
        acc_MD = acc_MD / tl.where(sum_M > 0, sum_M, 1.0)[:, None]
        tl.store(out_MD, acc_MD.to(output.dtype.element_ty), mask=is_head[:, None])
    else:
        # The numbers of a split first, then the tops and the sums of all.
        num_rows = tl.num_programs(0).to(tl.int64) * HEADS * NUM_SPLITS
        tops, sums = parts + num_rows * WIDTH, parts + num_rows * (WIDTH + 1)
        place_M = row_M * NUM_SPLITS + split
        tl.store(parts + place_M[:, None] * WIDTH + dim[None, :], acc_MD, mask=is_head[:, None])
        tl.store(tops + place_M, top_M, mask=is_head)
        tl.store(sums + place_M, sum_M, mask=is_head)
        # The barrier orders every thread's stores before the one thread's release; whoever counts last has acquired them all.
        tl.debug_barrier()
        counter = counters + request * tl.num_programs(1) + block
        num_done = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if num_done == NUM_SPLITS - 1:
            tl.debug_barrier()
            tl.store(counter, 0)
            first_head = block % blocks_per_group * ROWS
            num_heads = tl.minimum(TOGETHER * GROUP - first_head, ROWS)
            first_row = request * HEADS + first_group * GROUP + first_head
            _merge(parts, tops, sums, output, first_row, num_heads, MERGED, WIDTH, NUM_SPLITS, PADDED_SPLITS, UNROLLED)


@triton.jit
def _merge(
    parts,
    tops,
    sums,
    output,
    first_row,
    num_rows,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    UNROLLED: tl.constexpr,
):
    """The softmax of whole lists from those of their splits, in the order of the splits: the same bits on every run."""
    in_rows_M = tl.arange(0, ROWS)
    is_row = in_rows_M < num_rows
    row_M = first_row + in_rows_M
    dim = tl.arange(0, WIDTH)
    split_N = tl.arange(0, PADDED_SPLITS)
    is_split = (split_N < NUM_SPLITS)[:, None] & is_row[None, :]
    top_M = tl.max(tl.load(tops + row_M[None, :] * NUM_SPLITS + split_N[:, None], mask=is_split, other=float("-inf")), 0)
    top_M = tl.where(top_M == float("-inf"), 0.0, top_M)
    sum_M = tl.zeros([ROWS], tl.float32)
    acc_MD = tl.zeros([ROWS, WIDTH], tl.float32)
    # The parts of several splits are under way at a time; the memory is waited for once for all of them.
    for first in range(0, NUM_SPLITS, UNROLLED):
        for offset in tl.static_range(UNROLLED):
            other = first + offset
            place_M = row_M * NUM_SPLITS + other
            is_part = in_rows_M < tl.where(other < NUM_SPLITS, num_rows, 0)
            share_M = tl.exp2(tl.load(tops + place_M, mask=is_part, other=float("-inf")) - top_M)
            sum_M += tl.load(sums + place_M, mask=is_part, other=0.0) * share_M
            part_MD = tl.load(parts + place_M[:, None] * WIDTH + dim[None, :], mask=is_part[:, None], other=0.0)
            acc_MD += part_MD * share_M[:, None]
    acc_MD = acc_MD / tl.where(sum_M > 0, sum_M, 1.0)[:, None]
    tl.store(output + row_M[:, None] * WIDTH + dim[None, :], acc_MD.to(output.dtype.element_ty), mask=is_row[:, None])
