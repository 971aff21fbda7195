"""Which implementation serves each operation. The model and the engine import operations from here and from nowhere else.

| operation | on a GPU | with gradients there |
|---|---|---|
| rms_norm, add_rms_norm, norm_rotary, index_norm_rotary | norm_rotary.py | plain |
| norm_rotary_write, index_norm_rotary_write | norm_rotary.py | only for answering |
| route | router.py | plain |
| read_pages | paged_reads.py | only for answering |
| indexer_select | indexer_select.py | it has none |
| sparse_attention | sparse_attention.py | sparse_attention_backward.py |
| decode_in_pages, scores_in_pages, top_k_positions | indexer_decode.py, top_k.py, sparse_decode.py | only for answering |
| experts_share | expert_shares.py | only for answering |
| dense_attention, experts, cross_entropy (on a CPU too) | the files of these names | the same files |
| apply_rotary (vision), index_scores (`openkeye check`), route_as | plain | plain |

On a CPU and in float64 the plain twins of `reference.py` serve; so they do on a GPU where no kernel takes the shapes, which is
said once. In float32 kernels multiply in full precision, as the twins do. They choose between Triton and CUDA C++ themselves.
"""

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openkeye.kernels import cross_entropy as head
from openkeye.kernels import reference, reference_learning, reference_sharding
from openkeye.kernels.layer_caches import LayerCaches

if TYPE_CHECKING:
    from openkeye.kernels.sparse_decode import DecodeScratch

