"""Gradients of `experts` on any CUDA GPU, in Triton. The same bits on every run: no sum is left to the order of programs.

The forward pass keeps each row's gate and up, whose product is the dear one; everything after it is made anew. A pick's weight
gets its gradient as <output gradient D_e^T, activation>, which the activations' gradients need in any case, so that no pick's
output row is kept. Letters as in `expert_products`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from openkeye.kernels.expert_products import add_picks, choose_tiles, load_tile, project_rows
from openkeye.kernels.expert_routes import Routes


def experts_backward(
    output_gradient_TD: Tensor,
    x_TD: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    weights_TK: Tensor,
    projections_RF: Tensor,
    routes: Routes,
    needed: tuple[bool, ...] = (True, True, True, True),
) -> tuple[Tensor | None, ...]:
    """Gradients of x_TD, gate_up_EDF, down_EFD and weights_TK, each in its dtype; None where `needed` says so.

    Args:
        projections_RF: [R, 2F], kept by `run_experts`.
        routes: of the forward pass.
    """
    num_picked = weights_TK.shape[1]
    x, output_gradient = x_TD.contiguous(), output_gradient_TD.contiguous()
    projection_gradients, weighted, weight_gradients = _activation_gradients(
        output_gradient, down_EFD, weights_TK.contiguous(), projections_RF, routes
    )
    x_gradient = gate_up_gradient = down_gradient = None
    if needed[0]:
        rows = project_rows(projection_gradients, gate_up_EDF.transpose(1, 2), None, routes)
        x_gradient = add_picks(rows, num_picked, None)
    if needed[1]:
        gate_up_gradient = _matrix_gradients(x, projection_gradients, routes, num_picked, left_gathers=True)
    if needed[2]:
        down_gradient = _matrix_gradients(weighted, output_gradient, routes, num_picked, left_gathers=False)
    return x_gradient, gate_up_gradient, down_gradient, weight_gradients.to(weights_TK.dtype) if needed[3] else None


def _activation_gradients(
    output_gradient_TD: Tensor, down_EFD: Tensor, weights_TK: Tensor, projections_RF: Tensor, routes: Routes
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gates and ups [R, 2F], activations times their picks' weights [R, F], gradients of the weights [T, K]."""
    width, depth = down_EFD.shape[1:]
    num_rows = projections_RF.shape[0]
    tiles = choose_tiles("activation_gradients", routes, projections_RF.dtype)
    num_blocks = triton.cdiv(width, tiles.columns)
    gradients = torch.empty_like(projections_RF)
    weighted = projections_RF.new_empty(num_rows, width)
    # A part of a weight's gradient for every block of columns, added in their order.
    parts = torch.empty(num_blocks, num_rows, dtype=torch.float32, device=projections_RF.device)
    _differentiate[(routes.tile_experts_N.shape[0] * num_blocks,)](
        output_gradient_TD,
        down_EFD,
        routes.order_R,
        routes.ends_E,
        routes.tile_experts_N,
        routes.tile_rows_N,
        projections_RF,
        weights_TK,
        gradients,
        weighted,
        parts,
        num_rows,
        depth,
        *down_EFD.stride(),
        PICKED=weights_TK.shape[1],
        DEPTH=depth,
        WIDTH=width,
        BLOCK_ROWS=routes.block_rows,
        BLOCK_COLUMNS=tiles.columns,
        BLOCK_DEPTH=tiles.depth,
        PRECISION="ieee" if projections_RF.dtype == torch.float32 else "tf32",
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return gradients, weighted, parts.sum(dim=0).view_as(weights_TK)


def _matrix_gradients(left: Tensor, right: Tensor, routes: Routes, num_picked: int, left_gathers: bool) -> Tensor:
    """left^T right over the rows of each expert, [E, M, N]; one of the two is [T, .] and gathered, the other [R, .]."""
    num_experts, height, width = routes.ends_E.shape[0], left.shape[1], right.shape[1]
    tiles = choose_tiles("matrix_gradients", routes, left.dtype)
    gradients = left.new_empty(num_experts, height, width)
    num_blocks = triton.cdiv(height, tiles.rows) * triton.cdiv(width, tiles.columns)
    _contract_rows[(num_experts * num_blocks,)](
        left,
        right,
        routes.order_R,
        routes.ends_E,
        gradients,
        PICKED=num_picked,
        HEIGHT=height,
        WIDTH=width,
        BLOCK_HEIGHT=tiles.rows,
        BLOCK_WIDTH=tiles.columns,
        BLOCK_ROWS=tiles.depth,
        LEFT_GATHERS=left_gathers,
        PRECISION="ieee" if left.dtype == torch.float32 else "tf32",
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return gradients


@triton.jit
def _differentiate(
    output_gradient,
    down,
    order,
    ends,
    tile_experts,
    tile_rows,
    projections,
    weights,
    gradients,
    weighted,
    parts,
    num_rows,
    depth,
    down_expert,
    down_row,
    down_column,
    PICKED: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The output's gradient back through the second projection, the pick's weight and SiLU(gate) * up."""
    num_blocks: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    IS_DEEP: tl.constexpr = DEPTH % BLOCK_DEPTH == 0
    IS_WHOLE: tl.constexpr = IS_DEEP and WIDTH % BLOCK_COLUMNS == 0
    block = tl.program_id(0) % num_blocks
    tile = tl.program_id(0) // num_blocks
    expert = tl.load(tile_experts + tile).to(tl.int64)
    if expert < 0:
        return
    end = tl.load(ends + expert)
    row_M = tl.load(tile_rows + tile) + tl.arange(0, BLOCK_ROWS)
    pick_M = tl.load(order + tl.minimum(row_M, end - 1))
    column_N = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_column_N = column_N < WIDTH
    depth_K = tl.arange(0, BLOCK_DEPTH)
    y_MK = output_gradient + (pick_M // PICKED).to(tl.int64)[:, None] * DEPTH + depth_K[None, :]
    down_KN = down + expert * down_expert + depth_K[:, None] * down_column + column_N[None, :] * down_row
    gradient_MN = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, depth, BLOCK_DEPTH):
        is_depth_K = start + depth_K < DEPTH
        rows_MK = load_tile(y_MK, is_depth_K[None, :], IS_DEEP)
        weights_KN = load_tile(down_KN, is_depth_K[:, None] & is_column_N[None, :], IS_WHOLE)
        gradient_MN = tl.dot(rows_MK, weights_KN, gradient_MN, input_precision=PRECISION)
        y_MK += BLOCK_DEPTH
        down_KN += BLOCK_DEPTH * down_column
    # Half of the columns at a time: what stands beside the gradient would not fit the registers otherwise.
    pick_weight_M = tl.load(weights + pick_M).to(tl.float32)
    halves = tl.split(tl.permute(tl.reshape(gradient_MN, (BLOCK_ROWS, 2, BLOCK_COLUMNS // 2)), (0, 2, 1)))
    part_M = tl.zeros([BLOCK_ROWS], tl.float32)
    for half in tl.static_range(2):
        half_MN = halves[half]
        column_N = block * BLOCK_COLUMNS + half * (BLOCK_COLUMNS // 2) + tl.arange(0, BLOCK_COLUMNS // 2)
        is_stored = (row_M < end)[:, None] & (column_N < WIDTH)[None, :]
        place_MN = row_M.to(tl.int64)[:, None] * (2 * WIDTH) + column_N[None, :]
        gate_MN = tl.load(projections + place_MN, mask=is_stored, other=0.0).to(tl.float32)
        up_MN = tl.load(projections + place_MN + WIDTH, mask=is_stored, other=0.0).to(tl.float32)
        sigmoid_MN = tl.sigmoid(gate_MN)
        silu_MN = gate_MN * sigmoid_MN
        part_M += tl.sum(half_MN * silu_MN * up_MN, 1)
        weighted_MN = (silu_MN * up_MN * pick_weight_M[:, None]).to(weighted.dtype.element_ty)
        tl.store(weighted + row_M.to(tl.int64)[:, None] * WIDTH + column_N[None, :], weighted_MN, mask=is_stored)
        half_MN *= pick_weight_M[:, None]
        gate_gradient_MN = half_MN * up_MN * (sigmoid_MN + silu_MN * (1.0 - sigmoid_MN))
        tl.store(gradients + place_MN, gate_gradient_MN.to(gradients.dtype.element_ty), mask=is_stored)
        tl.store(gradients + place_MN + WIDTH, (half_MN * silu_MN).to(gradients.dtype.element_ty), mask=is_stored)
    tl.store(parts + block.to(tl.int64) * num_rows + pick_M, part_M, mask=row_M < end)


@triton.jit
def _contract_rows(
    left,
    right,
    order,
    ends,
    gradients,
    PICKED: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_HEIGHT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    LEFT_GATHERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of one expert's matrix: the rows are the depth. An expert without rows gets zeros."""
    num_columns: tl.constexpr = (WIDTH + BLOCK_WIDTH - 1) // BLOCK_WIDTH
    num_blocks: tl.constexpr = (HEIGHT + BLOCK_HEIGHT - 1) // BLOCK_HEIGHT * num_columns
    expert = tl.program_id(0) // num_blocks
    block = tl.program_id(0) % num_blocks
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    height_M = block // num_columns * BLOCK_HEIGHT + tl.arange(0, BLOCK_HEIGHT)
    column_N = block % num_columns * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    row_K = tl.arange(0, BLOCK_ROWS)
    sum_MN = tl.zeros([BLOCK_HEIGHT, BLOCK_WIDTH], tl.float32)
    for start in range(first, end, BLOCK_ROWS):
        is_row_K = start + row_K < end
        safe_K = tl.minimum(start + row_K, end - 1)
        token_K = tl.load(order + safe_K) // PICKED
        left_K = (token_K if LEFT_GATHERS else safe_K).to(tl.int64)
        right_K = (safe_K if LEFT_GATHERS else token_K).to(tl.int64)
        is_left_KM = is_row_K[:, None] & (height_M < HEIGHT)[None, :]
        left_KM = tl.load(left + left_K[:, None] * HEIGHT + height_M[None, :], mask=is_left_KM, other=0.0)
        # Beyond the expert's last row that row stands in: the left side is zero there.
        right_KN = load_tile(
            right + right_K[:, None] * WIDTH + column_N[None, :], (column_N < WIDTH)[None, :], WIDTH % BLOCK_WIDTH == 0
        )
        sum_MN = tl.dot(tl.trans(left_KM), right_KN, sum_MN, input_precision=PRECISION)
    place_MN = gradients + expert.to(tl.int64) * HEIGHT * WIDTH + height_M[:, None] * WIDTH + column_N[None, :]
    is_stored = (height_M < HEIGHT)[:, None] & (column_N < WIDTH)[None, :]
    tl.store(place_MN, sum_MN.to(gradients.dtype.element_ty), mask=is_stored)
