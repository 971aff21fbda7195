"""Gradients of the indexer's queries, gates and keys from those of its scores, in Triton.

I[t, s] = sum_j gate[t, j] relu(q[t, j] . k[s]): products are made anew, and the queries' gradient stays in registers while the
keys go by. Letters as in `indexer_loss`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from openkeye.kernels.ordered_adds import OrderedAdds
from openkeye.kernels.unions import TILE, Unions

WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float32)
ROWS = 128
# queries x indexer heads of a program
KEY_BLOCK = 64


def check_indexer(index_query_TJI: Tensor, gates_TJ: Tensor, index_key_SI: Tensor) -> None:
    """Raises ValueError with one sentence where these tensors are not served."""
    num_queries, num_heads, width = index_query_TJI.shape
    if width not in WIDTHS or num_heads & (num_heads - 1) or not num_heads <= ROWS:
        raise ValueError(
            f"the indexer's loss serves widths of 16, 32, 64 or 128 and a power of two of heads up to {ROWS}, got {num_heads} "
            f"heads of {width}"
        )
    if index_query_TJI.dtype != index_key_SI.dtype or index_key_SI.dtype not in DTYPES:
        raise ValueError(
            f"the indexer's loss serves bfloat16 and float32 alike, got {index_query_TJI.dtype} and {index_key_SI.dtype}"
        )
    if gates_TJ.shape != (num_queries, num_heads) or index_key_SI.shape[1] != width:
        raise ValueError(
            f"the indexer's loss got queries {tuple(index_query_TJI.shape)}, gates {tuple(gates_TJ.shape)} and keys "
            f"{tuple(index_key_SI.shape)}"
        )


class IndexerGradients:
    """Gradients of the indexer's queries, gates and keys, as they come together."""

    def __init__(self, index_query_TJI: Tensor, gates_TJ: Tensor, index_key_SI: Tensor) -> None:
        self.query, self.gates, self.key = index_query_TJI.contiguous(), gates_TJ.contiguous(), index_key_SI
        self.num_keys, self.width = index_key_SI.shape
        self.num_heads = gates_TJ.shape[1]
        self.query_gradient = torch.empty_like(self.query)
        self.gate_gradient = torch.empty(gates_TJ.shape, dtype=torch.float32, device=gates_TJ.device)
        self.key_gradient = torch.zeros(self.num_keys, self.width, dtype=torch.float32, device=gates_TJ.device)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the dtypes of what they are gradients of."""
        return self.query_gradient, self.gate_gradient.to(self.gates.dtype), self.key_gradient.to(self.key.dtype)

    def _shape(self) -> dict[str, int | str]:
        precision = "ieee" if self.key.dtype == torch.float32 else "tf32"
        return {"HEADS": self.num_heads, "WIDTH": self.width, "PRECISION": precision}

    def add_dense(
        self,
        differences_RS: Tensor,
        rows: slice,
        positions_R: Tensor,
        first_keys_R: Tensor,
        gaps: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Those of a slab of queries, from the gradient with respect to their scores."""
        block_queries = ROWS // self.num_heads
        query, gates, num_rows = self.query[rows], self.gates[rows], positions_R.shape[0]
        its_gaps = gaps or (positions_R, positions_R)
        _learn[(triton.cdiv(num_rows, block_queries), 1)](
            query,
            gates,
            self.key,
            differences_RS,
            positions_R,
            first_keys_R,
            *its_gaps,
            positions_R,
            positions_R,
            positions_R,
            self.query_gradient[rows],
            self.gate_gradient[rows],
            self.key_gradient,
            self.key_gradient,
            positions_R,
            0,
            0,
            num_rows,
            self.num_keys,
            0,
            differences_RS.stride(0),
            self.key.stride(0),
            **self._shape(),
            TILE=TILE,
            BLOCK_QUERIES=block_queries,
            BLOCK=KEY_BLOCK,
            IS_SELECTED=False,
            HAS_GAPS=gaps is not None,
            KEEPS_PARTS=False,
            num_warps=8,
            num_stages=4,
        )
        starts = torch.arange(0, self.num_keys, KEY_BLOCK, device=positions_R.device, dtype=positions_R.dtype)
        # The rows that may see a block of keys: from the first that ends behind its start to the last that begins before its
        # end, in whatever order positions come.
        begins = torch.searchsorted(positions_R.cummax(0).values, starts)
        ends = torch.searchsorted(first_keys_R.flip(0).cummin(0).values.flip(0).contiguous(), starts + KEY_BLOCK)
        _learn_keys[(starts.shape[0],)](
            query,
            gates,
            self.key,
            differences_RS,
            positions_R,
            first_keys_R,
            *its_gaps,
            begins,
            ends,
            self.key_gradient,
            num_rows,
            self.num_keys,
            differences_RS.stride(0),
            self.key.stride(0),
            **self._shape(),
            BLOCK_QUERIES=block_queries,
            BLOCK=KEY_BLOCK,
            HAS_GAPS=gaps is not None,
            num_warps=4,
            num_stages=5,
        )

    def add_selected(self, differences_TK: Tensor, unions: Unions, is_deterministic: bool) -> None:
        """Those of the selected keys, from the gradient with respect to their scores in the order of the lists."""
        block_queries = min(TILE, ROWS // self.num_heads)
        num_tiles, room = unions.keys_NU.shape
        num_parts = TILE // block_queries
        shape = torch.Size((self.num_keys, 1, self.width))
        adds = OrderedAdds(unions, shape, 1, num_parts) if is_deterministic else None
        for first_row in adds.first_rows_of_rounds if adds else (0,):
            _learn[(num_tiles, num_parts)](
                self.query,
                self.gates,
                self.key,
                differences_TK,
                *[unions.counts_N] * 4,
                unions.keys_NU,
                unions.masks_NU,
                unions.counts_N,
                self.query_gradient,
                self.gate_gradient,
                self.key_gradient,
                adds.parts if adds else self.key_gradient,
                adds.first_rows if adds else unions.counts_N,
                first_row,
                adds.num_rows if adds else 0,
                self.query.shape[0],
                self.num_keys,
                room,
                differences_TK.stride(0),
                self.key.stride(0),
                **self._shape(),
                TILE=TILE,
                BLOCK_QUERIES=block_queries,
                BLOCK=KEY_BLOCK,
                IS_SELECTED=True,
                HAS_GAPS=False,
                KEEPS_PARTS=is_deterministic,
                num_warps=8 if block_queries * self.num_heads == ROWS else 4,
                num_stages=3,
            )
            if adds:
                adds.add(first_row, (self.key_gradient.unsqueeze(1),))


@triton.jit
def _learn(
    index_query,
    gates,
    index_key,
    differences,
    positions,
    first_keys,
    gap_starts,
    gap_ends,
    union_keys,
    union_masks,
    union_counts,
    query_gradient,
    gate_gradient,
    key_gradient,
    parts,
    first_rows,
    first_row,
    num_rows,
    num_queries,
    num_keys,
    room,
    slab_row,
    key_row,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_SELECTED: tl.constexpr,
    HAS_GAPS: tl.constexpr,
    KEEPS_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a few queries and their gates, from those of their scores, over visible keys or over a union.

    Over a union the keys' gradients come along; over visible keys `_learn_keys` makes them, without atomic adds.
    """
    part = tl.program_id(1)
    if IS_SELECTED:
        tile = tl.program_id(0)
        first_token = tile * TILE + part * BLOCK_QUERIES
        begin, end = 0, tl.load(union_counts + tile)
        if KEEPS_PARTS:
            part_row = tl.load(first_rows + tile) - first_row
            # A tile of another round has no keys and no queries: it walks nothing and stores nothing.
            end = tl.where((part_row >= 0) & (part_row < num_rows), end, 0)
            num_queries = tl.where((part_row >= 0) & (part_row < num_rows), num_queries, 0)
        union_keys += tile.to(tl.int64) * room
        union_masks += tile.to(tl.int64) * room
    else:
        first_token = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_QUERIES
    token_B = first_token + tl.arange(0, BLOCK_QUERIES)
    if not IS_SELECTED:
        last_B = tl.load(positions + token_B, mask=token_B < num_queries, other=-1).to(tl.int32)
        first_B = tl.load(first_keys + token_B, mask=token_B < num_queries, other=num_keys).to(tl.int32)
        if HAS_GAPS:
            gap_start_B = tl.load(gap_starts + token_B, mask=token_B < num_queries, other=0)
            gap_end_B = tl.load(gap_ends + token_B, mask=token_B < num_queries, other=0)
        begin, end = tl.min(first_B, 0) // BLOCK * BLOCK, tl.minimum(tl.max(last_B, 0) + 1, num_keys)
    row = tl.arange(0, BLOCK_QUERIES * HEADS)
    place_M = first_token.to(tl.int64) * HEADS + row
    is_row = place_M < num_queries.to(tl.int64) * HEADS
    dim = tl.arange(0, WIDTH)
    q_MI = tl.load(index_query + place_M[:, None] * WIDTH + dim[None, :], mask=is_row[:, None], other=0.0)
    gate_M = tl.load(gates + place_M, mask=is_row, other=0.0).to(tl.float32)
    dq_MI = tl.zeros([BLOCK_QUERIES * HEADS, WIDTH], tl.float32)
    dgate_M = tl.zeros([BLOCK_QUERIES * HEADS], tl.float32)
    met_B = tl.zeros([BLOCK_QUERIES], tl.int32)
    for start in range(begin, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        if IS_SELECTED:
            is_key = column < end
            key_N = tl.load(union_keys + column, mask=is_key, other=0).to(tl.int64)
            bits_N = tl.load(union_masks + column, mask=is_key, other=0)
            is_chosen_BN = (bits_N[None, :] >> (part * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES))[:, None]) & 1
            place_BN = met_B[:, None] + tl.cumsum(is_chosen_BN, 1) - 1
            is_seen_BN = (is_chosen_BN != 0) & (token_B < num_queries)[:, None]
            met_B += tl.sum(is_chosen_BN, 1)
        else:
            is_key = column < num_keys
            key_N = column.to(tl.int64)
            place_BN = column[None, :]
            is_seen_BN = (column[None, :] <= last_B[:, None]) & (column[None, :] >= first_B[:, None]) & is_key[None, :]
            if HAS_GAPS:
                is_seen_BN &= (column[None, :] < gap_start_B[:, None]) | (column[None, :] >= gap_end_B[:, None])
        k_NI = tl.load(index_key + key_N[:, None] * key_row + dim[None, :], mask=is_key[:, None], other=0.0)
        d_BN = tl.load(differences + token_B.to(tl.int64)[:, None] * slab_row + place_BN, mask=is_seen_BN, other=0.0)
        s_MN = tl.dot(q_MI, tl.trans(k_NI), input_precision=PRECISION)
        spread = tl.broadcast_to(d_BN[:, None, :], (BLOCK_QUERIES, HEADS, BLOCK))
        d_MN = tl.where(s_MN > 0, tl.reshape(spread, (BLOCK_QUERIES * HEADS, BLOCK)), 0.0)
        dgate_M += tl.sum(d_MN * s_MN, 1)
        ds_MN = (d_MN * gate_M[:, None]).to(q_MI.dtype)
        dq_MI = tl.dot(ds_MN, k_NI, dq_MI, input_precision=PRECISION)
        if IS_SELECTED:
            dk_NI = tl.dot(tl.trans(ds_MN), q_MI, input_precision=PRECISION)
            if KEEPS_PARTS:
                place_NI = ((part_row + column) * (TILE // BLOCK_QUERIES) + part)[:, None] * WIDTH + dim[None, :]
                tl.store(parts + place_NI, dk_NI, mask=is_key[:, None])
            else:
                place_NI = key_N[:, None] * WIDTH + dim[None, :]
                tl.atomic_add(key_gradient + place_NI, dk_NI, mask=is_key[:, None], sem="relaxed")
    dq = dq_MI.to(query_gradient.dtype.element_ty)
    tl.store(query_gradient + place_M[:, None] * WIDTH + dim[None, :], dq, mask=is_row[:, None])
    tl.store(gate_gradient + place_M, dgate_M, mask=is_row)


@triton.jit
def _learn_keys(
    index_query,
    gates,
    index_key,
    differences,
    positions,
    first_keys,
    gap_starts,
    gap_ends,
    begins,
    ends,
    key_gradient,
    num_queries,
    num_keys,
    slab_row,
    key_row,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_GAPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of a block of keys from all queries of a slab that see it, added to that of the slabs before."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_key = column < num_keys
    begin = tl.load(begins + tl.program_id(0)).to(tl.int32) // BLOCK_QUERIES * BLOCK_QUERIES
    end = tl.load(ends + tl.program_id(0)).to(tl.int32)
    if begin < end:
        dim = tl.arange(0, WIDTH)
        k_NI = tl.load(index_key + column.to(tl.int64)[:, None] * key_row + dim[None, :], mask=is_key[:, None], other=0.0)
        place_NI = column[:, None] * WIDTH + dim[None, :]
        dk_NI = tl.load(key_gradient + place_NI, mask=is_key[:, None], other=0.0)
        for start in range(begin, end, BLOCK_QUERIES):
            token_B = start + tl.arange(0, BLOCK_QUERIES)
            is_query = token_B < num_queries
            last_B = tl.load(positions + token_B, mask=is_query, other=-1).to(tl.int32)
            first_B = tl.load(first_keys + token_B, mask=is_query, other=num_keys).to(tl.int32)
            place_M = start * HEADS + tl.arange(0, BLOCK_QUERIES * HEADS)
            is_row = place_M < num_queries * HEADS
            q_MI = tl.load(index_query + place_M[:, None] * WIDTH + dim[None, :], mask=is_row[:, None], other=0.0)
            gate_M = tl.load(gates + place_M, mask=is_row, other=0.0).to(tl.float32)
            is_seen_NB = (column[:, None] <= last_B[None, :]) & (column[:, None] >= first_B[None, :]) & is_key[:, None]
            if HAS_GAPS:
                gap_start_B = tl.load(gap_starts + token_B, mask=is_query, other=0)
                gap_end_B = tl.load(gap_ends + token_B, mask=is_query, other=0)
                is_seen_NB &= (column[:, None] < gap_start_B[None, :]) | (column[:, None] >= gap_end_B[None, :])
            place_NB = token_B.to(tl.int64)[None, :] * slab_row + column[:, None]
            d_NB = tl.load(differences + place_NB, mask=is_seen_NB, other=0.0)
            s_NM = tl.dot(k_NI, tl.trans(q_MI), input_precision=PRECISION)
            spread = tl.broadcast_to(d_NB[:, :, None], (BLOCK, BLOCK_QUERIES, HEADS))
            d_NM = tl.where(s_NM > 0, tl.reshape(spread, (BLOCK, BLOCK_QUERIES * HEADS)), 0.0)
            ds_NM = (d_NM * gate_M[None, :]).to(q_MI.dtype)
            dk_NI = tl.dot(ds_NM, q_MI, dk_NI, input_precision=PRECISION)
        tl.store(key_gradient + place_NI, dk_NI, mask=is_key[:, None])