apply_rotary, index_scores, widen = reference.apply_rotary, reference.index_scores, reference.widen
route_as = reference_learning.route_as
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


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`."""
    if can_be_fused(x, y, weight):
        from openkeye.kernels import norm_rotary as fast

        if serves("add_rms_norm", (x, y), x.shape[-1] <= fast.MAX_RMS_WIDTH, f"rows of up to {fast.MAX_RMS_WIDTH} numbers"):
            return fast.add_rms_norm(x, y, weight, eps)
    return reference.add_rms_norm(x, y, weight, eps)


def norm_rotary(
    query_TX: Tensor,
    key_TX: Tensor,
    query_weight_D: Tensor | None,
    key_weight_D: Tensor | None,
    cos_TD: Tensor,
    sin_TD: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See `reference.norm_rotary`."""
    arguments = (query_TX, key_TX, query_weight_D, key_weight_D, cos_TD, sin_TD)
    if can_be_fused(*(tensor for tensor in arguments if tensor is not None)):
        from openkeye.kernels import norm_rotary as fast

        if serves("norm_rotary", (query_TX, key_TX), cos_TD.shape[1] in fast.WIDTHS, f"heads of one of {fast.WIDTHS}"):
            return fast.norm_rotary(*arguments, eps)
    return reference.norm_rotary(*arguments, eps)


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


def norm_rotary_write(
    query_TX: Tensor,
    key_TX: Tensor,
    value_TX: Tensor,
    query_weight_D: Tensor | None,
    key_weight_D: Tensor | None,
    cos_TD: Tensor,
    sin_TD: Tensor,
    eps: float,
    slots_T: Tensor,
    key_cache_NGD: Tensor,
    value_cache_NGD: Tensor,
    key_scales_NG: Tensor | None = None,
    value_scales_NG: Tensor | None = None,
) -> Tensor:
    """See `reference.norm_rotary_write`."""
    arguments = (query_TX, key_TX, value_TX, query_weight_D, key_weight_D, cos_TD, sin_TD)
    targets = (slots_T, key_cache_NGD, value_cache_NGD, key_scales_NG, value_scales_NG)
    if can_be_fused(*(tensor for tensor in arguments if tensor is not None)):
        from openkeye.kernels import norm_rotary as fast

        projected, is_served = (query_TX, key_TX, value_TX), cos_TD.shape[1] in fast.WIDTHS
        if serves("norm_rotary_write", projected, is_served, f"heads of one of {fast.WIDTHS}"):
            return fast.norm_rotary_write(*arguments, eps, *targets)
    return reference.norm_rotary_write(*arguments, eps, *targets)


def index_norm_rotary_write(
    projected_TX: Tensor,
    key_TI: Tensor,
    query_weight_I: Tensor,
    key_weight_I: Tensor,
    key_bias_I: Tensor,
    cos_TI: Tensor,
    sin_TI: Tensor,
    eps: float,
    slots_T: Tensor,
    key_cache_NI: Tensor,
    key_scales_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.index_norm_rotary_write`."""
    tensors = (projected_TX, key_TI, query_weight_I, key_weight_I, key_bias_I, cos_TI, sin_TI)
    targets = (slots_T, key_cache_NI, key_scales_N)
    if can_be_fused(*tensors):
        from openkeye.kernels import norm_rotary as fast

        is_served = key_TI.shape[1] in fast.WIDTHS
        if serves("index_norm_rotary_write", tensors[:2], is_served, f"heads of one of {fast.WIDTHS}"):
            return fast.index_norm_rotary_write(*tensors, eps, *targets)
    return reference.index_norm_rotary_write(*tensors, eps, *targets)


def indexer_select(
    query_TJI: Tensor,
    gates_TJ: Tensor,
    key_SI: Tensor,
    k: int,
    query_positions_T: Tensor,
    key_scales_S: Tensor | None = None,
    page_table_P: Tensor | None = None,
    page_size: int = 64,
) -> Tensor:
    """See `reference.indexer_select`."""
    arguments = (query_TJI, gates_TJ, key_SI, k, query_positions_T, None, None, key_scales_S, page_table_P, page_size)
    if can_be_fast(query_TJI):
        from openkeye.kernels import index_scores as scores
        from openkeye.kernels import indexer_select as fast
        from openkeye.kernels.top_k import MAX_K

        num_heads, width = query_TJI.shape[1:]
        is_served = width in scores.WIDTHS and num_heads & (num_heads - 1) == 0 and num_heads <= scores.ROWS and k <= MAX_K
        served = f"a power of two of heads up to {scores.ROWS} of one of {scores.WIDTHS} and k up to {MAX_K} (k is {k})"
        # Of e4m3 keys the queries may be e4m3 too, or anything that can be made so.
        alike = (query_TJI, key_SI) if key_scales_S is None else (gates_TJ,)
        if serves("indexer_select", alike, is_served, served):
            return fast.indexer_select(*arguments)
    return reference.indexer_select(*arguments)


def sparse_attention_in_pages(
    query_THD: Tensor, caches: LayerCaches, indices_TK: Tensor, page_table_P: Tensor, num_keys: int, scale: float
) -> Tensor:
    """`sparse_attention` of one sequence's queries to positions of its own, whose keys lie in pages.

    A kernel reads pages in the model's dtype where they lie; e4m3, and what no kernel serves, is read in order first, the first
    num_keys of it: what nobody wrote may be anything, even where its weight is zero.
    """
    if caches.key_scales_SG is None and can_be_fast(query_THD):
        from openkeye.kernels import sparse_attention as fast

        tensors = (query_THD, caches.key_SGD, caches.value_SGD)
        if serves("sparse_attention", tensors, query_THD.shape[2] in fast.WIDTHS, f"heads of one of {fast.WIDTHS}"):
            return fast.sparse_attention(*tensors, indices_TK, scale, None, page_table_P[None], caches.page_size)
    keys, values = read_keys_and_values(caches, page_table_P, num_keys, query_THD.dtype)
    return sparse_attention(query_THD, keys, values, indices_TK, scale)


def read_keys_and_values(caches: LayerCaches, page_table_P: Tensor, num_keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`reference.read_pages` of a sequence's keys and of its values."""
    read = reference.read_pages
    if can_be_fast(caches.key_SGD):
        from openkeye.kernels.paged_reads import read_pages as read
    where = (page_table_P, num_keys, caches.page_size, dtype)
    return read(caches.key_SGD, *where, caches.key_scales_SG), read(caches.value_SGD, *where, caches.value_scales_SG)


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


