"""The lightning indexer's scores of one new token a request over paged index caches, in Triton, on any CUDA GPU.

Twin: `reference.indexer_decode`. The keys of all requests are cut into blocks, and a fixed number of programs share the blocks
evenly, whatever the lengths: neither the grid nor the buffers depend on what the device memory holds, so a captured graph may
be replayed with other lengths and page tables.

Letters: B requests, S slots of the cache, P pages of a request, J indexer heads, I indexer width, L columns of the scores,
M keys of a block, N heads of a program.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from openkeye.kernels.quantize import e4m3_code, e4m3_half, power_of_two_scale

WIDTHS = (32, 64, 128)
MAX_HEADS = 64
MAX_REQUESTS = 1024
KEY_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)


class IndexerPlan(NamedTuple):
    """How a launch is cut: keys of a block, programs, warps of a program, blocks that are loaded ahead and one."""

    block: int
    num_programs: int
    num_warps: int
    num_stages: int


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; of anything else (Triton's interpreter) 3, so that few keys already fall to several programs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@functools.cache
def has_fp8(device: torch.device) -> bool:
    """Whether the GPU multiplies and converts e4m3 itself."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def indexer_plan(key_SI: Tensor) -> IndexerPlan:
    """Enough programs that their blocks on the way, 8 to 16 KiB each, hide the latency of the memory."""
    multiprocessors = num_multiprocessors(key_SI.device)
    if key_SI.element_size() == 1:
        return IndexerPlan(128, 6 * multiprocessors, 4, 4)
    return IndexerPlan(128 if key_SI.element_size() == 2 else 64, 4 * multiprocessors, 4, 3)


def indexer_decode(
    query_BJI: Tensor,
    gates_BJ: Tensor,
    key_SI: Tensor,
    page_table_BP: Tensor,
    lengths_B: Tensor,
    max_len: int,
    scales_S: Tensor | None = None,
    page_size: int = 64,
    out_BL: Tensor | None = None,
    plan: IndexerPlan | None = None,
) -> Tensor:
    """I[b, s] = sum_j gate[b, j] relu(q[b, j] . k[s]) for s < the length of request b, float32 [B, max_len].

    Never waits for the host. Columns from a request's length on are not written: whoever reads a row stops there. Where the
    cache is e4m3, the query is quantised by `quantize_vectors` on the way, and I is
    scale[s] * sum_j gate_j * scale_j * relu(q8_j . k8[s]).

    Args:
        query_BJI: bfloat16, float16 or float32, the cache's dtype where that is not e4m3; e4m3 is taken as it is, its scales
            already in the gates.
        gates_BJ: any float dtype, already scaled by I ** -0.5.
        key_SI: the cache of index keys, all slots: bfloat16, float16, float32, or float8_e4m3fn with scales_S float32 [S].
        page_table_BP: int32, the page of every page_size positions of each request; read only up to its length.
        lengths_B: int32, keys of each request, 0 to max_len.
        page_size: a multiple of 16.
        out_BL: where to write, with rows of any stride and at least max_len columns; None makes a new tensor.

    Raises:
        ValueError: shapes, dtypes or a page size that are not served.
    """
    _check(query_BJI, key_SI, page_table_BP, lengths_B, max_len, scales_S, page_size)
    num_requests, num_heads, width = query_BJI.shape
    if out_BL is None:
        out_BL = torch.empty(num_requests, max_len, dtype=torch.float32, device=key_SI.device)
    if out_BL.shape[0] != num_requests or out_BL.shape[1] < max_len or out_BL.stride(1) != 1:
        raise ValueError(
            f"indexer_decode writes {num_requests} rows of {max_len} columns side by side, got an output of "
            f"{tuple(out_BL.shape)} with strides {out_BL.stride()}"
        )
    plan = plan or indexer_plan(key_SI)
    keys, queries = key_SI, query_BJI.contiguous()
    is_fp8 = key_SI.dtype == torch.float8_e4m3fn
    is_native = is_fp8 and has_fp8(key_SI.device)
    if is_fp8 and not is_native:
        keys = keys.view(torch.uint8)
        queries = queries.view(torch.uint8) if queries.dtype == torch.float8_e4m3fn else queries
    _score_pages[(plan.num_programs,)](
        queries,
        gates_BJ.contiguous(),
        keys,
        scales_S if scales_S is not None else gates_BJ,
        page_table_BP,
        lengths_B,
        out_BL,
        num_requests,
        plan.num_programs,
        max_len,
        keys.stride(0),
        page_table_BP.stride(0),
        out_BL.stride(0),
        REQUESTS=triton.next_power_of_2(num_requests),
        HEADS=num_heads,
        ROWS=max(16, triton.next_power_of_2(num_heads)),
        WIDTH=width,
        BLOCK=plan.block,
        PAGE_SIZE=page_size,
        IS_FP8=is_fp8,
        IS_NATIVE=is_native,
        IS_QUANTIZED=query_BJI.dtype == torch.float8_e4m3fn,
        PRECISION="ieee" if key_SI.dtype == torch.float32 else "tf32",
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )
    return out_BL


