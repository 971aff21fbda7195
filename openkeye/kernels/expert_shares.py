"""`experts_share` on any CUDA GPU, in Triton: the experts of one rank; picks of the other ranks' experts cost no product.

Twin: `reference_sharding.experts_share`. Those picks are sorted behind all others, as if of one more expert, whose tiles are
then marked as not used: nothing waits for the device to count them.

Letters: T tokens, K picked experts, E experts of this rank, D model width, F expert width.
"""

from dataclasses import replace

import torch
from torch import Tensor

from openkeye.kernels.expert_products import add_picks, choose_block_rows, project_and_activate, project_rows
from openkeye.kernels.expert_routes import MAX_UNSORTED, Routes, build_routes, route_few
from openkeye.kernels.experts import check_supported


def experts_share(
    x_TD: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    weights_TK: Tensor,
    expert_ids_TK: Tensor,
    first_expert: int,
    gate_up_scale_EF: Tensor | None = None,
    down_scale_ED: Tensor | None = None,
) -> Tensor:
    """See `reference_sharding.experts_share`; for answering alone.

    Raises:
        ValueError: shapes or types that are not served.
    """
    check_supported(x_TD, gate_up_EDF, down_EFD, weights_TK, expert_ids_TK, gate_up_scale_EF, down_scale_ED)
    num_picked = expert_ids_TK.shape[1]
    if not expert_ids_TK.numel():
        return torch.zeros_like(x_TD)
    ids_TK = expert_ids_TK - first_expert
    is_own_TK = (ids_TK >= 0) & (ids_TK < gate_up_EDF.shape[0])
    routes = _own_routes(ids_TK, is_own_TK, gate_up_EDF.shape[0], x_TD.dtype)
    activated, _ = project_and_activate(x_TD.contiguous(), gate_up_EDF, gate_up_scale_EF, routes, num_picked)
    picks = project_rows(activated, down_EFD, down_scale_ED, routes)
    # A pick without weight is not read: nobody wrote it.
    return add_picks(picks, num_picked, torch.where(is_own_TK, weights_TK, 0.0))


def _own_routes(ids_TK: Tensor, is_own_TK: Tensor, num_experts: int, dtype: torch.dtype) -> Routes:
    """Tiles of the rows of this rank's experts; the rows of other picks lie behind the last of them."""
    block_rows = choose_block_rows(ids_TK.numel(), num_experts + 1, dtype)
    if ids_TK.numel() <= MAX_UNSORTED:
        return route_few(torch.where(is_own_TK, ids_TK, -1), block_rows)
    routes = build_routes(torch.where(is_own_TK, ids_TK, num_experts), num_experts + 1, block_rows)
    tile_experts_N = torch.where(routes.tile_experts_N == num_experts, -1, routes.tile_experts_N)
    return replace(routes, tile_experts_N=tile_experts_N)
