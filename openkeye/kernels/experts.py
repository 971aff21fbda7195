"""`experts` on any CUDA GPU, in Triton: tokens sorted by expert, two grouped matrix products, one sum over each token's picks.

Twin: `reference.experts`. Weights may be fp8 with one scale an output column, for answering: they halve what few tokens read.
For thousands of tokens bfloat16 is faster (1.5 ms beside 2.1 for 8,192 tokens on an H100), since every tile of rows widens its
weights anew; widening them once would cost as much again.

Letters: T tokens, K picked experts, E experts, D model width, F expert width, R rows (T * K picks, sorted by expert).
"""

import torch
from torch import Tensor

from openkeye.kernels import reference
from openkeye.kernels.expert_products import FP8, add_picks, choose_block_rows, project_and_activate, project_rows
from openkeye.kernels.expert_routes import MAX_UNSORTED, Routes, build_routes, route_few
from openkeye.kernels.experts_backward import experts_backward

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


# A region that torch compiles stops here: tracing the launches would gain nothing, and their tile maps are made on the device.
@torch.compiler.disable
def experts(
    x_TD: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    weights_TK: Tensor,
    expert_ids_TK: Tensor,
    gate_up_scale_EF: Tensor | None = None,
    down_scale_ED: Tensor | None = None,
) -> Tensor:
    """See `reference.experts`; with gradients for the tokens, both projections and the picks' weights.

    Raises:
        ValueError: shapes or types that are not served, or gradients asked for through fp8 weights.
    """
    check_supported(x_TD, gate_up_EDF, down_EFD, weights_TK, expert_ids_TK, gate_up_scale_EF, down_scale_ED)
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_TD, gate_up_EDF, down_EFD, weights_TK))
    if not learns:
        scales = (gate_up_scale_EF, down_scale_ED)
        return run_experts(x_TD, gate_up_EDF, down_EFD, weights_TK, expert_ids_TK, *scales)[0]
    if gate_up_scale_EF is not None:
        raise ValueError("experts in fp8 have no gradients: learn in bfloat16, or answer under torch.no_grad()")
    return Experts.apply(x_TD, gate_up_EDF, down_EFD, weights_TK, expert_ids_TK)


