"""The grouped matrix products of `experts` in Triton: rows of one expert after the other, each times its expert's matrix.

The first product ends in SiLU(gate) * up, so that only its result is written; the second writes a row for each pick, and the
rows are added in the order of the picks: the same bits on every run. Tiles come from `expert_routes`, so that nothing waits for
the host. Weights may be e4m3 bytes: a tile is widened on its way to the matrix unit and scales are applied to finished sums, so
that answering few tokens reads half the bytes.

Letters: T tokens, K picked experts, E experts, D model width, F expert width, R rows (T * K picks, sorted by expert); in
kernels M rows, N columns and K depth of a tile.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from openkeye.kernels.expert_routes import Routes

FP8 = torch.float8_e4m3fn
NUM_PROGRAMS = 396
# three for each SM of the largest GPU that this is tuned for: a few tokens' first product is split in depth up to this many
MAX_SPLITS = 4


@dataclass(frozen=True)
class Tiles:
    """How one product is cut, and its launch options."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# By product, a choice for each number of rows; of two for one number the first is for few rows an expert. `gate_up` holds two
# tiles of its columns, one of gates and one of ups. Few rows take deeper tiles of e4m3, whose bytes then come in whole lines of
# the cache. `matrix_gradients` cuts an expert's matrix and has the picked rows as depth; which rows those are is loaded a stage
# earlier.
HOPPER_TILES = {
    "gate_up": (
        Tiles(16, 64, 64, 4, 4),
        Tiles(16, 128, 64, 4, 3),
        Tiles(32, 64, 64, 4, 4),
        Tiles(64, 64, 64, 4, 4),
        Tiles(128, 128, 32, 8, 5),
    ),
    "gate_up e4m3": (
        Tiles(16, 64, 128, 4, 3),
        Tiles(32, 64, 128, 4, 4),
        Tiles(64, 64, 64, 4, 4),
        Tiles(128, 128, 64, 8, 4),
    ),
    "down": (Tiles(16, 128, 128, 4, 3), Tiles(32, 128, 64, 4, 4), Tiles(64, 128, 64, 4, 4), Tiles(128, 256, 64, 8, 4)),
    "down e4m3": (Tiles(16, 64, 128, 4, 5), Tiles(32, 128, 128, 4, 4), Tiles(64, 128, 64, 4, 4), Tiles(128, 128, 64, 4, 3)),
    "activation_gradients": (
        Tiles(16, 64, 64, 4, 4),
        Tiles(32, 64, 64, 4, 4),
        Tiles(64, 128, 64, 4, 4),
        Tiles(128, 128, 64, 8, 4),
    ),
    "matrix_gradients": (Tiles(128, 256, 64, 8, 5),),
}
# At most 99 KiB of shared memory a program.
AMPERE_TILES = {
    "gate_up": (Tiles(16, 64, 64, 4, 4), Tiles(32, 64, 64, 4, 4), Tiles(64, 64, 64, 4, 3), Tiles(128, 64, 64, 8, 4)),
    "gate_up e4m3": (Tiles(16, 64, 128, 4, 4), Tiles(32, 64, 128, 4, 4), Tiles(64, 64, 64, 4, 3), Tiles(128, 64, 64, 8, 4)),
    "down": (Tiles(16, 64, 64, 4, 4), Tiles(32, 128, 64, 4, 4), Tiles(64, 128, 64, 4, 3), Tiles(128, 128, 64, 8, 4)),
    "down e4m3": (Tiles(16, 64, 128, 4, 4), Tiles(32, 128, 128, 4, 4), Tiles(64, 128, 64, 4, 3), Tiles(128, 128, 64, 8, 4)),
    "activation_gradients": (
        Tiles(16, 64, 64, 4, 4),
        Tiles(32, 64, 64, 4, 4),
        Tiles(64, 128, 64, 4, 3),
        Tiles(128, 128, 64, 8, 4),
    ),
    "matrix_gradients": (Tiles(128, 128, 32, 8, 4),),
}
# fp32 runs on the CUDA cores: small tiles that fit the registers.
FLOAT32_TILES = (Tiles(16, 32, 32, 4, 2), Tiles(32, 32, 32, 4, 2))
FEW_ROWS = 4
# of an expert, on average