def _check(
    query_BJI: Tensor,
    key_SI: Tensor,
    page_table_BP: Tensor,
    lengths_B: Tensor,
    max_len: int,
    scales_S: Tensor | None,
    page_size: int,
) -> None:
    num_requests, num_heads, width = query_BJI.shape
    if width not in WIDTHS or not 1 <= num_heads <= MAX_HEADS or key_SI.shape[1] != width or key_SI.stride(1) != 1:
        raise ValueError(
            f"indexer_decode serves widths of 32, 64 or 128 and up to {MAX_HEADS} heads over rows without gaps, got "
            f"{num_heads} heads of {width} and keys of {tuple(key_SI.shape)}"
        )
    is_fp8 = key_SI.dtype == torch.float8_e4m3fn
    if key_SI.dtype not in KEY_DTYPES or query_BJI.dtype not in KEY_DTYPES or not (is_fp8 or query_BJI.dtype == key_SI.dtype):
        raise ValueError(
            "indexer_decode serves keys in bfloat16, float16 or float32 with queries alike, and keys in float8_e4m3fn, got "
            f"queries in {query_BJI.dtype} and keys in {key_SI.dtype}"
        )
    if is_fp8 != (scales_S is not None) or (scales_S is not None and not scales_S.is_contiguous()):
        raise ValueError(
            f"indexer_decode takes a scale for each slot, without gaps, with keys in float8_e4m3fn only, got {key_SI.dtype}"
        )
    if page_size < 16 or page_size % 16:
        raise ValueError(f"indexer_decode serves page sizes that are multiples of 16, got {page_size}")
    if not 1 <= num_requests <= MAX_REQUESTS or page_table_BP.shape[0] != num_requests or lengths_B.shape != (num_requests,):
        raise ValueError(
            f"indexer_decode serves 1 to {MAX_REQUESTS} requests with a row of the page table and a length each, got "
            f"{num_requests} queries, a page table of {tuple(page_table_BP.shape)} and lengths of {tuple(lengths_B.shape)}"
        )
    if page_table_BP.dtype != torch.int32 or lengths_B.dtype != torch.int32 or page_table_BP.stride(1) != 1:
        raise ValueError(
            f"indexer_decode serves page tables and lengths in int32 without gaps, got {page_table_BP.dtype} and "
            f"{lengths_B.dtype}"
        )
    if max_len > page_table_BP.shape[1] * page_size:
        raise ValueError(
            f"indexer_decode got a page table of {page_table_BP.shape[1]} pages of {page_size}, too few for {max_len} keys"
        )


