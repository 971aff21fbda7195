"""Which implementation serves the operations over packs of documents with branches; training imports them from here.

| operation | on a GPU |
|---|---|
| branched_attention | branched_attention.py in bfloat16 and float16, else `dispatch.dense_attention` and masks of branches |
| branched_attention_lse | attention_lse.py |
| branched_select | indexer_select.py |
| dense_indexer_loss, selected_indexer_loss, teaching_attention | indexer_loss.py |

On a CPU, in float64 and where no kernel takes the shapes, which is said once, the plain twins of `reference_packs.py` and
`reference_learning.py` serve. Letters as in `reference`.
"""

import torch
from torch import Tensor

from openkeye.kernels import reference, reference_learning, reference_packs
from openkeye.kernels.dispatch import can_be_fast, dense_attention, serves, sparse_attention
from openkeye.kernels.visible_keys import VisibleKeys


def branched_attention(query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, visible: VisibleKeys, scale: float) -> Tensor:
    """See `reference_packs.branched_attention`."""
    return branched_attention_with_lse(query_THD, key_TGD, value_TGD, visible, scale)[0]


def branched_attention_with_lse(
    query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, visible: VisibleKeys, scale: float
) -> tuple[Tensor, Tensor | None]:
    """`branched_attention` and, where it comes along, `branched_attention_lse`."""
    tensors = (query_THD, key_TGD, value_TGD)
    if can_be_fast(query_THD):
        from openkeye.kernels.branched_attention import branched_attention_with_lse as fast
        from openkeye.kernels.dense_attention import choose_back_end

        is_served = choose_back_end(query_THD, key_TGD, True) in ("flash", "cudnn")
        if serves("branched_attention", tensors, is_served, "heads of a multiple of 8 up to 256 in half precision"):
            return fast(*tensors, visible, scale)
    return reference_packs.branched_attention(*tensors, visible, scale, dense_attention), None


def branched_attention_lse(query_THD: Tensor, key_TGD: Tensor, visible: VisibleKeys, scale: float) -> Tensor:
    """See `reference_packs.branched_attention_lse`."""
    if _can_attend("branched_attention_lse", query_THD, key_TGD):
        from openkeye.kernels.attention_lse import attention_lse

        with torch.no_grad():
            return attention_lse(query_THD, key_TGD, visible.last_T, scale, visible.first_T, visible.gaps)
    return reference_packs.branched_attention_lse(query_THD, key_TGD, visible, scale)


@torch.no_grad()
def branched_select(
    query_TJI: Tensor, gates_TJ: Tensor, key_TI: Tensor, k: int, visible: VisibleKeys, key_scales_T: Tensor | None = None
) -> Tensor:
    """See `reference_packs.branched_select`."""
    if can_be_fast(gates_TJ) and query_TJI.dtype != torch.float64:
        from openkeye.kernels import index_scores as scores
        from openkeye.kernels.indexer_select import indexer_select
        from openkeye.kernels.top_k import MAX_K

        num_heads, width = query_TJI.shape[1:]
        is_served = width in scores.WIDTHS and num_heads & (num_heads - 1) == 0 and num_heads <= scores.ROWS and k <= MAX_K
        served = f"a power of two of heads up to {scores.ROWS} of one of {scores.WIDTHS} and k up to {MAX_K} (k is {k})"
        if serves("branched_select", (query_TJI, key_TI) if key_scales_T is None else (gates_TJ,), is_served, served):
            return indexer_select(
                query_TJI,
                gates_TJ,
                key_TI,
                k,
                visible.last_T,
                first_keys_T=visible.first_T,
                key_scales_S=key_scales_T,
                gaps=visible.gaps,
                max_visible=visible.max_seen,
            )
    return reference_packs.branched_select(query_TJI, gates_TJ, key_TI, k, visible, key_scales_T)


@torch.no_grad()
def quantize_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_vectors`."""
    if can_be_fast(x):
        from openkeye.kernels import quantize as fast

        if serves("quantize_vectors", (x,), x.shape[-1] <= fast.MAX_WIDTH, f"vectors of up to {fast.MAX_WIDTH} numbers"):
            return fast.quantize_vectors(x)
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
    tensors = (query_THD, key_TGD, index_query_TJI, gates_TJ, index_key_TI)
    if _can_teach("dense_indexer_loss", *tensors):
        from openkeye.kernels.indexer_loss import dense_indexer_loss as fast

        return fast(*tensors, visible.last_T, scale, visible.first_T, weights_T, lse_TH, gaps=visible.gaps)
    return reference_packs.dense_indexer_loss(*tensors, visible, scale, weights_T, lse_TH)


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
    indexer = (index_query_TJI, gates_TJ, index_key_TI)
    if _can_teach("selected_indexer_loss", query_THD, key_TGD, *indexer):
        from openkeye.kernels import indexer_loss as fast
        from openkeye.kernels.unions import build_unions

        with torch.no_grad():
            unions = build_unions(indices_TK, key_TGD.shape[0])
            target_TK = fast.selected_probabilities(query_THD, key_TGD, indices_TK, scale, dense_lse_TH, unions)
        is_deterministic = torch.are_deterministic_algorithms_enabled()
        return fast.sparse_indexer_loss(target_TK, *indexer, indices_TK, weights_T, unions, is_deterministic)
    with torch.no_grad():
        target_TK = reference_learning.selected_probabilities(query_THD, key_TGD, indices_TK, scale, dense_lse_TH)
    return reference_learning.sparse_indexer_loss(target_TK, *indexer, indices_TK, weights_T)


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
    if value_TGD.dtype == key_TGD.dtype and _can_teach("teaching_attention", query_THD, key_TGD, *indexer):
        from openkeye.kernels.indexer_loss import TeachingAttention

        is_deterministic = torch.are_deterministic_algorithms_enabled()
        return TeachingAttention.apply(
            query_THD, key_TGD, value_TGD, *indexer, indices_TK, weights_T, divergence_T, scale, is_deterministic
        )
    output = sparse_attention(query_THD, key_TGD, value_TGD, indices_TK, scale)
    loss, divergence = selected_indexer_loss(query_THD, key_TGD, *indexer, indices_TK, scale, weights_T)
    divergence_T.copy_(divergence)
    return output, loss


def _can_attend(operation: str, query_THD: Tensor, key_TGD: Tensor) -> bool:
    """Whether the kernels that walk attention's pairs take these."""
    if not can_be_fast(query_THD):
        return False
    from openkeye.kernels.sparse_attention import WIDTHS

    is_served = query_THD.shape[2] in WIDTHS and query_THD.shape[1] % key_TGD.shape[1] == 0
    return serves(operation, (query_THD, key_TGD), is_served, f"heads of one of {WIDTHS}")


def _can_teach(
    operation: str, query_THD: Tensor, key_TGD: Tensor, index_query_TJI: Tensor, gates_TJ: Tensor, index_key_TI: Tensor
) -> bool:
    """Whether the kernels of the indexer's losses take these."""
    if not can_be_fast(query_THD) or not _can_attend(operation, query_THD, key_TGD):
        return False
    from openkeye.kernels import indexer_gradients as fast

    num_heads, width = index_query_TJI.shape[1:]
    is_served = width in fast.WIDTHS and num_heads & (num_heads - 1) == 0 and num_heads <= fast.ROWS
    is_served = is_served and index_query_TJI.dtype in fast.DTYPES
    served = f"a power of two of the indexer's heads up to {fast.ROWS} of one of {fast.WIDTHS}, not in float16"
    return serves(operation, (index_query_TJI, index_key_TI), is_served, served)
