"""`sparse_attention` for prefill: a tile of 16 neighbouring queries fetches the keys it selected between them once.

Twin: `reference.sparse_attention`. On Hopper GPUs `sparse_attention.cu` serves, elsewhere Triton. Tiles that share too little
for a union to pay are left to a kernel that gathers query by query; which tiles those are is decided on the GPU.

Letters: T queries, S keys, H query heads, G KV heads, D head width, K picked keys, N tiles, B sequences, P pages of a sequence,
M rows of a program (16 queries x up to 8 heads of a group, or 16 heads of one query). In kernels N: keys of a step.
"""

import ctypes
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from openkeye.kernels.build import check_launch, cuda_library
from openkeye.kernels.unions import TILE, Unions, build_unions

WIDTHS = (16, 32, 64, 128)
CUDA_WIDTHS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEADS = 8
# of a group in one program: with 16 queries they fill the matrix unit's 128 rows
CUDA_LEAST_GROUP = 4
# The CUDA kernel's programs have 8 heads; smaller groups leave rows of them empty.
CUDA_SHARE, TRITON_SHARE = 0.66, 0.37
# of 16 K: the union's size up to which one fetch for all 16 queries costs less than 16 gathers of K keys, as
# `python -m benchmarks.kernels --only unions` shows it on an H100 (22,000 and 12,300 keys of 32,768)
ALONE_ROWS = 16
ALONE_QUERIES = 4
# of one program, one after the other: where unions serve, few programs have to start to find nothing to do


class Config(NamedTuple):
    """How a Triton kernel is laid out."""

    block: int
    # keys of a step
    num_warps: int
    num_stages: int
    num_registers: int | None = None
    # that a thread may have at most; fewer let a second program run on the same SM


UNION_CONFIG, NARROW_CONFIG = Config(64, 8, 3), Config(32, 4, 4)
# for 8 heads in a program and for fewer
ALONE_CONFIG = Config(32, 4, 4)
FLOAT32_CONFIG, FLOAT32_ALONE_CONFIG = Config(16, 8, 2), Config(32, 4, 2)
# Numbers twice as wide: fewer keys in shared memory.


