"""`sparse_attention` for one query a request over paged caches, on any CUDA GPU, in Triton: the picked keys split over the SMs.

Letters: B requests, S slots of the cache, H query heads, G KV heads, D head width, K picked keys, P pages of a request,
M rows of a program (16, the matrix unit's least, of which the heads of a group are used), N keys of a step.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from openkeye.kernels.sparse_attention import check_supported

BLOCK = 64
ROWS = 16
NUM_PROGRAMS = 264
# two for each SM of the largest GPU that this is tuned for: fewer leave SMs idle, more make merging longer


def sparse_decode(
    query_BHD: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    indices_BK: Tensor,
    scale: float,
    page_table_BP: Tensor | None = None,
    page_size: int = 64,
    num_splits: int | None = None,
) -> Tensor:
    """softmax(q . k * scale) v of one query a request over its picked keys, [B, H, D]. Never waits for the host.

    Args:
        key_SGD, value_SGD: the caches, all slots.
        indices_BK: int32, -1 for none: positions of the request's own sequence, or slots where there is no page table.
        page_table_BP: int32, the page of every page_size positions of each request.
        num_splits: parts of a list that are attended to side by side; None: as many as fill the GPU.

    Raises:
        ValueError: tensors that are not served, or a page table of another number of requests.
    """
    check_supported(query_BHD, key_SGD, value_SGD)
    num_requests, num_heads, width = query_BHD.shape
    num_groups, num_picked = key_SGD.shape[1], indices_BK.shape[1]
    if page_table_BP is not None and page_table_BP.shape[0] != num_requests:
        raise ValueError(f"sparse_decode got {num_requests} queries and a page table of {page_table_BP.shape[0]} requests")
    group = num_heads // num_groups
    num_blocks = triton.cdiv(group, ROWS)
    most = triton.cdiv(num_picked, BLOCK)
    num_splits = num_splits or max(1, min(most, NUM_PROGRAMS // max(1, num_requests * num_groups * num_blocks)))
    shape = (num_requests, num_heads, num_splits)
    parts = torch.empty(*shape, width, dtype=torch.float32, device=query_BHD.device)
    tops, sums = (torch.empty(shape, dtype=torch.float32, device=query_BHD.device) for _ in range(2))
    output = torch.empty_like(query_BHD, memory_format=torch.contiguous_format)
    indices = indices_BK.contiguous()
    _decode[(num_requests, num_groups * num_blocks, num_splits)](
        query_BHD.contiguous(),
        key_SGD,
        value_SGD,
        indices,
        page_table_BP if page_table_BP is not None else indices,
        parts,
        tops,
        sums,
        num_picked,
        page_table_BP.stride(0) if page_table_BP is not None else 0,
        key_SGD.stride(0),
        key_SGD.stride(1),
        value_SGD.stride(0),
        value_SGD.stride(1),
        scale * math.log2(math.e),
        HEADS=num_heads,
        GROUP=group,
        WIDTH=width,
        ROWS=ROWS,
        BLOCK=BLOCK,
        NUM_SPLITS=num_splits,
        PAGE_SIZE=page_size if page_table_BP is not None else 0,
        PRECISION="ieee" if query_BHD.dtype == torch.float32 else "tf32",
        num_warps=4,
        num_stages=3,
    )
    _merge[(num_requests, num_heads)](
        parts, tops, sums, output, HEADS=num_heads, WIDTH=width, NUM_SPLITS=num_splits, num_warps=4
    )
    return output


@triton.jit
def _decode(
    query,
    key,
    value,
    indices,
    page_table,
    parts,
    tops,
    sums,
    num_picked,
    table_row,
    key_row,
    key_group,
    value_row,
    value_group,
    scale_log2,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    request, block, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    blocks_per_group: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    group = block // blocks_per_group
    in_group = block % blocks_per_group * ROWS + tl.arange(0, ROWS)
    is_head = in_group < GROUP
    head_M = group * GROUP + in_group
    dim = tl.arange(0, WIDTH)
    q_MD = tl.load(query + (request * HEADS + head_M)[:, None] * WIDTH + dim[None, :], mask=is_head[:, None], other=0.0)
    top_M = tl.full([ROWS], float("-inf"), tl.float32)
    sum_M = tl.zeros([ROWS], tl.float32)
    acc_MD = tl.zeros([ROWS, WIDTH], tl.float32)
    # Every split takes whole steps, so that a list's end falls into one of them only.
    num_steps = (num_picked + BLOCK - 1) // BLOCK
    steps_per_split = (num_steps + NUM_SPLITS - 1) // NUM_SPLITS
    first = split * steps_per_split * BLOCK
    for start in range(first, tl.minimum(first + steps_per_split * BLOCK, num_picked), BLOCK):
        column = start + tl.arange(0, BLOCK)
        position_N = tl.load(indices + request * num_picked + column, mask=column < num_picked, other=-1)
        is_key = position_N >= 0
        if PAGE_SIZE > 0:
            page_N = tl.load(page_table + request * table_row + position_N // PAGE_SIZE, mask=is_key, other=0)
            slot_N = page_N.to(tl.int64) * PAGE_SIZE + position_N % PAGE_SIZE
        else:
            slot_N = position_N.to(tl.int64)
        k_ND = tl.load(key + group * key_group + slot_N[:, None] * key_row + dim[None, :], mask=is_key[:, None], other=0.0)
        s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION) * scale_log2
        s_MN = tl.where(is_key[None, :], s_MN, float("-inf"))
        new_top_M = tl.maximum(top_M, tl.max(s_MN, 1))
        safe_M = tl.where(new_top_M == float("-inf"), 0.0, new_top_M)
        p_MN = tl.exp2(s_MN - safe_M[:, None])
        shrink_M = tl.exp2(top_M - safe_M)
        sum_M = sum_M * shrink_M + tl.sum(p_MN, 1)
        v_ND = tl.load(
            value + group * value_group + slot_N[:, None] * value_row + dim[None, :], mask=is_key[:, None], other=0.0
        )
        acc_MD = acc_MD * shrink_M[:, None] + tl.dot(p_MN.to(v_ND.dtype), v_ND, input_precision=PRECISION)
        top_M = new_top_M
    place_M = (request * HEADS + head_M) * NUM_SPLITS + split
    tl.store(parts + place_M[:, None] * WIDTH + dim[None, :], acc_MD, mask=is_head[:, None])
    tl.store(tops + place_M, top_M, mask=is_head)
    tl.store(sums + place_M, sum_M, mask=is_head)


@triton.jit
def _merge(parts, tops, sums, output, HEADS: tl.constexpr, WIDTH: tl.constexpr, NUM_SPLITS: tl.constexpr):
    """The softmax of the whole list from those of its splits, one after the other: the same bits on every run."""
    row = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    dim = tl.arange(0, WIDTH)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc_D = tl.zeros([WIDTH], tl.float32)
    for split in range(NUM_SPLITS):
        place = row * NUM_SPLITS + split
        its_top = tl.load(tops + place)
        new_top = tl.maximum(top, its_top)
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        old_share, its_share = tl.exp2(top - safe), tl.exp2(its_top - safe)
        acc_D = acc_D * old_share + tl.load(parts + place * WIDTH + dim) * its_share
        total = total * old_share + tl.load(sums + place) * its_share
        top = new_top
    out_D = acc_D / tl.where(total > 0, total, 1.0)
    tl.store(output + row * WIDTH + dim, out_D.to(output.dtype.element_ty))
