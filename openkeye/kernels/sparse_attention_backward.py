"""Gradients of `sparse_attention` on any CUDA GPU, in Triton, and the attention probabilities that the indexer learns from.

A tile of 16 queries walks its union again: probabilities are made anew from the log-sum-exp of the forward pass, the queries'
gradient stays in registers, and the products with keys contract queries and heads at once, so that a key's gradient leaves the
chip once a tile and not once a query. Letters as in `sparse_attention`; U room of a tile's union, N tiles, P programs of a tile
(one for up to 8 heads of a KV head).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from openkeye.kernels.ordered_adds import SLAB_BYTES, OrderedAdds
from openkeye.kernels.sparse_attention import MAX_HEADS, check_supported, sparse_attention_with_lse
from openkeye.kernels.unions import TILE, Unions, build_unions


@dataclass(frozen=True)
class Schedule:
    """How one launch of the backward kernel walks the unions."""

    block: int
    # keys of a step
    num_warps: int
    num_stages: int
    keys_are_rows: bool = False
    # of the scores: their transpose then needs no way through shared memory for keys and values, but one for the queries
    makes_queries: bool = True
    makes_keys: bool = True
    max_registers: int | None = None
    # of a thread: fewer let two programs share an SM


# Keys are fetched in two steps, their numbers first: only with five stages has a fetch a whole step's time and is not waited
# for behind the adds of the step before.
SCHEDULES: dict[str, tuple[Schedule, ...]] = {
    "rows 16": (Schedule(16, 8, 1),),
    # for float32, whose tiles are twice as large
    "rows 32": (Schedule(32, 8, 2),),
    # for GPUs with 99 KiB of shared memory
    "rows 32 deep": (Schedule(32, 8, 5),),
    "rows 64": (Schedule(64, 8, 5),),
    "rows 64 shallow": (Schedule(64, 8, 3),),
    "rows 64 wide": (Schedule(64, 16, 5),),
    "keys 64": (Schedule(64, 8, 5, keys_are_rows=True),),
    "split 64": (Schedule(64, 8, 5, makes_keys=False), Schedule(64, 4, 1, keys_are_rows=True, makes_queries=False)),
    "split 32": (
        Schedule(32, 8, 3, makes_keys=False, max_registers=128),
        Schedule(64, 8, 5, keys_are_rows=True, makes_queries=False),
    ),
}


class Gradients(NamedTuple):
    """What `sparse_attention_backward` returns."""

    query_THD: Tensor
    key_SGD: Tensor
    value_SGD: Tensor
    probabilities_TK: Tensor | None


def default_schedule(device: torch.device, dtype: torch.dtype) -> str:
    """The fastest schedule that fits the device."""
    if dtype == torch.float32:
        return "rows 16"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9:
        return "rows 64"
    return "rows 32"


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
    top_k: int | None = None,
    schedule: str | None = None,
    key_gradient_dtype: torch.dtype = torch.float32,
) -> Gradients:
    """Gradients of queries [T, H, D] (their dtype), keys and values [S, G, D], and what the indexer learns from.

    Args:
        unions, output_THD, lse_TH: of the forward pass.
        is_deterministic: the same bits on every run. Otherwise tiles add to a key's gradient in whatever order they finish;
            with it their parts are kept (at most slab_bytes at a time, at least one tile's) and added tile after tile.
        top_k: K of the lists, to have the attention probability of every selected key as well, summed over all heads, in
            the same pass: float32 [T, K] in the order of ascending keys, zeros at the end of rows with fewer keys, the same
            bits on every run; None makes none.
        schedule: a name in SCHEDULES; None takes the device's own.
        key_gradient_dtype: of keys' and values' gradients. bfloat16 halves what is added through memory and rounds at every
            addition: about 1% of error where hundreds of queries share a key.

    Raises:
        ValueError: unsupported tensors, an unknown schedule, or a deterministic mode that is asked to add in bfloat16.
    """
    check_supported(query_THD, key_SGD, value_SGD)
    name = schedule or default_schedule(query_THD.device, query_THD.dtype)
    if name not in SCHEDULES:
        raise ValueError(f"sparse_attention_backward has the schedules {', '.join(SCHEDULES)}, got {name!r}")
    if is_deterministic and key_gradient_dtype != torch.float32:
        raise ValueError(f"sparse_attention_backward adds in float32 where it is deterministic, got {key_gradient_dtype}")
    num_keys, num_groups, width = key_SGD.shape
    walk = _Walk(query_THD, key_SGD, value_SGD, unions, output_THD, lse_TH, output_gradient_THD, scale, top_k)
    query_gradient = torch.empty_like(walk.query)
    key_gradient, value_gradient = (
        torch.zeros(num_keys, num_groups, width, dtype=key_gradient_dtype, device=key_SGD.device) for _ in range(2)
    )
    if not is_deterministic:
        for launch in SCHEDULES[name]:
            walk.run(launch, query_gradient, key_gradient, value_gradient)
    else:
        _add_in_order(walk, SCHEDULES[name], query_gradient, key_gradient, value_gradient, slab_bytes)
    probabilities = None if walk.sums is None else walk.sums.sum(dim=0)
    return Gradients(query_gradient, key_gradient, value_gradient, probabilities)


class _Walk:
    """Inputs of all launches of one backward pass."""

    def __init__(
        self,
        query_THD: Tensor,
        key_SGD: Tensor,
        value_SGD: Tensor,
        unions: Unions,
        output_THD: Tensor,
        lse_TH: Tensor,
        output_gradient_THD: Tensor,
        scale: float,
        top_k: int | None,
    ) -> None:
        self.query, self.output_gradient = query_THD.contiguous(), output_gradient_THD.contiguous()
        self.key, self.value, self.unions, self.scale = key_SGD, value_SGD, unions, scale
        self.num_queries, self.num_heads, self.width = query_THD.shape
        self.num_groups = key_SGD.shape[1]
        self.group = self.num_heads // self.num_groups
        # Rows of float32 are twice as wide: half as many keep within 99 KiB of shared memory.
        most_heads = MAX_HEADS // 2 if query_THD.dtype == torch.float32 else MAX_HEADS
        self.block_heads = min(most_heads, triton.next_power_of_2(self.group))
        self.is_full = self.block_heads == most_heads
        self.num_programs = self.num_groups * triton.cdiv(self.group, self.block_heads)
        self.num_tiles, self.room = unions.keys_NU.shape
        self.top_k = top_k or 0
        device = query_THD.device
        self.sums = torch.zeros(self.num_programs, self.num_queries, top_k, device=device) if top_k else None
        rows = self.num_tiles * self.num_programs * TILE * self.block_heads
        self.lse_log2, self.delta = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
        self.empty = self.delta.new_empty(0)
        _prepare[(self.num_tiles, self.num_programs)](
            output_THD.contiguous(),
            self.output_gradient,
            lse_TH.contiguous(),
            self.lse_log2,
            self.delta,
            self.num_queries,
            **self._shape(),
            num_warps=4,
        )

    def _shape(self) -> dict[str, int]:
        return {
            "TILE": TILE,
            "HEADS": self.num_heads,
            "GROUPS": self.num_groups,
            "GROUP": self.group,
            "BLOCK_HEADS": self.block_heads,
            "WIDTH": self.width,
        }

    def run(
        self,
        launch: Schedule,
        query_gradient: Tensor,
        key_gradient: Tensor,
        value_gradient: Tensor,
        adds: OrderedAdds | None = None,
        first_row: int = 0,
    ) -> None:
        """One launch; with `adds`, of the tiles of the round that begins at first_row."""
        limit = {} if launch.max_registers is None else {"maxnreg": launch.max_registers}
        is_summed = self.sums is not None and launch.makes_queries
        _attend_backward[(self.num_tiles, self.num_programs)](
            self.query,
            self.key,
            self.value,
            self.unions.keys_NU,
            self.unions.masks_NU,
            self.unions.counts_N,
            self.lse_log2,
            self.delta,
            self.output_gradient,
            query_gradient,
            key_gradient,
            value_gradient,
            self.empty if self.sums is None else self.sums,
            self.empty if adds is None else adds.parts,
            self.unions.counts_N if adds is None else adds.first_rows,
            first_row,
            0 if adds is None else adds.num_rows,
            0 if adds is None else adds.parts.shape[1],
            self.num_queries,
            self.room,
            self.top_k,
            self.key.stride(0),
            self.key.stride(1),
            self.value.stride(0),
            self.value.stride(1),
            self.scale,
            self.scale * math.log2(math.e),
            **self._shape(),
            BLOCK=launch.block,
            KEYS_ARE_ROWS=launch.keys_are_rows,
            MAKES_QUERIES=launch.makes_queries,
            MAKES_KEYS=launch.makes_keys,
            MAKES_SUMS=is_summed,
            KEEPS_PARTS=adds is not None,
            PRECISION="ieee" if self.query.dtype == torch.float32 else "tf32",
            num_warps=launch.num_warps if self.is_full else 4,
            num_stages=launch.num_stages,
            **limit,
        )


def _add_in_order(
    walk: _Walk,
    launches: tuple[Schedule, ...],
    query_gradient: Tensor,
    key_gradient: Tensor,
    value_gradient: Tensor,
    slab_bytes: int,
) -> None:
    """All launches, with the parts of the keys' gradients added tile after tile."""
    adds = OrderedAdds(walk.unions, key_gradient.shape, 2, walk.num_programs, slab_bytes)
    # The launches that make no keys need no slab.
    for launch in launches:
        if not launch.makes_keys:
            walk.run(launch, query_gradient, key_gradient, value_gradient)
    for first_row in adds.first_rows_of_rounds:
        for launch in launches:
            if launch.makes_keys:
                walk.run(launch, query_gradient, key_gradient, value_gradient, adds, first_row)
        adds.add(first_row, (key_gradient, value_gradient))


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
        made = sparse_attention_backward(
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
        return made.query_THD, made.key_SGD.to(key.dtype), made.value_SGD.to(value.dtype), None, None, None


def summed_probabilities(
    query_THD: Tensor, key_SGD: Tensor, unions: Unions, lse_TH: Tensor, top_k: int, scale: float
) -> Tensor:
    """exp(q . k * scale - lse) of every selected key, summed over all heads, float32 [T, K] in the order of ascending keys.

    With the log-sum-exp of the selection it is what `sparse_attention_backward` makes on its way; with another, such as that
    of all visible keys, it is another weighting of the heads. Rows with fewer than K keys end in zeros.
    """
    check_supported(query_THD, key_SGD, key_SGD)
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
def _prepare(
    output,
    output_gradient,
    lse,
    lse_log2,
    delta,
    num_queries,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """delta = sum of output x its gradient, and the log-sum-exp in base 2, in the order in which the programs hold their rows.

    Rows that hold no query, and queries that selected nothing, get an infinite sum: their probabilities come out as zero.
    """
    tile, program = tl.program_id(0), tl.program_id(1)
    programs_per_group: tl.constexpr = (GROUP + BLOCK_HEADS - 1) // BLOCK_HEADS
    row = tl.arange(0, TILE * BLOCK_HEADS)
    in_group = program % programs_per_group * BLOCK_HEADS + row % BLOCK_HEADS
    token = (tile * TILE + row // BLOCK_HEADS).to(tl.int64)
    place_M = token * HEADS + program // programs_per_group * GROUP + in_group
    is_query = (token < num_queries) & (in_group < GROUP)
    place_MD = place_M[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    o_MD = tl.load(output + place_MD, mask=is_query[:, None], other=0.0).to(tl.float32)
    do_MD = tl.load(output_gradient + place_MD, mask=is_query[:, None], other=0.0).to(tl.float32)
    lse_M = tl.load(lse + place_M, mask=is_query, other=float("inf"))
    lse_M = tl.where(lse_M == float("-inf"), float("inf"), lse_M * 1.4426950408889634)
    out = (tile.to(tl.int64) * GROUPS * programs_per_group + program) * TILE * BLOCK_HEADS + row
    tl.store(lse_log2 + out, lse_M)
    tl.store(delta + out, tl.sum(o_MD * do_MD, 1))


@triton.jit
def _store_sums(sums, sum_QN, bits_N, met_Q, program, first_token, num_queries, top_k, TILE: tl.constexpr):
    """Each query's sums at its keys' places in its own list; returns how many keys of its list each query has met."""
    query_Q = tl.arange(0, TILE)
    is_chosen_QN = (bits_N[None, :] >> query_Q[:, None]) & 1
    rank_QN = met_Q[:, None] + tl.cumsum(is_chosen_QN, 1) - 1
    token_Q = first_token + query_Q
    line_Q = (program.to(tl.int64) * num_queries + token_Q) * top_k
    tl.store(sums + line_Q[:, None] + rank_QN, sum_QN, mask=(is_chosen_QN != 0) & (token_Q < num_queries)[:, None])
    return met_Q + tl.sum(is_chosen_QN, 1)


@triton.jit
def _attend_backward(
    query,
    key,
    value,
    union_keys,
    union_masks,
    union_counts,
    lse_log2,
    delta,
    output_gradient,
    query_gradient,
    key_gradient,
    value_gradient,
    sums,
    parts,
    first_rows,
    first_row,
    num_rows,
    part_rows,
    num_queries,
    room,
    top_k,
    key_row,
    key_group,
    value_row,
    value_group,
    scale,
    scale_log2,
    TILE: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS_ARE_ROWS: tl.constexpr,
    MAKES_QUERIES: tl.constexpr,
    MAKES_KEYS: tl.constexpr,
    MAKES_SUMS: tl.constexpr,
    KEEPS_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, program = tl.program_id(0), tl.program_id(1)
    programs_per_group: tl.constexpr = (GROUP + BLOCK_HEADS - 1) // BLOCK_HEADS
    num_programs: tl.constexpr = GROUPS * programs_per_group
    num_rows_of_tile: tl.constexpr = TILE * BLOCK_HEADS
    count = tl.load(union_counts + tile)
    if KEEPS_PARTS:
        part_row = tl.load(first_rows + tile) - first_row
        # A tile of another round has no keys and no queries: it walks nothing and stores nothing.
        count = tl.where((part_row >= 0) & (part_row < num_rows), count, 0)
        num_queries = tl.where((part_row >= 0) & (part_row < num_rows), num_queries, 0)
    group = program // programs_per_group
    row = tl.arange(0, num_rows_of_tile)
    in_tile = row // BLOCK_HEADS
    first_head = group * GROUP + program % programs_per_group * BLOCK_HEADS
    is_query = (tile * TILE + in_tile < num_queries) & (program % programs_per_group * BLOCK_HEADS + row % BLOCK_HEADS < GROUP)
    dim = tl.arange(0, WIDTH)
    # Offsets within a tile fit 32 bits; the tile's own place is added to the pointers.
    tile_place = (tile.to(tl.int64) * TILE * HEADS + first_head) * WIDTH
    place_MD = (in_tile * HEADS + row % BLOCK_HEADS)[:, None] * WIDTH + dim[None, :]
    q_MD = tl.load(query + tile_place + place_MD, mask=is_query[:, None], other=0.0)
    do_MD = tl.load(output_gradient + tile_place + place_MD, mask=is_query[:, None], other=0.0)
    lse_log2 += (tile.to(tl.int64) * num_programs + program) * num_rows_of_tile
    delta += (tile.to(tl.int64) * num_programs + program) * num_rows_of_tile
    union_keys += tile.to(tl.int64) * room
    union_masks += tile.to(tl.int64) * room
    key += group * key_group
    value += group * value_group
    if MAKES_QUERIES:
        dq_MD = tl.zeros([num_rows_of_tile, WIDTH], tl.float32)
    met_Q = tl.zeros([TILE], tl.int32)
    for start in range(0, count, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_key = column < count
        key_N = tl.load(union_keys + column, mask=is_key, other=0).to(tl.int64)
        bits_N = tl.load(union_masks + column, mask=is_key, other=0)
        k_ND = tl.load(key + key_N[:, None] * key_row + dim[None, :], mask=is_key[:, None], other=0.0)
        v_ND = tl.load(value + key_N[:, None] * value_row + dim[None, :], mask=is_key[:, None], other=0.0)
        # Read anew in every step, from the nearest cache: they would hold up to 64 registers.
        lse_M = tl.load(lse_log2 + row)
        delta_M = tl.load(delta + row)
        if KEEPS_PARTS:
            place_ND = ((part_row + column) * num_programs + program)[:, None] * WIDTH + dim[None, :]
        else:
            place_ND = (key_N * GROUPS + group)[:, None] * WIDTH + dim[None, :]
        if KEYS_ARE_ROWS:
            s_NM = tl.dot(k_ND, tl.trans(q_MD), input_precision=PRECISION)
            is_chosen = ((bits_N[:, None] >> in_tile[None, :]) & 1) != 0
            p_NM = tl.where(is_chosen, tl.exp2(s_NM * scale_log2 - lse_M[None, :]), 0.0)
            dp_NM = tl.dot(v_ND, tl.trans(do_MD), input_precision=PRECISION)
            ds_NM = (p_NM * (dp_NM - delta_M[None, :])).to(q_MD.dtype)
            p_half_NM = p_NM.to(do_MD.dtype)
            if MAKES_SUMS:
                sum_QN = tl.trans(tl.sum(tl.reshape(p_NM, (BLOCK, TILE, BLOCK_HEADS)), 2))
            if MAKES_QUERIES:
                dq_MD = tl.dot(tl.trans(ds_NM), k_ND, dq_MD, input_precision=PRECISION)
        else:
            s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION)
            is_chosen = ((bits_N[None, :] >> in_tile[:, None]) & 1) != 0
            p_MN = tl.where(is_chosen, tl.exp2(s_MN * scale_log2 - lse_M[:, None]), 0.0)
            dp_MN = tl.dot(do_MD, tl.trans(v_ND), input_precision=PRECISION)
            ds_MN = (p_MN * (dp_MN - delta_M[:, None])).to(q_MD.dtype)
            if MAKES_SUMS:
                sum_QN = tl.sum(tl.reshape(p_MN, (TILE, BLOCK_HEADS, BLOCK)), 1)
            if MAKES_QUERIES:
                dq_MD = tl.dot(ds_MN, k_ND, dq_MD, input_precision=PRECISION)
            if MAKES_KEYS:
                ds_NM, p_half_NM = tl.trans(ds_MN), tl.trans(p_MN.to(do_MD.dtype))
        if MAKES_SUMS:
            met_Q = _store_sums(sums, sum_QN, bits_N, met_Q, program, tile * TILE, num_queries, top_k, TILE)
        if MAKES_KEYS:
            dv_ND = tl.dot(p_half_NM, do_MD, input_precision=PRECISION)
            if KEEPS_PARTS:
                tl.store(parts + tl.cast(part_rows, tl.int64) * num_programs * WIDTH + place_ND, dv_ND, mask=is_key[:, None])
            else:
                dv_ND = dv_ND.to(value_gradient.dtype.element_ty)
                tl.atomic_add(value_gradient + place_ND, dv_ND, mask=is_key[:, None], sem="relaxed")
            dk_ND = tl.dot(ds_NM, q_MD, input_precision=PRECISION) * scale
            if KEEPS_PARTS:
                tl.store(parts + place_ND, dk_ND, mask=is_key[:, None])
            else:
                dk_ND = dk_ND.to(key_gradient.dtype.element_ty)
                tl.atomic_add(key_gradient + place_ND, dk_ND, mask=is_key[:, None], sem="relaxed")
    if MAKES_QUERIES:
        dq = (dq_MD * scale).to(query_gradient.dtype.element_ty)
        tl.store(query_gradient + tile_place + place_MD, dq, mask=is_query[:, None])


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
    programs_per_group: tl.constexpr = (GROUP + BLOCK_HEADS - 1) // BLOCK_HEADS
    row = tl.arange(0, TILE * BLOCK_HEADS)
    in_tile = row // BLOCK_HEADS
    dim = tl.arange(0, WIDTH)
    count = tl.load(union_counts + tile)
    first = tile.to(tl.int64) * room
    met_Q = tl.zeros([TILE], tl.int32)
    for start in range(0, count, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_key = column < count
        key_N = tl.load(union_keys + first + column, mask=is_key, other=0).to(tl.int64)
        bits_N = tl.load(union_masks + first + column, mask=is_key, other=0)
        sum_QN = tl.zeros([TILE, BLOCK], tl.float32)
        for program in range(NUM_BLOCKS):
            group = program // programs_per_group
            in_group = program % programs_per_group * BLOCK_HEADS + row % BLOCK_HEADS
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
        met_Q = _store_sums(sums, sum_QN, bits_N, met_Q, tile * 0, tile * TILE, num_queries, top_k, TILE)
