"""Which implementation serves each operation. The model and the engine import operations from here and from nowhere else.

Today the plain twins serve everywhere, except that experts on a GPU go through Triton.
"""

import torch
from torch import Tensor

from openkeye.kernels import reference
from openkeye.kernels.cross_entropy import cross_entropy
from openkeye.kernels.reference import (
    apply_rotary,
    dense_attention,
    hadamard,
    index_scores,
    indexer_select,
    layer_norm,
    rms_norm,
    sparse_attention,
    widen,
)

__all__ = [
    "apply_rotary",
    "cross_entropy",
    "dense_attention",
    "experts",
    "hadamard",
    "index_scores",
    "indexer_select",
    "layer_norm",
    "rms_norm",
    "sparse_attention",
    "widen",
]


def experts(
    x_TD: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    weights_TK: Tensor,
    expert_ids_TK: Tensor,
    gate_up_scale_EF: Tensor | None = None,
    down_scale_ED: Tensor | None = None,
) -> Tensor:
    """See `reference.experts`."""
    tensors = (x_TD, gate_up_EDF, down_EFD, weights_TK, expert_ids_TK, gate_up_scale_EF, down_scale_ED)
    if x_TD.is_cuda and x_TD.dtype != torch.float64:
        from openkeye.kernels.experts import experts as fast_experts

        return fast_experts(*tensors)
    return reference.experts(*tensors)