def check_supported(
    x_TD: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    weights_TK: Tensor,
    expert_ids_TK: Tensor,
    gate_up_scale_EF: Tensor | None,
    down_scale_ED: Tensor | None,
) -> None:
    """Raises ValueError with one sentence where these tensors are not served."""
    num_experts, depth, double_width = gate_up_EDF.shape
    if x_TD.shape[1] != depth or down_EFD.shape != (num_experts, double_width // 2, depth) or double_width % 2:
        raise ValueError(
            f"experts serves tokens [T, D] with projections [E, D, 2F] and [E, F, D], got {tuple(x_TD.shape)}, "
            f"{tuple(gate_up_EDF.shape)} and {tuple(down_EFD.shape)}"
        )
    if weights_TK.shape != expert_ids_TK.shape or weights_TK.shape[0] != x_TD.shape[0]:
        raise ValueError(
            f"experts takes a weight and an expert for each pick of {x_TD.shape[0]} tokens, got {tuple(weights_TK.shape)} and "
            f"{tuple(expert_ids_TK.shape)}"
        )
    is_fp8 = gate_up_EDF.dtype == FP8
    if x_TD.dtype not in DTYPES or gate_up_EDF.dtype != down_EFD.dtype or not (is_fp8 or gate_up_EDF.dtype == x_TD.dtype):
        raise ValueError(
            f"experts serves bfloat16, float16 and float32, all three alike or with projections in float8_e4m3fn, got "
            f"{x_TD.dtype}, {gate_up_EDF.dtype} and {down_EFD.dtype}"
        )
    for name, scale, shape in (
        ("gate_up", gate_up_scale_EF, (num_experts, double_width)),
        ("down", down_scale_ED, (num_experts, depth)),
    ):
        if (scale is not None) != is_fp8 or (scale is not None and (scale.shape != shape or scale.dtype != torch.float32)):
            found = "none" if scale is None else f"{scale.dtype} {tuple(scale.shape)}"
            raise ValueError(f"experts takes float32 scales {shape} of {name} with fp8 weights and with no other, got {found}")


def quantize_expert_weights(weight_EIO: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_expert_weights`: the same numbers, expert by expert, each output column's in one piece of memory.

    The matrix unit takes pairs of neighbours in depth, and bytes cannot be turned on their way to it.
    """
    num_experts, depth, width = weight_EIO.shape
    values = torch.empty(num_experts, width, depth, dtype=FP8, device=weight_EIO.device)
    scales = torch.empty(num_experts, width, dtype=torch.float32, device=weight_EIO.device)
    for expert in range(num_experts):
        one, scale = reference.quantize_expert_weights(weight_EIO[expert : expert + 1])
        values[expert] = one[0].t()
        scales[expert] = scale[0]
    return values.transpose(1, 2), scales


def run_experts(
    x_TD: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    weights_TK: Tensor,
    expert_ids_TK: Tensor,
    gate_up_scale_EF: Tensor | None = None,
    down_scale_ED: Tensor | None = None,
    keeps_projections: bool = False,
) -> tuple[Tensor, Routes | None, Tensor | None]:
    """The output [T, D], the routes (none where there are no tokens), and where asked for each row's gate and up [R, 2F]."""
    num_picked = expert_ids_TK.shape[1]
    if not expert_ids_TK.numel():
        return torch.zeros_like(x_TD), None, None
    num_experts = gate_up_EDF.shape[0]
    x = x_TD.contiguous()
    block_rows = choose_block_rows(expert_ids_TK.numel(), num_experts, x.dtype)
    if expert_ids_TK.numel() <= MAX_UNSORTED and not keeps_projections:
        routes = route_few(expert_ids_TK, block_rows)
    else:
        routes = build_routes(expert_ids_TK, num_experts, block_rows)
    activated, projections = project_and_activate(x, gate_up_EDF, gate_up_scale_EF, routes, num_picked, keeps_projections)
    picks = project_rows(activated, down_EFD, down_scale_ED, routes)
    return add_picks(picks, num_picked, weights_TK), routes, projections


class Experts(torch.autograd.Function):
    """`experts` with gradients for the tokens, both projections and the picks' weights."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x_TD: Tensor,
        gate_up_EDF: Tensor,
        down_EFD: Tensor,
        weights_TK: Tensor,
        expert_ids_TK: Tensor,
    ) -> Tensor:
        """See `reference.experts`."""
        output, routes, projections = run_experts(
            x_TD, gate_up_EDF, down_EFD, weights_TK, expert_ids_TK, keeps_projections=True
        )
        kept = (projections, routes.order_R, routes.ends_E, routes.tile_experts_N, routes.tile_rows_N) if routes else ()
        ctx.save_for_backward(x_TD, gate_up_EDF, down_EFD, weights_TK, *kept)
        ctx.block_rows = routes.block_rows if routes else 0  # type: ignore[attr-defined]
        return output

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the four tensors, none for the picks."""
        x, gate_up, down, weights, *kept = ctx.saved_tensors  # type: ignore[attr-defined]
        if not kept:
            return *(torch.zeros_like(tensor) for tensor in (x, gate_up, down, weights)), None
        projections, order, ends, tile_experts, tile_rows = kept
        return (
            *experts_backward(
                gradients[0],
                x,
                gate_up,
                down,
                weights,
                projections,
                Routes(order, ends, tile_experts, tile_rows, ctx.block_rows),  # type: ignore[attr-defined]
                ctx.needs_input_grad[:4],  # type: ignore[attr-defined]
            ),
            None,
        )
