"""Which implementation serves each operation. The model and the engine import operations from here and from nowhere else.

| operation | on a GPU | with gradients there |
|---|---|---|
| rms_norm, norm_rotary, index_norm_rotary | norm_rotary.py | plain |
| indexer_select | indexer_select.py | it has none |
| sparse_attention | sparse_attention.py | sparse_attention_backward.py |
| decode_in_pages, where `can_decode_in_pages` | indexer_decode.py, top_k.py, sparse_decode.py | only for answering |
| experts_share | expert_shares.py | only for answering |
| scores_in_pages, top_k_positions, attend_in_pages | indexer_decode.py, top_k.py, sparse_decode.py | only for answering |
| dense_attention, experts, cross_entropy (on a CPU too) | the files of these names | the same files |
| apply_rotary (vision), index_scores (`openkeye check`) | plain | plain |

On a CPU and in float64 the plain twins of `reference.py` serve; so they do on a GPU where no kernel takes the shapes, which is
said once. In float32 kernels multiply in full precision, as the twins do. They choose between Triton and CUDA C++ themselves.
"""

import warnings

import torch
from torch import Tensor

from openkeye.kernels import cross_entropy as head
from openkeye.kernels import reference, reference_sharding

apply_rotary, index_scores, widen = reference.apply_rotary, reference.index_scores, reference.widen
cross_entropy = head.cross_entropy
rank_candidates, merge_candidates = reference_sharding.rank_candidates, reference_sharding.merge_candidates

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_operations_told: set[str] = set()


def can_be_fast(x: Tensor) -> bool:
    """Whether there are kernels for this device and precision at all; only then their modules load, and Triton with them."""
    return x.is_cuda and x.dtype != torch.float64


def needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def can_be_fused(*tensors: Tensor) -> bool:
    """`can_be_fast` for kernels without gradients; torch's compiler, which training uses, fuses the plain twins itself."""
    return can_be_fast(tensors[0]) and not needs_gradients(*tensors) and not torch.compiler.is_compiling()


