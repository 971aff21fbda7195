"""Which implementation serves the operations over packs of documents with branches; training imports them from here.

On a CPU and in float64 the plain twins of `reference_packs.py` and `reference_learning.py` serve. Letters as in `reference`.
"""

import torch
from torch import Tensor

from openkeye.kernels import reference, reference_learning, reference_packs
from openkeye.kernels.dispatch import sparse_attention
from openkeye.kernels.visible_keys import VisibleKeys

mean_probabilities = reference_learning.mean_probabilities


def branched_attention(query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, visible: VisibleKeys, scale: float) -> Tensor:
    """See `reference_packs.branched_attention`."""
    return reference_packs.branched_attention(query_THD, key_TGD, value_TGD, visible, scale)


def branched_attention_with_lse(
    query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, visible: VisibleKeys, scale: float
) -> tuple[Tensor, Tensor | None]:
    """`branched_attention` and, where it comes along, `branched_attention_lse`."""
    return reference_packs.branched_attention(query_THD, key_TGD, value_TGD, visible, scale), None


def branched_attention_lse(query_THD: Tensor, key_TGD: Tensor, visible: VisibleKeys, scale: float) -> Tensor:
    """See `reference_packs.branched_attention_lse`."""
    return reference_packs.branched_attention_lse(query_THD, key_TGD, visible, scale)


def branched_select(
    query_TJI: Tensor, gates_TJ: Tensor, key_TI: Tensor, k: int, visible: VisibleKeys, key_scales_T: Tensor | None = None
) -> Tensor:
    """See `reference_packs.branched_select`."""
    return reference_packs.branched_select(query_TJI, gates_TJ, key_TI, k, visible, key_scales_T)


def quantize_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_vectors`."""
    return reference.quantize_vectors(x)


def dense_indexer_loss(
    query_THD: Tensor,
    key_TGD: Tensor,
    index_query_TJI: Tensor,
    gates_TJ: Tensor,
    index_key_TI: Tensor,
    visible: VisibleKeys,
    scale: float,
    weights_T: Tensor,
    lse_TH: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference_packs.dense_indexer_loss`. lse_TH: `branched_attention_lse` where it is at hand already."""
    arguments = (query_THD, key_TGD, index_query_TJI, gates_TJ, index_key_TI, visible, scale, weights_T, lse_TH)
    return reference_packs.dense_indexer_loss(*arguments)


def selected_indexer_loss(
    query_THD: Tensor,
    key_TGD: Tensor,
    index_query_TJI: Tensor,
    gates_TJ: Tensor,
    index_key_TI: Tensor,
    indices_TK: Tensor,
    scale: float,
    weights_T: Tensor,
    dense_lse_TH: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`sparse_indexer_loss` of `selected_probabilities` (`reference_learning`): (sum of weights * KL, KL [T])."""
    with torch.no_grad():
        target_TK = reference_learning.selected_probabilities(query_THD, key_TGD, indices_TK, scale, dense_lse_TH)
    return reference_learning.sparse_indexer_loss(target_TK, index_query_TJI, gates_TJ, index_key_TI, indices_TK, weights_T)


def teaching_attention(
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    index_query_TJI: Tensor,
    gates_TJ: Tensor,
    index_key_TI: Tensor,
    indices_TK: Tensor,
    weights_T: Tensor,
    divergence_T: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`sparse_attention` and `selected_indexer_loss`, from the probabilities that the attention's gradient makes anyway.

    The KL of each token is written into divergence_T, by kernels in the backward pass. Until then their loss is 0; its gradient
    is right all the same.
    """
    indexer = (index_query_TJI, gates_TJ, index_key_TI)
    output = sparse_attention(query_THD, key_TGD, value_TGD, indices_TK, scale)
    loss, divergence = selected_indexer_loss(query_THD, key_TGD, *indexer, indices_TK, scale, weights_T)
    divergence_T.copy_(divergence)
    return output, loss