def can_decode_in_pages(query_BHD: Tensor, index_query_BJI: Tensor, caches: LayerCaches, k: int) -> bool:
    """Whether kernels serve `decode_in_pages` of these shapes; then nothing in it waits for the device."""
    if not can_be_fast(query_BHD):
        return False
    from openkeye.kernels import indexer_decode as scores
    from openkeye.kernels.top_k import MAX_K

    num_requests, num_heads, width = index_query_BJI.shape
    is_served = width in scores.WIDTHS and num_heads <= scores.MAX_HEADS and num_requests <= scores.MAX_REQUESTS
    is_served = is_served and k <= MAX_K and caches.page_size % 16 == 0
    served = f"heads of the indexer of one of {scores.WIDTHS}, k up to {MAX_K}, pages of a multiple of 16 tokens"
    return serves("decode_in_pages", (query_BHD,), is_served, served) and can_attend_in_pages(query_BHD, caches)


def can_attend_in_pages(query_BHD: Tensor, caches: LayerCaches) -> bool:
    """Whether a kernel serves `attend_in_pages` of these shapes."""
    if not can_be_fast(query_BHD):
        return False
    from openkeye.kernels.sparse_attention import WIDTHS

    alike = (query_BHD, caches.key_SGD) if caches.key_scales_SG is None else (query_BHD,)
    return serves("attend_in_pages", alike, query_BHD.shape[2] in WIDTHS, f"heads of one of {WIDTHS}")


def decode_in_pages(
    query_BHD: Tensor,
    index_query_BJI: Tensor,
    gates_BJ: Tensor,
    caches: LayerCaches,
    page_table_BP: Tensor,
    lengths_B: Tensor,
    k: int,
    scale: float,
    scratch: "DecodeScratch | None" = None,
) -> tuple[Tensor, Tensor]:
    """One new token a request over the keys that the indexer picks of its pages: output [B, H, D] and picks [B, K] int32.

    Scores, selection and attention with nothing between them; a request of length 0 gets zeros and picks nothing. scratch:
    what kernels write into (`decode_scratch`), so that they allocate nothing; the picks are then a part of it.
    """
    assert caches.index_key_SI is not None
    num_requests, max_len = query_BHD.shape[0], page_table_BP.shape[1] * caches.page_size
    pages = (page_table_BP, lengths_B, max_len, caches.index_scales_S, caches.page_size)
    if can_decode_in_pages(query_BHD, index_query_BJI, caches, k):
        from openkeye.kernels.indexer_decode import indexer_decode
        from openkeye.kernels.top_k import top_k_positions
    else:
        indexer_decode, top_k_positions = reference.indexer_decode, reference.top_k_positions  # type: ignore[assignment]
    scores, picks = (None, None) if scratch is None else (scratch.scores_BL[:num_requests], scratch.picked_BK[:num_requests])
    scores_BL = indexer_decode(index_query_BJI, gates_BJ, caches.index_key_SI, *pages, scores)
    picked_BK = top_k_positions(scores_BL, k, lengths_B, picks)
    return attend_in_pages(query_BHD, caches, picked_BK, page_table_BP, scale, scratch), picked_BK


def decode_scratch(
    num_requests: int, max_len: int, query_heads: int, caches: LayerCaches, num_picked: int
) -> "DecodeScratch | None":
    """Buffers for `decode_in_pages` and `attend_in_pages` of up to so many requests; None where no kernel serves."""
    if not can_be_fast(caches.key_SGD):
        return None
    from openkeye.kernels.sparse_decode import DecodeScratch

    return DecodeScratch.empty(num_requests, max_len, query_heads, caches.key_SGD, num_picked)


def attend_in_pages(
    query_BHD: Tensor,
    caches: LayerCaches,
    indices_BK: Tensor,
    page_table_BP: Tensor,
    scale: float,
    scratch: "DecodeScratch | None" = None,
) -> Tensor:
    """See `reference.sparse_decode`: one query a request over positions of its own."""
    tensors = (query_BHD, caches.key_SGD, caches.value_SGD, indices_BK, scale, page_table_BP, caches.page_size)
    scales = (caches.key_scales_SG, caches.value_scales_SG)
    if can_attend_in_pages(query_BHD, caches):
        from openkeye.kernels.sparse_decode import sparse_decode

        return sparse_decode(*tensors, *scales, scratch)
    return reference.sparse_decode(*tensors, *scales)


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


