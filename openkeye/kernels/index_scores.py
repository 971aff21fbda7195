"""The lightning indexer's scores on any CUDA GPU, in Triton: every head's product, ReLU, gate and sum without leaving the chip.

Twin: `reference.index_scores`. Letters: T queries, S keys, J indexer heads, I indexer width, M keys and N query-heads of a
program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from openkeye.kernels.quantize import e4m3_half

WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
KEY_BLOCK = 128
ROWS = 128
# queries x heads of a program: the keys are fetched once for all of them
LEAST_FP8_WIDTH = 32
# that matrix units multiply in e4m3; below it float16 does, as exactly


def check_supported(query_TJI: Tensor, key_SI: Tensor, key_scales_S: Tensor | None) -> None:
    """Raises ValueError with one sentence where these tensors are not served."""
    num_heads, width = query_TJI.shape[1:]
    if width not in WIDTHS or num_heads & (num_heads - 1) or num_heads > ROWS:
        raise ValueError(
            f"index_scores serves widths of 16, 32, 64 or 128 and a power of two of heads up to {ROWS}, got {num_heads} heads "
            f"of {width}"
        )
    if query_TJI.dtype != key_SI.dtype or key_SI.dtype not in DTYPES:
        raise ValueError(
            f"index_scores serves bfloat16, float16, float32 and float8_e4m3fn, queries and keys alike, got {query_TJI.dtype} "
            f"and {key_SI.dtype}"
        )
    if (key_SI.dtype == torch.float8_e4m3fn) != (key_scales_S is not None):
        raise ValueError(f"index_scores takes key_scales_S with keys in float8_e4m3fn and only then, got {key_SI.dtype}")


def index_scores(
    query_TJI: Tensor,
    gates_TJ: Tensor,
    key_SI: Tensor,
    query_positions_T: Tensor,
    out_TS: Tensor | None = None,
    first_keys_T: Tensor | None = None,
    key_scales_S: Tensor | None = None,
    top_k: int = 0,
    gaps: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """I[t, s] = sum_j gate[t, j] relu(q[t, j] . k[s]) for the keys a query may see (report, DSA equations), float32 [T, S].

    Column c of a row is the c-th key that the query sees from first_keys[t] on; columns beyond are not written: whoever reads a
    row stops there. Rows that see at most top_k keys may stay unwritten altogether.

    Args:
        query_TJI, key_SI: bfloat16, float16, float32 or e4m3, alike; gates already scaled by I ** -0.5, and by the queries'
            scales where those are e4m3.
        query_positions_T: int32 or int64, index of each query among the keys.
        out_TS: where to write, with rows of any stride that hold what a query may see; None makes a new tensor.
        first_keys_T: where each query's document begins, of query_positions' dtype; None: at 0.
        key_scales_S: float32, of keys in e4m3.
        gaps: starts and ends [T] of keys before its own that a query does not see, equal where it sees all; None: no gaps.

    Raises:
        ValueError: a width, number of heads or dtype that is not served.
    """
    check_supported(query_TJI, key_SI, key_scales_S)
    num_queries, num_heads, width = query_TJI.shape
    num_keys = key_SI.shape[0]
    is_e4m3 = key_SI.dtype == torch.float8_e4m3fn
    if out_TS is None:
        out_TS = torch.empty(num_queries, num_keys, dtype=torch.float32, device=key_SI.device)
    block_queries = max(1, ROWS // num_heads)
    query, key = query_TJI.contiguous(), key_SI
    if is_e4m3:
        query, key = query.view(torch.uint8), key.view(torch.uint8)
    grid = (triton.cdiv(num_keys, KEY_BLOCK), triton.cdiv(num_queries, block_queries))
    _score[grid](
        query,
        gates_TJ.contiguous(),
        key,
        query_positions_T if key_scales_S is None else key_scales_S,
        query_positions_T,
        query_positions_T if first_keys_T is None else first_keys_T,
        *(gaps or (query_positions_T, query_positions_T)),
        out_TS,
        num_queries,
        num_keys,
        key_SI.stride(0),
        out_TS.stride(0),
        top_k,
        HEADS=num_heads,
        WIDTH=width,
        BLOCK_QUERIES=block_queries,
        KEY_BLOCK=KEY_BLOCK,
        IS_E4M3=is_e4m3,
        HAS_FP8=is_e4m3 and has_fp8(key_SI.device) and width >= LEAST_FP8_WIDTH,
        HAS_FIRST=first_keys_T is not None,
        HAS_GAPS=gaps is not None,
        PRECISION="ieee" if key_SI.dtype == torch.float32 else "tf32",
        num_warps=8,
        num_stages=2,
    )
    return out_TS


def has_fp8(device: torch.device) -> bool:
    """True where the matrix units multiply e4m3 (compute capability 8.9 and up); elsewhere float16 does, exactly."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def _score(
    query,
    gates,
    key,
    scales,
    positions,
    firsts,
    gap_starts,
    gap_ends,
    out,
    num_queries,
    num_keys,
    key_row,
    out_row,
    top_k,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    IS_E4M3: tl.constexpr,
    HAS_FP8: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_GAPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first_key = tl.program_id(0) * KEY_BLOCK
    token = tl.program_id(1) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    is_query = token < num_queries
    position = tl.load(positions + token, mask=is_query, other=-1).to(tl.int32)
    first = tl.zeros([BLOCK_QUERIES], tl.int32)
    if HAS_FIRST:
        first = tl.load(firsts + token, mask=is_query, other=0).to(tl.int32)
    gap_start = tl.zeros([BLOCK_QUERIES], tl.int32)
    gap_end = tl.zeros([BLOCK_QUERIES], tl.int32)
    if HAS_GAPS:
        gap_start = tl.load(gap_starts + token, mask=is_query, other=0).to(tl.int32)
        gap_end = tl.load(gap_ends + token, mask=is_query, other=0).to(tl.int32)
    num_before = first + gap_end - gap_start
    # What nobody sees, or only rows that take all they see, is not computed: such a program ends before its first product.
    is_wanted = (first_key <= position) & (first_key + KEY_BLOCK > first) & (position - num_before >= top_k)
    is_wanted &= (first_key < gap_start) | (first_key + KEY_BLOCK > gap_end)
    if tl.max(is_wanted.to(tl.int32), 0) > 0:
        row = tl.program_id(1) * BLOCK_QUERIES * HEADS + tl.arange(0, BLOCK_QUERIES * HEADS)
        is_row = row < num_queries * HEADS
        dim = tl.arange(0, WIDTH)
        column = first_key + tl.arange(0, KEY_BLOCK)
        is_key = column < num_keys
        q_NI = tl.load(query + row.to(tl.int64)[:, None] * WIDTH + dim[None, :], mask=is_row[:, None], other=0)
        k_MI = tl.load(key + column.to(tl.int64)[:, None] * key_row + dim[None, :], mask=is_key[:, None], other=0)
        gate_N = tl.load(gates + row, mask=is_row, other=0.0).to(tl.float32)
        # Keys as rows: the heads of a query then lie side by side, and their sum stays inside a thread.
        if HAS_FP8:
            products_MN = tl.dot(k_MI.to(tl.float8e4nv, bitcast=True), tl.trans(q_NI.to(tl.float8e4nv, bitcast=True)))
        elif IS_E4M3:
            # Both sides are 2^-8 of what they stand for.
            products_MN = tl.dot(e4m3_half(k_MI), tl.trans(e4m3_half(q_NI))) * 65536.0
        else:
            products_MN = tl.dot(k_MI, tl.trans(q_NI), input_precision=PRECISION)
        weighed_MN = tl.maximum(products_MN, 0.0) * gate_N[None, :]
        scores_MQ = tl.sum(tl.reshape(weighed_MN, (KEY_BLOCK, BLOCK_QUERIES, HEADS)), 2)
        if IS_E4M3:
            scores_MQ *= tl.load(scales + column, mask=is_key, other=0.0)[:, None]
        is_visible = is_query[None, :] & is_key[:, None] & (column[:, None] <= position[None, :])
        is_visible &= column[:, None] >= first[None, :]
        left_out_MQ = first[None, :]
        if HAS_GAPS:
            is_visible &= (column[:, None] < gap_start[None, :]) | (column[:, None] >= gap_end[None, :])
            left_out_MQ = tl.where(column[:, None] < gap_end[None, :], left_out_MQ, num_before[None, :])
        place_MQ = token.to(tl.int64)[None, :] * out_row + (column[:, None] - left_out_MQ)
        tl.store(out + place_MQ, scores_MQ, mask=is_visible)