def serves(operation: str, tensors: tuple[Tensor, ...], is_shape_served: bool, served: str) -> bool:
    """Whether the kernels take a call of tensors that must share a dtype; where not, one warning an operation says `served`."""
    first = tensors[0].dtype
    if is_shape_served and first in DTYPES and all(tensor.dtype == first for tensor in tensors):
        return True
    if operation not in _operations_told:
        _operations_told.add(operation)
        came = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors)
        warnings.warn(f"{operation} runs in plain PyTorch: kernels serve {served}, in one dtype, and got {came}", stacklevel=3)
    return False


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    if can_be_fused(x, weight):
        from openkeye.kernels import norm_rotary as fast

        if serves("rms_norm", (x,), x.shape[-1] <= fast.MAX_RMS_WIDTH, f"rows of up to {fast.MAX_RMS_WIDTH} numbers"):
            return fast.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def norm_rotary(
    query_TX: Tensor, key_TX: Tensor, query_weight_D: Tensor, key_weight_D: Tensor, cos_TD: Tensor, sin_TD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `reference.norm_rotary`."""
    tensors = (query_TX, key_TX, query_weight_D, key_weight_D, cos_TD, sin_TD)
    if can_be_fused(*tensors):
        from openkeye.kernels import norm_rotary as fast

        if serves("norm_rotary", tensors[:2], query_weight_D.shape[0] in fast.WIDTHS, f"heads of one of {fast.WIDTHS}"):
            return fast.norm_rotary(*tensors, eps)
    return reference.norm_rotary(*tensors, eps)


def index_norm_rotary(
    projected_TX: Tensor,
    key_TI: Tensor,
    query_weight_I: Tensor,
    key_weight_I: Tensor,
    key_bias_I: Tensor,
    cos_TI: Tensor,
    sin_TI: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.index_norm_rotary`."""
    tensors = (projected_TX, key_TI, query_weight_I, key_weight_I, key_bias_I, cos_TI, sin_TI)
    if can_be_fused(*tensors):
        from openkeye.kernels import norm_rotary as fast

        if serves("index_norm_rotary", tensors[:2], key_TI.shape[1] in fast.WIDTHS, f"heads of one of {fast.WIDTHS}"):
            return fast.index_norm_rotary(*tensors, eps)
    return reference.index_norm_rotary(*tensors, eps)


def indexer_select(query_TJI: Tensor, gates_TJ: Tensor, key_SI: Tensor, k: int, query_positions_T: Tensor) -> Tensor:
    """See `reference.indexer_select`."""
    if can_be_fast(query_TJI):
        from openkeye.kernels import index_scores as scores
        from openkeye.kernels import indexer_select as fast
        from openkeye.kernels.top_k import MAX_K

        num_heads, width = query_TJI.shape[1:]
        is_served = width in scores.WIDTHS and num_heads & (num_heads - 1) == 0 and num_heads <= scores.ROWS and k <= MAX_K
        served = f"a power of two of heads up to {scores.ROWS} of one of {scores.WIDTHS} and k up to {MAX_K} (k is {k})"
        if serves("indexer_select", (query_TJI, key_SI), is_served, served):
            return fast.indexer_select(query_TJI, gates_TJ, key_SI, k, query_positions_T)
    return reference.indexer_select(query_TJI, gates_TJ, key_SI, k, query_positions_T)


def sparse_attention(query_THD: Tensor, key_SGD: Tensor, value_SGD: Tensor, indices_TK: Tensor, scale: float) -> Tensor:
    """See `reference.sparse_attention`."""
    tensors = (query_THD, key_SGD, value_SGD)
    if can_be_fast(query_THD):
        from openkeye.kernels import sparse_attention as fast

        if serves("sparse_attention", tensors, query_THD.shape[2] in fast.WIDTHS, f"heads of one of {fast.WIDTHS}"):
            if needs_gradients(*tensors):
                from openkeye.kernels.sparse_attention_backward import SparseAttention

                return SparseAttention.apply(*tensors, indices_TK, scale, torch.are_deterministic_algorithms_enabled())
            return fast.sparse_attention(*tensors, indices_TK, scale)
    return reference.sparse_attention(*tensors, indices_TK, scale)


def can_decode_in_pages(query_BHD: Tensor, index_query_BJI: Tensor, key_SGD: Tensor, k: int, page_size: int) -> bool:
    """Whether `decode_in_pages` serves one token a request of these shapes over caches like these keys."""
    if not can_be_fast(query_BHD):
        return False
    from openkeye.kernels import indexer_decode as scores
    from openkeye.kernels.sparse_attention import WIDTHS
    from openkeye.kernels.top_k import MAX_K

    num_requests, num_heads, width = index_query_BJI.shape
    is_served = width in scores.WIDTHS and num_heads <= scores.MAX_HEADS and num_requests <= scores.MAX_REQUESTS
    is_served = is_served and query_BHD.shape[2] in WIDTHS and k <= MAX_K and page_size % 16 == 0
    served = f"heads of one of {WIDTHS}, of the indexer {scores.WIDTHS}, k up to {MAX_K}, pages of a multiple of 16 tokens"
    return serves("decode_in_pages", (query_BHD, index_query_BJI, key_SGD), is_served, served)


def decode_in_pages(
    query_BHD: Tensor,
    index_query_BJI: Tensor,
    gates_BJ: Tensor,
    caches: tuple[Tensor, Tensor, Tensor],
    page_table_BP: Tensor,
    lengths_B: Tensor,
    k: int,
    page_size: int,
    scale: float,
) -> Tensor:
    """`sparse_decode.sparse_select_decode` with buffers of its own; caches: keys [S, G, D], values, index keys [S, I]."""
    from openkeye.kernels.indexer_decode import indexer_decode
    from openkeye.kernels.sparse_decode import sparse_decode
    from openkeye.kernels.top_k import top_k_positions

    pages = (page_table_BP, lengths_B, page_table_BP.shape[1] * page_size)
    scores_BL = indexer_decode(index_query_BJI, gates_BJ, caches[2], *pages, page_size=page_size)
    picked_BK = top_k_positions(scores_BL, k, lengths_B)
    return sparse_decode(query_BHD, caches[0], caches[1], picked_BK, scale, page_table_BP, page_size)


def dense_attention(
    query_THD: Tensor, key_SGD: Tensor, value_SGD: Tensor, query_positions_T: Tensor | None, scale: float
) -> Tensor:
    """See `reference.dense_attention`; on a GPU positions must be those of the last keys, which the device checks."""
    tensors = (query_THD, key_SGD, value_SGD)
    if can_be_fast(query_THD):
        from openkeye.kernels import dense_attention as fast

        is_served = fast.choose_back_end(query_THD, key_SGD, query_positions_T is not None) != "reference"
        if serves("dense_attention", tensors, is_served, "heads of a multiple of 8 up to 256, from compute capability 8 on"):
            return fast.dense_attention(*tensors, query_positions_T, scale)
    return reference.dense_attention(*tensors, query_positions_T, scale)


def quantize_expert_weights(weight_EIO: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_expert_weights`; on a GPU in the layout that its kernels read."""
    if can_be_fast(weight_EIO):
        from openkeye.kernels import experts as fast

        return fast.quantize_expert_weights(weight_EIO)
    return reference.quantize_expert_weights(weight_EIO)


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
    if can_be_fast(x_TD):
        from openkeye.kernels.experts import experts as fast_experts

        alike = (x_TD, gate_up_EDF, down_EFD) if gate_up_scale_EF is None else (x_TD,)
        if serves("experts", alike, True, "tokens and projections of any shape"):
            return fast_experts(*tensors)
    return reference.experts(*tensors)


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
    """See `reference_sharding.experts_share`."""
    tensors = (x_TD, gate_up_EDF, down_EFD, weights_TK, expert_ids_TK)
    scales = (gate_up_scale_EF, down_scale_ED)
    if can_be_fast(x_TD):
        from openkeye.kernels.expert_shares import experts_share as fast_share

        alike = (x_TD, gate_up_EDF, down_EFD) if gate_up_scale_EF is None else (x_TD,)
        if serves("experts_share", alike, True, "tokens and projections of any shape"):
            return fast_share(*tensors, first_expert, *scales)
    return reference_sharding.experts_share(*tensors, first_expert, *scales)


def scores_in_pages(
    index_query_BJI: Tensor, gates_BJ: Tensor, index_key_SI: Tensor, page_table_BP: Tensor, lengths_B: Tensor, page_size: int
) -> Tensor:
    """See `reference.indexer_decode`: [B, P * page_size]."""
    num_columns = page_table_BP.shape[1] * page_size
    tensors = (index_query_BJI, gates_BJ, index_key_SI, page_table_BP, lengths_B, num_columns)
    if can_be_fast(index_query_BJI):
        from openkeye.kernels import indexer_decode as fast

        num_requests, num_heads, width = index_query_BJI.shape
        is_served = width in fast.WIDTHS and num_heads <= fast.MAX_HEADS and num_requests <= fast.MAX_REQUESTS
        if serves("scores_in_pages", tensors[:1], is_served and page_size % 16 == 0, f"an indexer of one of {fast.WIDTHS}"):
            return fast.indexer_decode(*tensors, page_size=page_size)
    return reference.indexer_decode(*tensors, page_size=page_size)


def top_k_positions(scores_TS: Tensor, k: int, num_valid_T: Tensor) -> Tensor:
    """See `reference.top_k_positions`."""
    if scores_TS.is_cuda and scores_TS.dtype == torch.float32:
        from openkeye.kernels import top_k as fast

        if k <= fast.MAX_K:
            return fast.top_k_positions(scores_TS, k, num_valid_T)
    return reference.top_k_positions(scores_TS, k, num_valid_T)


def attend_in_pages(
    query_BHD: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    indices_BK: Tensor,
    scale: float,
    page_table_BP: Tensor,
    page_size: int,
) -> Tensor:
    """See `reference.sparse_decode`."""
    tensors = (query_BHD, key_SGD, value_SGD)
    if can_be_fast(query_BHD):
        from openkeye.kernels import sparse_decode as fast
        from openkeye.kernels.sparse_attention import WIDTHS

        if serves("attend_in_pages", tensors, query_BHD.shape[2] in WIDTHS, f"heads of one of {WIDTHS}"):
            return fast.sparse_decode(*tensors, indices_BK, scale, page_table_BP, page_size)
    return reference.sparse_decode(*tensors, indices_BK, scale, page_table_BP, page_size)
