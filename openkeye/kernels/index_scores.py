"""The lightning indexer's scores on any CUDA GPU, in Triton: every head's product, ReLU, gate and sum without leaving the chip.

Twin: `reference.index_scores`. Letters: T queries, S keys, J indexer heads, I indexer width, M keys and N query-heads of a
program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTHS = (16, 32, 64, 128)
KEY_BLOCK = 128
ROWS = 128
# queries x heads of a program: the keys are fetched once for all of them


def index_scores(
    query_TJI: Tensor, gates_TJ: Tensor, key_SI: Tensor, query_positions_T: Tensor, out_TS: Tensor | None = None
) -> Tensor:
    """I[t, s] = sum_j gate[t, j] relu(q[t, j] . k[s]) for s <= position t (report, DSA equations), float32 [T, S].

    Columns beyond a query's position are not written: whoever reads a row stops there.

    Args:
        query_TJI, key_SI: bfloat16, float16 or float32, alike; gates already scaled by I ** -0.5.
        query_positions_T: int32 or int64, index of each query among the keys.
        out_TS: where to write, with rows of any stride; None makes a new tensor.

    Raises:
        ValueError: a width or number of heads that is not served.
    """
    num_queries, num_heads, width = query_TJI.shape
    num_keys = key_SI.shape[0]
    if width not in WIDTHS or num_heads & (num_heads - 1) or num_heads > ROWS:
        raise ValueError(
            f"index_scores serves widths of 16, 32, 64 or 128 and a power of two of heads up to {ROWS}, got {num_heads} heads "
            f"of {width}"
        )
    if query_TJI.dtype != key_SI.dtype or key_SI.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"index_scores serves bfloat16, float16 and float32 alike, got {query_TJI.dtype} and {key_SI.dtype}")
    if out_TS is None:
        out_TS = torch.empty(num_queries, num_keys, dtype=torch.float32, device=key_SI.device)
    block_queries = max(1, ROWS // num_heads)
    grid = (triton.cdiv(num_keys, KEY_BLOCK), triton.cdiv(num_queries, block_queries))
    _score[grid](
        query_TJI.contiguous(),
        gates_TJ.contiguous(),
        key_SI,
        query_positions_T,
        out_TS,
        num_queries,
        num_keys,
        key_SI.stride(0),
        out_TS.stride(0),
        HEADS=num_heads,
        WIDTH=width,
        BLOCK_QUERIES=block_queries,
        KEY_BLOCK=KEY_BLOCK,
        PRECISION="ieee" if key_SI.dtype == torch.float32 else "tf32",
        num_warps=8,
        num_stages=2,
    )
    return out_TS


@triton.jit
def _score(
    query,
    gates,
    key,
    positions,
    out,
    num_queries,
    num_keys,
    key_row,
    out_row,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first_key = tl.program_id(0) * KEY_BLOCK
    token = tl.program_id(1) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    is_query = token < num_queries
    position = tl.load(positions + token, mask=is_query, other=-1)
    # Nothing above the diagonal is computed: such a program ends before its first product.
    if first_key <= tl.max(position, 0):
        row = tl.program_id(1) * BLOCK_QUERIES * HEADS + tl.arange(0, BLOCK_QUERIES * HEADS)
        is_row = row < num_queries * HEADS
        dim = tl.arange(0, WIDTH)
        column = first_key + tl.arange(0, KEY_BLOCK)
        is_key = column < num_keys
        q_NI = tl.load(query + row.to(tl.int64)[:, None] * WIDTH + dim[None, :], mask=is_row[:, None], other=0.0)
        k_MI = tl.load(key + column.to(tl.int64)[:, None] * key_row + dim[None, :], mask=is_key[:, None], other=0.0)
        gate_N = tl.load(gates + row, mask=is_row, other=0.0).to(tl.float32)
        # Keys as rows: the heads of a query then lie side by side, and their sum stays inside a thread.
        products_MN = tl.dot(k_MI, tl.trans(q_NI), input_precision=PRECISION)
        weighed_MN = tl.maximum(products_MN, 0.0) * gate_N[None, :]
        scores_MQ = tl.sum(tl.reshape(weighed_MN, (KEY_BLOCK, BLOCK_QUERIES, HEADS)), 2)
        is_visible = is_query[None, :] & is_key[:, None] & (column[:, None] <= position[None, :])
        tl.store(out + token.to(tl.int64)[None, :] * out_row + column[:, None], scores_MQ, mask=is_visible)
