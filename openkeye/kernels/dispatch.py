"""Which implementation serves each operation. The model and the engine import operations from here and from nowhere else.

Today the plain twins serve everywhere, except that experts in bf16 on a GPU go through torch's grouped matrix product.
"""

from torch import Tensor

from openkeye.kernels import reference
from openkeye.kernels.grouped_experts import can_group, grouped_experts
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


def experts(x_TD: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """See `reference.experts`."""
    if can_group(x_TD, gate_up_EDF, down_EFD):
        return grouped_experts(x_TD, gate_up_EDF, down_EFD, weights_TK, expert_ids_TK)
    return reference.experts(x_TD, gate_up_EDF, down_EFD, weights_TK, expert_ids_TK)