@triton.jit
def _pages(page_table, request, table_row, column_M, last, PAGE_SIZE: tl.constexpr):
    """Pages of a request's positions; page 0 from `last` on."""
    return tl.load(page_table + request * table_row + column_M // PAGE_SIZE, mask=column_M < last, other=0)


@triton.jit
def _score_pages(
    query,
    gates,
    key,
    scales,
    page_table,
    lengths,
    out,
    num_requests,
    num_programs,
    max_len,
    key_row,
    table_row,
    out_row,
    REQUESTS: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    IS_FP8: tl.constexpr,
    IS_NATIVE: tl.constexpr,
    IS_QUANTIZED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    number_B = tl.arange(0, REQUESTS)
    length_B = tl.minimum(tl.load(lengths + number_B, mask=number_B < num_requests, other=0), max_len)
    blocks_B = (length_B + BLOCK - 1) // BLOCK
    end_B = tl.cumsum(blocks_B, 0)
    total = tl.sum(blocks_B, 0).to(tl.int64)
    block = (total * tl.program_id(0) // num_programs).to(tl.int32)
    last_block = (total * (tl.program_id(0) + 1) // num_programs).to(tl.int32)
    head_N = tl.arange(0, ROWS)
    dim = tl.arange(0, WIDTH)
    while block < last_block:
        # The request that this block belongs to, and all of its blocks that are this program's.
        number = tl.sum((end_B <= block).to(tl.int32), 0)
        before = tl.sum(tl.where(number_B < number, blocks_B, 0), 0)
        length = tl.sum(tl.where(number_B == number, length_B, 0), 0)
        request = number.to(tl.int64)
        first = (block - before) * BLOCK
        last = tl.minimum((last_block - before) * BLOCK, length)
        row_N = request * HEADS + head_N
        gate_N = tl.load(gates + row_N, mask=head_N < HEADS, other=0.0).to(tl.float32)
        q_NI = tl.load(query + row_N[:, None] * WIDTH + dim[None, :], mask=(head_N < HEADS)[:, None], other=0.0)
        if IS_FP8:
            if not IS_QUANTIZED:
                wide_NI = q_NI.to(tl.float32)
                scale_N, inverse_N = power_of_two_scale(tl.maximum(tl.max(tl.abs(wide_NI), 1), 1e-4))
                gate_N *= scale_N
                q_NI = e4m3_code(wide_NI * inverse_N[:, None])
            if IS_NATIVE:
                q_NI = q_NI.to(tl.float8e4nv, bitcast=True)
            else:
                q_NI = e4m3_half(q_NI)
                # Both sides of the product are halves of 2^-8 of their numbers.
                gate_N *= 65536.0
        # Scales are loaded a block ahead and pages two, so that no address is waited for; the keys are Triton's to load ahead.
        column_M = first + tl.arange(0, BLOCK)
        page_M = _pages(page_table, request, table_row, column_M, last, PAGE_SIZE)
        slot_M = page_M * PAGE_SIZE + column_M % PAGE_SIZE
        page_M = _pages(page_table, request, table_row, column_M + BLOCK, last, PAGE_SIZE)
        scale_M = tl.load(scales + slot_M, mask=column_M < last, other=0.0) if IS_FP8 else column_M
        for start in range(first, last, BLOCK):
            column_M = start + tl.arange(0, BLOCK)
            is_key = column_M < last
            next_M = column_M + BLOCK
            next_slot_M = page_M * PAGE_SIZE + next_M % PAGE_SIZE
            page_M = _pages(page_table, request, table_row, next_M + BLOCK, last, PAGE_SIZE)
            k_MI = tl.load(key + slot_M.to(tl.int64)[:, None] * key_row + dim[None, :], mask=is_key[:, None], other=0.0)
            if IS_FP8 and not IS_NATIVE:
                k_MI = e4m3_half(k_MI)
            products_MN = tl.dot(k_MI, tl.trans(q_NI), input_precision=PRECISION)
            score_M = tl.sum(tl.maximum(products_MN, 0.0) * gate_N[None, :], 1)
            if IS_FP8:
                score_M *= scale_M
                scale_M = tl.load(scales + next_slot_M, mask=next_M < last, other=0.0)
            tl.store(out + request * out_row + column_M, score_M, mask=is_key)
            slot_M = next_slot_M
        block = before + (last + BLOCK - 1) // BLOCK