def choose_block_rows(num_rows: int, num_experts: int, dtype: torch.dtype) -> int:
    """Rows of a tile: about what an expert gets, so that its weights are read once and few rows are empty."""
    share = num_rows / max(1, min(num_experts, num_rows))
    if dtype == torch.float32:
        return 16 if share <= 16 else 32
    return 16 if share <= 16 else 32 if share <= 32 else 64 if share <= 96 else 128


def takes_large_tiles(device: torch.device) -> bool:
    """True for GPUs whose programs may have 227 KiB of shared memory: compute capability 9 and 10."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def choose_tiles(product: str, routes: Routes, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> Tiles:
    """The measured choice for one product over these routes, with weights in the tokens' dtype or in fp8."""
    table = HOPPER_TILES if takes_large_tiles(routes.order_R.device) else AMPERE_TILES
    name = f"{product} e4m3" if weight_dtype == FP8 else product
    choices = FLOAT32_TILES if dtype == torch.float32 else table[name]
    fitting = [tiles for tiles in choices if tiles.rows == routes.block_rows] or choices[-1:]
    is_few = routes.is_each_alone or routes.order_R.shape[0] <= FEW_ROWS * routes.ends_E.shape[0]
    return fitting[0] if is_few else fitting[-1]


def project_and_activate(
    x_TD: Tensor,
    gate_up_EDF: Tensor,
    scale_EF: Tensor | None,
    routes: Routes,
    num_picked: int,
    keeps_projections: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """SiLU(x G_e) * (x U_e) of every row, [R, F], and where asked for the products themselves, [R, 2F]."""
    depth, width = x_TD.shape[1], gate_up_EDF.shape[2] // 2
    num_rows = routes.order_R.shape[0]
    tiles = choose_tiles("gate_up", routes, x_TD.dtype, gate_up_EDF.dtype)
    num_programs = routes.tile_experts_N.shape[0] * triton.cdiv(width, tiles.columns)
    num_splits = 1 if keeps_projections else max(1, min(MAX_SPLITS, NUM_PROGRAMS // num_programs, depth // tiles.depth))
    activated = x_TD.new_empty(num_rows, width)
    projections = None
    if num_splits > 1:
        projections = torch.empty(num_splits, num_rows, 2 * width, dtype=torch.float32, device=x_TD.device)
    elif keeps_projections:
        projections = x_TD.new_empty(num_rows, 2 * width)
    _gate_up[(num_programs * num_splits,)](
        x_TD,
        _bytes(gate_up_EDF),
        gate_up_EDF if scale_EF is None else scale_EF,
        routes.order_R,
        routes.ends_E,
        routes.tile_experts_N,
        routes.tile_rows_N,
        activated,
        activated if projections is None else projections,
        num_rows,
        *gate_up_EDF.stride(),
        PICKED=num_picked,
        DEPTH=depth,
        WIDTH=width,
        SPLITS=num_splits,
        KEEPS=keeps_projections,
        **_constants(tiles, routes, gate_up_EDF, x_TD),
    )
    if num_splits == 1:
        return activated, projections
    _activate[(num_rows, triton.cdiv(width, 256))](
        projections, activated, num_rows, WIDTH=width, BLOCK=256, SPLITS=num_splits, num_warps=2
    )
    return activated, None


def project_rows(rows_RF: Tensor, weight_EFD: Tensor, scale_ED: Tensor | None, routes: Routes) -> Tensor:
    """Each row times its expert's matrix [F, D] of any strides, at its pick's place: [T * K, D]."""
    depth, width = weight_EFD.shape[1:]
    tiles = choose_tiles("down", routes, rows_RF.dtype, weight_EFD.dtype)
    picks = rows_RF.new_empty(rows_RF.shape[0], width)
    _project_rows[(routes.tile_experts_N.shape[0] * triton.cdiv(width, tiles.columns),)](
        rows_RF,
        _bytes(weight_EFD),
        weight_EFD if scale_ED is None else scale_ED,
        routes.order_R,
        routes.ends_E,
        routes.tile_experts_N,
        routes.tile_rows_N,
        picks,
        depth,
        *weight_EFD.stride(),
        DEPTH=depth,
        WIDTH=width,
        **_constants(tiles, routes, weight_EFD, rows_RF),
    )
    return picks


def _bytes(weight: Tensor) -> Tensor:
    """Weights as the kernels take them: e4m3 as bytes, which every GPU can load."""
    return weight.view(torch.uint8) if weight.dtype == FP8 else weight


def _constants(tiles: Tiles, routes: Routes, weight: Tensor, x: Tensor) -> dict[str, int | bool | str]:
    """What both products' kernels are told alike."""
    return {
        "BLOCK_ROWS": routes.block_rows,
        "BLOCK_COLUMNS": tiles.columns,
        "BLOCK_DEPTH": tiles.depth,
        "IS_ALONE": routes.is_each_alone,
        "IS_E4M3": weight.dtype == FP8,
        "IS_COMPILED": x.is_cuda,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def add_picks(picks_RD: Tensor, num_picked: int, weights_TK: Tensor | None) -> Tensor:
    """Sum over each token's picks, in their order and in fp32, weighted where there are weights: [T, D]."""
    num_picks, width = picks_RD.shape
    output = picks_RD.new_empty(num_picks // num_picked, width)
    block = min(1024, triton.next_power_of_2(width))
    _add_picks[(output.shape[0], triton.cdiv(width, block))](
        picks_RD,
        picks_RD if weights_TK is None else weights_TK.contiguous(),
        output,
        PICKED=num_picked,
        WIDTH=width,
        BLOCK=block,
        IS_WEIGHTED=weights_TK is not None,
        num_warps=4,
    )
    return output


@triton.jit
def load_tile(pointers, mask, IS_WHOLE: tl.constexpr):
    """A tile; where the shapes say that all of it exists, without a mask."""
    return tl.load(pointers) if IS_WHOLE else tl.load(pointers, mask=mask, other=0)


# Four e4m3 numbers of one register into two of bfloat16: sign and the other seven bits to where bfloat16 has them, and 2^120
# makes up for the exponents' biases (7 and 127). Exact, subnormal numbers too.
WIDEN_E4M3 = tl.constexpr("""{
    .reg .b32 first, second, low, high, factor, zero;
    mov.b32 factor, 0x7b807b80;
    mov.b32 zero, 0x80008000;
    prmt.b32 first, $2, 0, 0x1404;
    prmt.b32 second, $2, 0, 0x3424;
    shr.b32 low, first, 4;
    shr.b32 high, second, 4;
    and.b32 low, low, 0x07f007f0;
    and.b32 high, high, 0x07f007f0;
    lop3.b32 low, first, 0x80008000, low, 0xea;
    lop3.b32 high, second, 0x80008000, high, 0xea;
    fma.rn.bf16x2 $0, low, factor, zero;
    fma.rn.bf16x2 $1, high, factor, zero;
}""")


@triton.jit
def _widen(weights_KN, dtype: tl.constexpr, IS_E4M3: tl.constexpr, IS_COMPILED: tl.constexpr):
    """A tile of weights in the tokens' dtype. The interpreter, which runs no assembly, does the same in steps."""
    if IS_E4M3:
        if IS_COMPILED:
            weights_KN = tl.inline_asm_elementwise(WIDEN_E4M3, "=r,=r,r", [weights_KN], tl.bfloat16, is_pure=True, pack=4)
        else:
            codes_KN = weights_KN.to(tl.uint32)
            bits_KN = ((codes_KN & 0x80) << 24) | ((codes_KN & 0x7F) << 20)
            weights_KN = bits_KN.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return weights_KN.to(dtype)


@triton.jit
def _gate_up(
    x,
    weight,
    scales,
    order,
    ends,
    tile_experts,
    tile_rows,
    activated,
    projections,
    num_rows,
    weight_expert,
    weight_depth,
    weight_column,
    PICKED: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    KEEPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    IS_ALONE: tl.constexpr,
    IS_E4M3: tl.constexpr,
    IS_COMPILED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Neighbouring programs share their rows and read an expert's columns side by side: its weights come from memory once."""
    num_blocks: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    span: tl.constexpr = (DEPTH + BLOCK_DEPTH * SPLITS - 1) // (BLOCK_DEPTH * SPLITS) * BLOCK_DEPTH
    IS_DEEP: tl.constexpr = DEPTH % BLOCK_DEPTH == 0
    IS_WHOLE: tl.constexpr = IS_DEEP and WIDTH % BLOCK_COLUMNS == 0
    block = tl.program_id(0) % num_blocks
    split = tl.program_id(0) // num_blocks % SPLITS
    tile = tl.program_id(0) // (num_blocks * SPLITS)
    expert = tl.load(tile_experts + tile).to(tl.int64)
    if expert < 0:
        return
    end = tl.load(ends + (tile if IS_ALONE else expert))
    row_M = tl.load(tile_rows + tile) + tl.arange(0, BLOCK_ROWS)
    # Beyond the expert's last row that row stands in: what it gives is not stored.
    token_M = (tl.load(order + tl.minimum(row_M, end - 1)) // PICKED).to(tl.int64)
    column_N = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_column_N = column_N < WIDTH
    depth_K = tl.arange(0, BLOCK_DEPTH)
    first = split * span
    x_MK = x + token_M[:, None] * DEPTH + (first + depth_K)[None, :]
    gate_KN = weight + expert * weight_expert + (first + depth_K)[:, None] * weight_depth + column_N[None, :] * weight_column
    gate_MN = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    up_MN = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(first, tl.minimum(first + span, DEPTH), BLOCK_DEPTH):
        is_depth_K = start + depth_K < DEPTH
        is_weight_KN = is_depth_K[:, None] & is_column_N[None, :]
        rows_MK = load_tile(x_MK, is_depth_K[None, :], IS_DEEP)
        gates_KN = load_tile(gate_KN, is_weight_KN, IS_WHOLE)
        ups_KN = load_tile(gate_KN + WIDTH * weight_column, is_weight_KN, IS_WHOLE)
        gate_MN = tl.dot(rows_MK, _widen(gates_KN, rows_MK.dtype, IS_E4M3, IS_COMPILED), gate_MN, input_precision=PRECISION)
        up_MN = tl.dot(rows_MK, _widen(ups_KN, rows_MK.dtype, IS_E4M3, IS_COMPILED), up_MN, input_precision=PRECISION)
        x_MK += BLOCK_DEPTH
        gate_KN += BLOCK_DEPTH * weight_depth
    if IS_E4M3:
        scale_N = scales + expert * 2 * WIDTH + column_N
        gate_MN *= tl.load(scale_N, mask=is_column_N, other=0.0)[None, :]
        up_MN *= tl.load(scale_N + WIDTH, mask=is_column_N, other=0.0)[None, :]
    is_stored = (row_M < end)[:, None] & is_column_N[None, :]
    if SPLITS > 1 or KEEPS:
        place_M = (split * num_rows + row_M).to(tl.int64) * (2 * WIDTH)
        place_MN = projections + place_M[:, None] + column_N[None, :]
        tl.store(place_MN, gate_MN.to(projections.dtype.element_ty), mask=is_stored)
        tl.store(place_MN + WIDTH, up_MN.to(projections.dtype.element_ty), mask=is_stored)
    if SPLITS == 1:
        silu_MN = gate_MN * tl.sigmoid(gate_MN) * up_MN
        place_MN = activated + row_M.to(tl.int64)[:, None] * WIDTH + column_N[None, :]
        tl.store(place_MN, silu_MN.to(activated.dtype.element_ty), mask=is_stored)


@triton.jit
def _activate(projections, activated, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """SiLU(gate) * up of the splits' sums."""
    row = tl.program_id(0).to(tl.int64)
    column_N = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column_N = column_N < WIDTH
    gate_N = tl.zeros([BLOCK], tl.float32)
    up_N = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        place_N = projections + (split * num_rows + row) * (2 * WIDTH) + column_N
        gate_N += tl.load(place_N, mask=is_column_N, other=0.0)
        up_N += tl.load(place_N + WIDTH, mask=is_column_N, other=0.0)
    silu_N = gate_N * tl.sigmoid(gate_N) * up_N
    tl.store(activated + row * WIDTH + column_N, silu_N.to(activated.dtype.element_ty), mask=is_column_N)


@triton.jit
def _project_rows(
    rows,
    weight,
    scales,
    order,
    ends,
    tile_experts,
    tile_rows,
    picks,
    depth,
    weight_expert,
    weight_depth,
    weight_column,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    IS_ALONE: tl.constexpr,
    IS_E4M3: tl.constexpr,
    IS_COMPILED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_blocks: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    IS_DEEP: tl.constexpr = DEPTH % BLOCK_DEPTH == 0
    IS_WHOLE: tl.constexpr = IS_DEEP and WIDTH % BLOCK_COLUMNS == 0
    block = tl.program_id(0) % num_blocks
    tile = tl.program_id(0) // num_blocks
    expert = tl.load(tile_experts + tile).to(tl.int64)
    if expert < 0:
        return
    end = tl.load(ends + (tile if IS_ALONE else expert))
    row_M = tl.load(tile_rows + tile) + tl.arange(0, BLOCK_ROWS)
    safe_M = tl.minimum(row_M, end - 1)
    column_N = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_column_N = column_N < WIDTH
    depth_K = tl.arange(0, BLOCK_DEPTH)
    row_MK = rows + safe_M.to(tl.int64)[:, None] * DEPTH + depth_K[None, :]
    weight_KN = weight + expert * weight_expert + depth_K[:, None] * weight_depth + column_N[None, :] * weight_column
    sum_MN = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    # A bound that the compiler does not know keeps the loop rolled.
    for start in range(0, depth, BLOCK_DEPTH):
        is_depth_K = start + depth_K < DEPTH
        rows_MK = load_tile(row_MK, is_depth_K[None, :], IS_DEEP)
        weights_KN = load_tile(weight_KN, is_depth_K[:, None] & is_column_N[None, :], IS_WHOLE)
        sum_MN = tl.dot(rows_MK, _widen(weights_KN, rows_MK.dtype, IS_E4M3, IS_COMPILED), sum_MN, input_precision=PRECISION)
        row_MK += BLOCK_DEPTH
        weight_KN += BLOCK_DEPTH * weight_depth
    if IS_E4M3:
        sum_MN *= tl.load(scales + expert * WIDTH + column_N, mask=is_column_N, other=0.0)[None, :]
    pick_M = tl.load(order + safe_M).to(tl.int64)
    place_MN = picks + pick_M[:, None] * WIDTH + column_N[None, :]
    tl.store(place_MN, sum_MN.to(picks.dtype.element_ty), mask=(row_M < end)[:, None] & is_column_N[None, :])


@triton.jit
def _add_picks(
    picks, weights, output, PICKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, IS_WEIGHTED: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column_N = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column_N = column_N < WIDTH
    sum_N = tl.zeros([BLOCK], tl.float32)
    for pick in tl.static_range(PICKED):
        place = token * PICKED + pick
        if IS_WEIGHTED:
            # A pick that weighs nothing may be another rank's, which nobody wrote here.
            weight = tl.load(weights + place).to(tl.float32)
            is_read_N = is_column_N & (weight + tl.zeros([BLOCK], tl.float32) != 0.0)
            sum_N += tl.load(picks + place * WIDTH + column_N, mask=is_read_N, other=0.0).to(tl.float32) * weight
        else:
            sum_N += tl.load(picks + place * WIDTH + column_N, mask=is_column_N, other=0.0).to(tl.float32)
    tl.store(output + token * WIDTH + column_N, sum_N.to(output.dtype.element_ty), mask=is_column_N)