@dataclass(frozen=True)
class Call:
    """One call's tensors and numbers, as all three kernels take them."""

    query_THD: Tensor
    key_SGD: Tensor
    value_SGD: Tensor
    indices_TK: Tensor
    unions: Unions
    page_table_BP: Tensor | None
    page_size: int
    sequence_N: Tensor | None
    scale_log2: float
    output_THD: Tensor
    lse_TH: Tensor

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.query_THD.shape[1] // self.key_SGD.shape[1]

    @property
    def strides(self) -> tuple[int, int, int, int]:
        return self.key_SGD.stride(0), self.key_SGD.stride(1), self.value_SGD.stride(0), self.value_SGD.stride(1)

    @property
    def precision(self) -> str:
        return "ieee" if self.query_THD.dtype == torch.float32 else "tf32"

    def most(self, share: float) -> int:
        """Keys of a union up to which the kernel that fetches unions serves its tile."""
        return int(share * TILE * self.indices_TK.shape[1])


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
    page_table_BP: Tensor | None = None,
    page_size: int = 64,
    sequence_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q . k * scale) v over the keys named by each row of indices_TK, and the logarithm of the softmax's sum.

    Packed documents need nothing special: their lists name positions among all S keys, and a tile may straddle two of them.

    Args:
        indices_TK: int32 positions into S, each at most once in a row, -1 for none; a row of -1 gives zeros and -inf. With a
            page table they are positions of the query's own sequence.
        scale: above zero.
        unions: `build_unions` of the same lists, where it is at hand already.
        page_table_BP: int32, the page of every page_size positions of each sequence; keys and values are then all slots of
            the cache, and a tile of 16 rows must not straddle two sequences: pad each with rows of -1.
        sequence_N: int32, which row of the page table is each tile's; None: all of row 0.

    Returns:
        output [T, H, D] in the queries' dtype, lse [T, H] float32 (natural logarithm).

    Raises:
        ValueError: tensors or a scale that are not served.
    """
    check_supported(query_THD, key_SGD, value_SGD)
    if not scale > 0:
        raise ValueError(f"sparse_attention serves scales above zero, got {scale}")
    if indices_TK.dtype != torch.int32:
        raise ValueError(f"sparse_attention serves lists in int32, got {indices_TK.dtype}")
    num_positions = key_SGD.shape[0] if page_table_BP is None else page_table_BP.shape[1] * page_size
    call = Call(
        query_THD.contiguous(),
        key_SGD if key_SGD.stride(2) == 1 else key_SGD.contiguous(),
        value_SGD if value_SGD.stride(2) == 1 else value_SGD.contiguous(),
        indices_TK if indices_TK.stride(1) == 1 else indices_TK.contiguous(),
        unions or build_unions(indices_TK, num_positions),
        page_table_BP,
        page_size,
        sequence_N,
        scale * math.log2(math.e),
        torch.empty_like(query_THD, memory_format=torch.contiguous_format),
        torch.empty(query_THD.shape[:2], dtype=torch.float32, device=query_THD.device),
    )
    if query_THD.shape[0]:
        library = cuda_library("sparse_attention") if can_serve_in_cuda(call) else None
        share = TRITON_SHARE if library is None else CUDA_SHARE
        if library is None:
            attend_unions(call, share)
        else:
            attend_unions_in_cuda(library, call, share)
        if call.unions.keys_NU.shape[1] > call.most(share):
            attend_alone(call, share)
    return call.output_THD, call.lse_TH


def sparse_attention(
    query_THD: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    indices_TK: Tensor,
    scale: float,
    unions: Unions | None = None,
    page_table_BP: Tensor | None = None,
    page_size: int = 64,
    sequence_N: Tensor | None = None,
) -> Tensor:
    """See `reference.sparse_attention`, and `sparse_attention_with_lse` for caches in pages."""
    return sparse_attention_with_lse(
        query_THD, key_SGD, value_SGD, indices_TK, scale, unions, page_table_BP, page_size, sequence_N
    )[0]


def can_serve_in_cuda(call: Call) -> bool:
    """Whether sparse_attention.cu takes these shapes; it reads 16 bytes at a time."""
    tensors = (call.query_THD, call.key_SGD, call.value_SGD)
    return (
        call.query_THD.is_cuda
        and call.query_THD.dtype in (torch.bfloat16, torch.float16)
        and call.query_THD.shape[2] in CUDA_WIDTHS
        and call.group >= CUDA_LEAST_GROUP
        and call.page_size & (call.page_size - 1) == 0
        and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
        and all(stride % 8 == 0 for stride in call.strides)
        and max(call.strides[0], call.strides[2]) < 1 << 30
    )


def attend_unions_in_cuda(library: ctypes.CDLL, call: Call, share: float) -> None:
    """Fills output and lse of the tiles whose unions have at most `call.most(share)` keys."""
    num_queries, num_heads, width = call.query_THD.shape
    table = call.page_table_BP
    pointers = [
        call.query_THD,
        call.key_SGD,
        call.value_SGD,
        call.unions.keys_NU,
        call.unions.masks_NU,
        call.unions.counts_N,
        table,
        call.sequence_N,
        call.output_THD,
        call.lse_TH,
    ]
    numbers = [
        num_queries,
        num_heads,
        call.key_SGD.shape[1],
        width,
        int(call.query_THD.dtype == torch.float16),
        call.unions.keys_NU.shape[1],
        call.most(share),
        0 if table is None else table.stride(0),
        call.page_size.bit_length() - 1,
    ]
    status = library.sparse_attention_forward(
        *(ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in pointers),
        *(ctypes.c_longlong(stride * call.key_SGD.element_size()) for stride in call.strides),
        *(ctypes.c_int(number) for number in numbers),
        ctypes.c_float(call.scale_log2),
        ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
    )
    check_launch(status, "sparse_attention")


def attend_unions(call: Call, share: float, config: Config | None = None) -> None:
    """The same in Triton."""
    num_queries, num_heads, width = call.query_THD.shape
    block_heads = min(MAX_HEADS, triton.next_power_of_2(call.group))
    if config is None:
        config = UNION_CONFIG if block_heads == MAX_HEADS else NARROW_CONFIG
        config = FLOAT32_CONFIG if call.query_THD.dtype == torch.float32 else config
    num_tiles, room = call.unions.keys_NU.shape
    # The tile is the fast index: the programs of one KV head run together and find its keys in the cache.
    _attend[(num_tiles, call.key_SGD.shape[1] * triton.cdiv(call.group, block_heads))](
        call.query_THD,
        call.key_SGD,
        call.value_SGD,
        call.unions.keys_NU,
        call.unions.masks_NU,
        call.unions.counts_N,
        *_pages(call),
        call.output_THD,
        call.lse_TH,
        num_queries,
        room,
        call.most(share),
        *call.strides,
        call.scale_log2,
        TILE=TILE,
        HEADS=num_heads,
        GROUP=call.group,
        BLOCK_HEADS=block_heads,
        WIDTH=width,
        BLOCK=config.block,
        PAGE_SIZE=call.page_size if call.page_table_BP is not None else 0,
        PRECISION=call.precision,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.num_registers,
    )


def attend_alone(call: Call, share: float, config: Config | None = None) -> None:
    """Fills output and lse of the tiles whose unions have more than `call.most(share)` keys, query by query."""
    num_queries, num_heads, width = call.query_THD.shape
    num_blocks = call.key_SGD.shape[1] * triton.cdiv(call.group, ALONE_ROWS)
    config = config or (FLOAT32_ALONE_CONFIG if call.query_THD.dtype == torch.float32 else ALONE_CONFIG)
    _attend_alone[(triton.cdiv(num_queries, ALONE_QUERIES), num_blocks)](
        call.query_THD,
        call.key_SGD,
        call.value_SGD,
        call.indices_TK,
        call.unions.counts_N,
        *_pages(call),
        call.output_THD,
        call.lse_TH,
        num_queries,
        call.indices_TK.shape[1],
        call.indices_TK.stride(0),
        call.most(share),
        *call.strides,
        call.scale_log2,
        TILE=TILE,
        QUERIES=ALONE_QUERIES,
        HEADS=num_heads,
        GROUP=call.group,
        ROWS=ALONE_ROWS,
        WIDTH=width,
        ROOM=triton.next_power_of_2(call.indices_TK.shape[1]),
        BLOCK=config.block,
        PAGE_SIZE=call.page_size if call.page_table_BP is not None else 0,
        PRECISION=call.precision,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.num_registers,
    )


def _pages(call: Call) -> tuple[Tensor, Tensor, int, int]:
    """Page table, sequences and their strides for the Triton kernels; where there are none, any pointer and zeros."""
    table, sequence = call.page_table_BP, call.sequence_N
    return (
        call.indices_TK if table is None else table,
        call.indices_TK if sequence is None else sequence,
        0 if table is None or sequence is None else table.stride(0),
        0 if sequence is None else 1,
    )


@triton.jit
def _slots(position, page_table, sequences, tile, table_row, sequence_step, PAGE_SIZE: tl.constexpr):
    """Where keys stand in memory: the positions themselves, or through the page table of the tile's sequence."""
    slot = position.to(tl.int64)
    if PAGE_SIZE > 0:
        sequence = 0
        if sequence_step > 0:
            sequence = tl.load(sequences + tile)
        page = tl.load(page_table + tl.cast(sequence, tl.int64) * table_row + position // PAGE_SIZE)
        slot = page.to(tl.int64) * PAGE_SIZE + position % PAGE_SIZE
    return slot


@triton.jit
def _attend(
    query,
    key,
    value,
    union_keys,
    union_masks,
    union_counts,
    page_table,
    sequences,
    table_row,
    sequence_step,
    output,
    lse,
    num_queries,
    room,
    most,
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
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile and up to 8 heads of one KV head, over the tile's union."""
    tile, block = tl.program_id(0), tl.program_id(1)
    num_blocks: tl.constexpr = (GROUP + BLOCK_HEADS - 1) // BLOCK_HEADS
    group = block // num_blocks
    row = tl.arange(0, TILE * BLOCK_HEADS)
    in_tile = row // BLOCK_HEADS
    in_group = block % num_blocks * BLOCK_HEADS + row % BLOCK_HEADS
    token = (tile * TILE + in_tile).to(tl.int64)
    head = group * GROUP + in_group
    dim = tl.arange(0, WIDTH)
    count = tl.load(union_counts + tile)
    # Tiles of larger unions are another kernel's: here they have no queries and no keys.
    num_queries = tl.where(count <= most, num_queries, 0)
    count = tl.where(count <= most, count, 0)
    is_query = (token < num_queries) & (in_group < GROUP)
    place_MD = (token * HEADS + head)[:, None] * WIDTH + dim[None, :]
    q_MD = tl.load(query + place_MD, mask=is_query[:, None], other=0.0)
    bit_M = 1 << in_tile
    top_M = tl.full([TILE * BLOCK_HEADS], float("-inf"), tl.float32)
    sum_M = tl.zeros([TILE * BLOCK_HEADS], tl.float32)
    acc_MD = tl.zeros([TILE * BLOCK_HEADS, WIDTH], tl.float32)
    keys, masks = union_keys + tile.to(tl.int64) * room, union_masks + tile.to(tl.int64) * room
    # Past the union's end stands its last key again, selected by nobody: memory that no list names is never read.
    last = tl.load(keys + tl.maximum(count - 1, 0), mask=count > 0, other=0)
    lane = tl.arange(0, BLOCK)
    # Positions are read two steps ahead and pages looked up one: the rows of a step then depend on no load of that step, and
    # are fetched in advance.
    slot_N = tl.load(keys + lane, mask=lane < count, other=last)
    slot_N = _slots(slot_N, page_table, sequences, tile, table_row, sequence_step, PAGE_SIZE)
    position_N = tl.load(keys + BLOCK + lane, mask=BLOCK + lane < count, other=last)
    for start in range(0, count, BLOCK):
        bits_N = tl.load(masks + start + lane, mask=start + lane < count, other=0)
        k_ND = tl.load(key + group * key_group + slot_N[:, None] * key_row + dim[None, :])
        s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION)
        s_MN = tl.where((bits_N[None, :] & bit_M[:, None]) != 0, s_MN, float("-inf"))
        new_top_M = tl.maximum(top_M, tl.max(s_MN, 1) * scale_log2)
        # A row that has met none of its keys yet keeps an infinite top; zero stands in, so that no infinity is subtracted.
        safe_M = tl.where(new_top_M == float("-inf"), 0.0, new_top_M)
        p_MN = tl.exp2(s_MN * scale_log2 - safe_M[:, None])
        shrink_M = tl.exp2(top_M - safe_M)
        sum_M = sum_M * shrink_M + tl.sum(p_MN, 1)
        v_ND = tl.load(value + group * value_group + slot_N[:, None] * value_row + dim[None, :])
        slot_N = _slots(position_N, page_table, sequences, tile, table_row, sequence_step, PAGE_SIZE)
        position_N = tl.load(keys + start + 2 * BLOCK + lane, mask=start + 2 * BLOCK + lane < count, other=last)
        acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD * shrink_M[:, None], input_precision=PRECISION)
        top_M = new_top_M
    has_keys = sum_M > 0
    safe_sum_M = tl.where(has_keys, sum_M, 1.0)
    out_MD = acc_MD / safe_sum_M[:, None]
    tl.store(output + place_MD, out_MD.to(output.dtype.element_ty), mask=is_query[:, None])
    lse_M = tl.where(has_keys, (top_M + tl.log2(safe_sum_M)) * 0.6931471805599453, float("-inf"))
    tl.store(lse + token * HEADS + head, lse_M, mask=is_query)