def route(logits_TE: Tensor, num_picked: int, is_normalised: bool) -> tuple[Tensor, Tensor]:
    """See `reference.route`."""
    if can_be_fused(logits_TE):
        from openkeye.kernels import router as fast

        if serves("route", (logits_TE,), logits_TE.shape[1] <= fast.MAX_EXPERTS, f"up to {fast.MAX_EXPERTS} experts"):
            return fast.route(logits_TE, num_picked, is_normalised)
    return reference.route(logits_TE, num_picked, is_normalised)


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
    has_fixed_blocks: bool = False,
) -> Tensor:
    """See `reference.experts`; kernels work in blocks whose size the number of tokens alone decides."""
    tensors = (x_TD, gate_up_EDF, down_EFD, weights_TK, expert_ids_TK, gate_up_scale_EF, down_scale_ED)
    if can_be_fast(x_TD):
        from openkeye.kernels.experts import experts as fast_experts

        alike = (x_TD, gate_up_EDF, down_EFD) if gate_up_scale_EF is None else (x_TD,)
        if serves("experts", alike, True, "tokens and projections of any shape"):
            return fast_experts(*tensors)
    return reference.experts(*tensors, has_fixed_blocks)


def experts_share(
    x_TD: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    weights_TK: Tensor,
    expert_ids_TK: Tensor,
    first_expert: int,
    gate_up_scale_EF: Tensor | None = None,
    down_scale_ED: Tensor | None = None,
    has_fixed_blocks: bool = False,
) -> Tensor:
    """See `reference_sharding.experts_share`."""
    tensors = (x_TD, gate_up_EDF, down_EFD, weights_TK, expert_ids_TK)
    scales = (gate_up_scale_EF, down_scale_ED)
    if can_be_fast(x_TD):
        from openkeye.kernels.expert_shares import experts_share as fast_share

        alike = (x_TD, gate_up_EDF, down_EFD) if gate_up_scale_EF is None else (x_TD,)
        if serves("experts_share", alike, True, "tokens and projections of any shape"):
            return fast_share(*tensors, first_expert, *scales)
    return reference_sharding.experts_share(*tensors, first_expert, *scales, has_fixed_blocks)


def scores_in_pages(
    index_query_BJI: Tensor, gates_BJ: Tensor, caches: LayerCaches, page_table_BP: Tensor, lengths_B: Tensor
) -> Tensor:
    """See `reference.indexer_decode`: [B, P * page_size]."""
    assert caches.index_key_SI is not None
    num_columns = page_table_BP.shape[1] * caches.page_size
    tensors = (index_query_BJI, gates_BJ, caches.index_key_SI, page_table_BP, lengths_B, num_columns, caches.index_scales_S)
    if can_be_fast(gates_BJ):
        from openkeye.kernels import indexer_decode as fast

        num_requests, num_heads, width = index_query_BJI.shape
        is_served = width in fast.WIDTHS and num_heads <= fast.MAX_HEADS and num_requests <= fast.MAX_REQUESTS
        served = f"an indexer of one of {fast.WIDTHS}, pages of a multiple of 16 tokens"
        if serves("scores_in_pages", (gates_BJ,), is_served and caches.page_size % 16 == 0, served):
            return fast.indexer_decode(*tensors, page_size=caches.page_size)
    return reference.indexer_decode(*tensors, page_size=caches.page_size)


def top_k_positions(scores_TS: Tensor, k: int, num_valid_T: Tensor) -> Tensor:
    """See `reference.top_k_positions`."""
    if scores_TS.is_cuda and scores_TS.dtype == torch.float32:
        from openkeye.kernels import top_k as fast

        if k <= fast.MAX_K:
            return fast.top_k_positions(scores_TS, k, num_valid_T)
    return reference.top_k_positions(scores_TS, k, num_valid_T)