@triton.jit
def _attend_alone(
    query,
    key,
    value,
    indices,
    union_counts,
    page_table,
    sequences,
    table_row,
    sequence_step,
    output,
    lse,
    num_queries,
    num_picked,
    indices_row,
    most,
    key_row,
    key_group,
    value_row,
    value_group,
    scale_log2,
    TILE: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """QUERIES queries of one tile, one after the other, and up to ROWS heads of one KV head, over each query's own list."""
    first, block = tl.program_id(0) * QUERIES, tl.program_id(1)
    tile = first // TILE
    num_blocks: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    group = block // num_blocks
    in_group = block % num_blocks * ROWS + tl.arange(0, ROWS)
    is_head = in_group < GROUP
    head_M = group * GROUP + in_group
    dim = tl.arange(0, WIDTH)
    lane = tl.arange(0, BLOCK)
    end = tl.minimum(first + QUERIES, num_queries)
    if tl.load(union_counts + tile) <= most:
        end = first
    for token in range(first, end):
        place_MD = (tl.cast(token, tl.int64) * HEADS + head_M)[:, None] * WIDTH + dim[None, :]
        q_MD = tl.load(query + place_MD, mask=is_head[:, None], other=0.0)
        top_M = tl.full([ROWS], float("-inf"), tl.float32)
        sum_M = tl.zeros([ROWS], tl.float32)
        acc_MD = tl.zeros([ROWS, WIDTH], tl.float32)
        its_list = indices + tl.cast(token, tl.int64) * indices_row
        entry = tl.arange(0, ROOM)
        # Pads stand for any key of the list, selected by nobody; a list without keys is not walked.
        last = tl.max(tl.load(its_list + entry, mask=entry < num_picked, other=-1), 0)
        length = tl.where(last >= 0, num_picked, 0)
        # As above: positions two steps ahead, pages one.
        position_N = tl.load(its_list + lane, mask=lane < length, other=-1)
        position_N = tl.where(position_N >= 0, position_N, last)
        slot_N = _slots(position_N, page_table, sequences, tile, table_row, sequence_step, PAGE_SIZE)
        position_N = tl.load(its_list + BLOCK + lane, mask=BLOCK + lane < length, other=-1)
        for start in range(0, length, BLOCK):
            is_key = tl.load(its_list + start + lane, mask=start + lane < length, other=-1) >= 0
            k_ND = tl.load(key + group * key_group + slot_N[:, None] * key_row + dim[None, :])
            s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION)
            s_MN = tl.where(is_key[None, :], s_MN, float("-inf"))
            new_top_M = tl.maximum(top_M, tl.max(s_MN, 1) * scale_log2)
            safe_M = tl.where(new_top_M == float("-inf"), 0.0, new_top_M)
            p_MN = tl.exp2(s_MN * scale_log2 - safe_M[:, None])
            shrink_M = tl.exp2(top_M - safe_M)
            sum_M = sum_M * shrink_M + tl.sum(p_MN, 1)
            v_ND = tl.load(value + group * value_group + slot_N[:, None] * value_row + dim[None, :])
            position_N = tl.where(position_N >= 0, position_N, last)
            slot_N = _slots(position_N, page_table, sequences, tile, table_row, sequence_step, PAGE_SIZE)
            position_N = tl.load(its_list + start + 2 * BLOCK + lane, mask=start + 2 * BLOCK + lane < length, other=-1)
            acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD * shrink_M[:, None], input_precision=PRECISION)
            top_M = new_top_M
        has_keys = sum_M > 0
        safe_sum_M = tl.where(has_keys, sum_M, 1.0)
        out_MD = acc_MD / safe_sum_M[:, None]
        tl.store(output + place_MD, out_MD.to(output.dtype.element_ty), mask=is_head[:, None])
        lse_M = tl.where(has_keys, (top_M + tl.log2(safe_sum_M)) * 0.6931471805599453, float("-inf"))
        tl.store(lse + tl.cast(token, tl.int64) * HEADS + head_M, lse_M, mask=is_head)
