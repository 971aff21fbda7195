"""What the lightning indexer learns from, in Triton: how far its distribution is from attention's, and the gradients of that.

Twins: the functions of the same names in `reference_learning`. Nothing here reaches the trunk: attention's queries and keys
only make the target. A query's loss is KL(p || softmax(I)), where p are the attention probabilities, summed over heads and
divided by their sum. Its gradient with respect to I, weight * (softmax(I) - p), is known as soon as both distributions are:
the forward pass makes the gradients and the backward pass only scales them, so that attention's probabilities are made once.
They and the scores stand in memory for a slab of queries at a time (dense) or for the selected keys (sparse), never for all
pairs.

Letters as in `sparse_attention`; J indexer heads, I indexer width, R rows of a slab, B queries of a program.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from openkeye.kernels.attention_lse import attention_lse
from openkeye.kernels.indexer_gradients import ROWS, IndexerGradients, check_indexer
from openkeye.kernels.sparse_attention import sparse_attention_with_lse
from openkeye.kernels.sparse_attention_backward import sparse_attention_backward, summed_probabilities
from openkeye.kernels.unions import TILE, Unions, build_unions

SLAB_BYTES = 512 << 20
# of probabilities and scores that stand in memory at a time
TEACHERS = {
    "64 x 128": {"BLOCK_QUERIES": 64, "BLOCK": 128, "num_warps": 4, "num_stages": 3},
    "64 x 128, two stages": {"BLOCK_QUERIES": 64, "BLOCK": 128, "num_warps": 4, "num_stages": 2},
    "128 x 128": {"BLOCK_QUERIES": 128, "BLOCK": 128, "num_warps": 8, "num_stages": 3},
    "64 x 64": {"BLOCK_QUERIES": 64, "BLOCK": 64, "num_warps": 4, "num_stages": 3},
}
# Tiles of pairs. On Hopper two programs of the first share an SM: one exponentiates while the other multiplies. The last has
# no spills where products stay in more registers.


def default_teacher(device: torch.device) -> str:
    """The tile of pairs that suits the device."""
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return "64 x 128" if is_hopper else "64 x 64"


def dense_indexer_loss(
    query_THD: Tensor,
    key_SGD: Tensor,
    index_query_TJI: Tensor,
    gates_TJ: Tensor,
    index_key_SI: Tensor,
    query_positions_T: Tensor,
    scale: float,
    first_keys_T: Tensor | None = None,
    weights_T: Tensor | None = None,
    lse_TH: Tensor | None = None,
    slab_bytes: int = SLAB_BYTES,
    teacher: str | None = None,
    gaps: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The warm-up's loss over all keys that a query sees: (sum of weights * KL, KL [T] float32 without gradient).

    The target is the mean over all heads of the attention probabilities. One target a KV head, each normalised, has the same
    gradient and another loss: every head's probabilities sum to one. The same bits on every run; memory is O(T) and a slab.

    Args:
        query_THD, key_SGD: attention's own, after rotary; they get no gradient.
        index_query_TJI, gates_TJ, index_key_SI: the indexer's; gates already scaled by I ** -0.5.
        query_positions_T, first_keys_T, gaps: as in `attention_lse`.
        weights_T: of each query in the loss, so that packing does not change it; None: 1 / T.
        lse_TH: `attention_lse` where the forward pass has it already.
        slab_bytes: bound on probabilities and scores that stand in memory at a time (at least one query's).
        teacher: a name in TEACHERS; None takes the device's own.

    Raises:
        ValueError: tensors that are not served.
    """
    check_indexer(index_query_TJI, gates_TJ, index_key_SI)
    with torch.no_grad():
        if lse_TH is None:
            lse_TH = attention_lse(query_THD, key_SGD, query_positions_T, scale, first_keys_T, gaps)
        first_keys = torch.zeros_like(query_positions_T) if first_keys_T is None else first_keys_T.to(query_positions_T.dtype)
        wants = _wants_gradients(index_query_TJI, gates_TJ, index_key_SI)
        gradients = IndexerGradients(index_query_TJI, gates_TJ, index_key_SI) if wants else None
        weights = _weights(weights_T, gates_TJ)
        divergence = torch.empty_like(weights)
        num_queries, num_keys = query_THD.shape[0], key_SGD.shape[0]
        slab = min(num_queries, max(1, slab_bytes // (8 * num_keys)))
        probabilities, scores = (torch.empty(slab, num_keys, dtype=torch.float32, device=key_SGD.device) for _ in range(2))
        for start in range(0, num_queries, slab):
            rows = slice(start, min(start + slab, num_queries))
            positions, first = query_positions_T[rows], first_keys[rows]
            trunk = (query_THD[rows], key_SGD, lse_TH[rows], scale)
            indexer = (index_query_TJI[rows], gates_TJ[rows], index_key_SI)
            its_gaps = None if gaps is None else (gaps[0][rows], gaps[1][rows])
            _fill_slab(trunk, indexer, positions, first, probabilities, scores, teacher, its_gaps)
            _compare_rows(probabilities, scores, first, positions + 1, weights[rows], divergence[rows], wants, its_gaps)
            if gradients is not None:
                gradients.add_dense(probabilities, rows, positions, first, its_gaps)
    return _attach(divergence, weights, gradients, index_query_TJI, gates_TJ, index_key_SI), divergence


def selected_probabilities(
    query_THD: Tensor,
    key_SGD: Tensor,
    indices_TK: Tensor,
    scale: float,
    dense_lse_TH: Tensor | None = None,
    unions: Unions | None = None,
    lse_TH: Tensor | None = None,
) -> Tensor:
    """The target of `sparse_indexer_loss`, not yet divided by its sum: float32 [T, K] in the order of ascending keys.

    Two definitions, which differ in whether heads are normalised on the selection before or after they are added up:

    - "sparse" (without dense_lse_TH): every head's softmax over the selection, summed over all heads. Each head counts alike.
      `sparse_attention_backward` makes the same on its way.
    - "renormalised" (with dense_lse_TH, the `attention_lse` over all visible keys): the heads of one KV head are added as
      dense probabilities, cut to the selection, and that sum is normalised; the KV heads count alike. A head counts for as
      much as the probability that its own dense softmax leaves inside the selection. This is the report's wording.

    A single head's dense probability, renormalised on the selection, is its sparse softmax: with one query head a KV head
    the two are the same.

    Args:
        indices_TK: ascending, -1 at the end of rows with fewer than K keys.
        unions, lse_TH: of the selection, where they are at hand already.
    """
    unions = unions or build_unions(indices_TK, key_SGD.shape[0])
    if lse_TH is None:
        lse_TH = sparse_attention_with_lse(query_THD, key_SGD, key_SGD, indices_TK, scale, unions)[1]
    if dense_lse_TH is not None:
        # sum over h of exp(s - dense_h) / mass_g, as exp(s - (dense_h + log mass_g)); mass_g: what the selection holds.
        kept_TGR = (lse_TH - dense_lse_TH).unflatten(1, (key_SGD.shape[1], -1))
        lse_TH = dense_lse_TH + kept_TGR.logsumexp(dim=2, keepdim=True).expand_as(kept_TGR).flatten(1)
        lse_TH = lse_TH.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    return summed_probabilities(query_THD, key_SGD, unions, lse_TH, indices_TK.shape[1], scale)


def sparse_indexer_loss(
    probabilities_TK: Tensor,
    index_query_TJI: Tensor,
    gates_TJ: Tensor,
    index_key_SI: Tensor,
    indices_TK: Tensor,
    weights_T: Tensor | None = None,
    unions: Unions | None = None,
    is_deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """The sparse adaptation's loss over the selected keys: (sum of weights * KL, KL [T] float32 without gradient).

    Args:
        probabilities_TK: the target, of either definition of `selected_probabilities`; divided by each row's sum here.
        index_query_TJI, gates_TJ, index_key_SI: the indexer's; gates already scaled by I ** -0.5.
        indices_TK: int32, ascending, -1 at the end of rows with fewer than K keys; a row of -1 gives 0 and no gradient.
        weights_T: of each query in the loss; None: 1 / T.
        unions: `build_unions(indices_TK, S)` where it is at hand already.
        is_deterministic: the keys' gradient has the same bits on every run; all else has them always.

    Raises:
        ValueError: tensors that are not served.
    """
    with torch.no_grad():
        weights = _weights(weights_T, gates_TJ)
        wants = _wants_gradients(index_query_TJI, gates_TJ, index_key_SI)
        unions = unions or build_unions(indices_TK, index_key_SI.shape[0])
        divergence, gradients = _learn_selected(
            probabilities_TK, index_query_TJI, gates_TJ, index_key_SI, unions, weights, is_deterministic, wants
        )
    return _attach(divergence, weights, gradients, index_query_TJI, gates_TJ, index_key_SI), divergence


class TeachingAttention(torch.autograd.Function):
    """`sparse_attention` whose backward pass also gives the indexer its gradient, from the probabilities that it makes anyway.

    Beside the output it returns the sum of weights * KL ("sparse" target) as a scalar whose value is 0, since nobody knows it
    before the backward pass, and whose gradient is right: what comes in through it scales the indexer's gradients, and where
    nothing comes in they are None. The divergences themselves are then written into divergence_T.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query_THD: Tensor,
        key_SGD: Tensor,
        value_SGD: Tensor,
        index_query_TJI: Tensor,
        gates_TJ: Tensor,
        index_key_SI: Tensor,
        indices_TK: Tensor,
        weights_T: Tensor,
        divergence_T: Tensor,
        scale: float,
        is_deterministic: bool,
    ) -> tuple[Tensor, Tensor]:
        """See `reference.sparse_attention`; the loss besides."""
        check_indexer(index_query_TJI, gates_TJ, index_key_SI)
        unions = build_unions(indices_TK, key_SGD.shape[0])
        output, lse = sparse_attention_with_lse(query_THD, key_SGD, value_SGD, indices_TK, scale, unions)
        lists = (unions.keys_NU, unions.masks_NU, unions.counts_N)
        ctx.save_for_backward(
            query_THD,
            key_SGD,
            value_SGD,
            output,
            lse,
            index_query_TJI,
            gates_TJ,
            index_key_SI,
            _weights(weights_T, gates_TJ),
            *lists,
        )
        ctx.set_materialize_grads(False)
        # Not saved as the others are: it is written to, and no gradient is made from it.
        ctx.divergence_T = divergence_T  # type: ignore[attr-defined]
        ctx.scale, ctx.top_k = scale, indices_TK.shape[1]  # type: ignore[attr-defined]
        ctx.is_deterministic = is_deterministic  # type: ignore[attr-defined]
        return output, torch.zeros((), dtype=torch.float32, device=output.device)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the trunk's and the indexer's three tensors, none for lists and settings."""
        saved = ctx.saved_tensors  # type: ignore[attr-defined]
        query, key, value, output, lse, index_query, gates, index_key, weights, *lists = saved
        output_gradient, loss_gradient = gradients
        unions = Unions(*lists)
        made = sparse_attention_backward(
            query,
            key,
            value,
            unions,
            output,
            lse,
            torch.zeros_like(output) if output_gradient is None else output_gradient,
            ctx.scale,  # type: ignore[attr-defined]
            ctx.is_deterministic,  # type: ignore[attr-defined]
            top_k=None if loss_gradient is None else ctx.top_k,  # type: ignore[attr-defined]
        )
        trunk: tuple[Tensor | None, ...] = (None, None, None)
        if output_gradient is not None:
            trunk = (made.query_THD, made.key_SGD.to(key.dtype), made.value_SGD.to(value.dtype))
        if loss_gradient is None:
            return (*trunk, *[None] * 8)
        assert made.probabilities_TK is not None
        its_divergence, its = _learn_selected(
            made.probabilities_TK,
            index_query,
            gates,
            index_key,
            unions,
            weights,
            ctx.is_deterministic,  # type: ignore[attr-defined]
            True,
        )
        ctx.divergence_T.copy_(its_divergence)  # type: ignore[attr-defined]
        assert its is not None
        indexer = ((tensor * loss_gradient).to(tensor.dtype) for tensor in its.tensors())
        return (*trunk, *indexer, *[None] * 5)


class _Carry(torch.autograd.Function):
    """The loss, with gradients that were made along with it."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        loss: Tensor,
        made: tuple[Tensor, Tensor, Tensor],
        index_query_TJI: Tensor,
        gates_TJ: Tensor,
        index_key_SI: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*made)
        return loss.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        made = ctx.saved_tensors  # type: ignore[attr-defined]
        return (None, None, *((tensor * gradients[0]).to(tensor.dtype) for tensor in made))


def _attach(divergence_T: Tensor, weights_T: Tensor, gradients: IndexerGradients | None, *leaves: Tensor) -> Tensor:
    loss = (divergence_T * weights_T).sum()
    return loss if gradients is None else _Carry.apply(loss, gradients.tensors(), *leaves)


def _wants_gradients(*leaves: Tensor) -> bool:
    return any(leaf.requires_grad for leaf in leaves)


def _weights(weights_T: Tensor | None, gates_TJ: Tensor) -> Tensor:
    num_queries = gates_TJ.shape[0]
    if weights_T is None:
        return torch.full((num_queries,), 1 / max(1, num_queries), dtype=torch.float32, device=gates_TJ.device)
    return weights_T.detach().float().contiguous()


def _fill_slab(
    trunk: tuple[Tensor, Tensor, Tensor, float],
    indexer: tuple[Tensor, Tensor, Tensor],
    positions_R: Tensor,
    first_keys_R: Tensor,
    probabilities_RS: Tensor,
    scores_RS: Tensor,
    teacher: str | None = None,
    gaps: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Attention's mean probabilities and the indexer's scores of a slab of queries, in every tile with a visible pair."""
    query, key, lse, scale = trunk
    index_query, gates, index_key = indexer
    num_rows, num_heads, width = query.shape
    constants = TEACHERS[teacher or default_teacher(query.device)]
    grid = (triton.cdiv(key.shape[0], constants["BLOCK"]), triton.cdiv(num_rows, constants["BLOCK_QUERIES"]))
    _teach[grid](
        query.contiguous(),
        key,
        lse.contiguous(),
        positions_R,
        first_keys_R,
        *(gaps or (positions_R, positions_R)),
        index_query.contiguous(),
        gates.contiguous(),
        index_key,
        probabilities_RS,
        scores_RS,
        num_rows,
        key.shape[0],
        key.stride(0),
        key.stride(1),
        index_key.stride(0),
        probabilities_RS.stride(0),
        scale * math.log2(math.e),
        HEADS=num_heads,
        GROUP=num_heads // key.shape[1],
        WIDTH=width,
        INDEX_HEADS=index_query.shape[1],
        INDEX_WIDTH=index_query.shape[2],
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        INDEX_PRECISION="ieee" if index_query.dtype == torch.float32 else "tf32",
        HAS_GAPS=gaps is not None,
        **constants,
    )


def _compare_rows(
    probabilities: Tensor,
    scores: Tensor,
    begins_R: Tensor | None,
    ends_R: Tensor,
    weights_R: Tensor,
    divergence_R: Tensor,
    writes: bool,
    gaps: tuple[Tensor, Tensor] | None = None,
) -> None:
    """The divergence of each row between its begin and end and, in the probabilities' place, its gradient for the scores."""
    _compare[(weights_R.shape[0],)](
        probabilities,
        scores,
        ends_R if begins_R is None else begins_R,
        ends_R,
        *(gaps or (ends_R, ends_R)),
        weights_R,
        divergence_R,
        probabilities.stride(0),
        HAS_BEGINS=begins_R is not None,
        HAS_GAPS=gaps is not None,
        WRITES=writes,
        BLOCK=2048,
        num_warps=8,
    )


def _learn_selected(
    probabilities_TK: Tensor,
    index_query_TJI: Tensor,
    gates_TJ: Tensor,
    index_key_SI: Tensor,
    unions: Unions,
    weights_T: Tensor,
    is_deterministic: bool,
    wants: bool,
) -> tuple[Tensor, IndexerGradients | None]:
    """Divergence [T] of the selected keys and, where wanted, the gradients of sum of weights * divergence."""
    check_indexer(index_query_TJI, gates_TJ, index_key_SI)
    num_queries, num_heads, width = index_query_TJI.shape
    differences = probabilities_TK.float().clone(memory_format=torch.contiguous_format)
    scores = torch.empty_like(differences)
    counts = torch.empty(num_queries, dtype=torch.int32, device=scores.device)
    block_queries = min(TILE, ROWS // num_heads)
    _score_selected[(unions.counts_N.shape[0], TILE // block_queries)](
        index_query_TJI.contiguous(),
        gates_TJ.contiguous(),
        index_key_SI,
        unions.keys_NU,
        unions.masks_NU,
        unions.counts_N,
        scores,
        counts,
        num_queries,
        unions.keys_NU.shape[1],
        scores.stride(0),
        index_key_SI.stride(0),
        HEADS=num_heads,
        WIDTH=width,
        TILE=TILE,
        BLOCK_QUERIES=block_queries,
        BLOCK=128,
        PRECISION="ieee" if index_key_SI.dtype == torch.float32 else "tf32",
        num_warps=8 if block_queries * num_heads == ROWS else 4,
        num_stages=5,
    )
    divergence = torch.empty_like(weights_T)
    _compare_rows(differences, scores, None, counts, weights_T, divergence, wants)
    if not wants:
        return divergence, None
    gradients = IndexerGradients(index_query_TJI, gates_TJ, index_key_SI)
    gradients.add_selected(differences, unions, is_deterministic)
    return divergence, gradients


@triton.jit
def _teach(
    query,
    key,
    lse,
    positions,
    first_keys,
    gap_starts,
    gap_ends,
    index_query,
    gates,
    index_key,
    probabilities,
    scores,
    num_queries,
    num_keys,
    key_row,
    key_group,
    index_key_row,
    slab_row,
    scale_log2,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    INDEX_HEADS: tl.constexpr,
    INDEX_WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX_PRECISION: tl.constexpr,
    HAS_GAPS: tl.constexpr,
):
    """A tile of pairs: one head after the other, so that sums over heads stay where the products come out."""
    first_column = tl.program_id(0) * BLOCK
    token = tl.program_id(1) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    is_query = token < num_queries
    last_Q = tl.load(positions + token, mask=is_query, other=-1).to(tl.int32)
    first_Q = tl.load(first_keys + token, mask=is_query, other=num_keys).to(tl.int32)
    if (first_column <= tl.max(last_Q, 0)) & (first_column + BLOCK > tl.min(first_Q, 0)):
        wide_token = token.to(tl.int64)
        column = first_column + tl.arange(0, BLOCK)
        is_key = column < num_keys
        dim = tl.arange(0, WIDTH)
        p_QN = tl.zeros([BLOCK_QUERIES, BLOCK], tl.float32)
        for group in range(HEADS // GROUP):
            place_ND = group * key_group + column.to(tl.int64)[:, None] * key_row + dim[None, :]
            k_ND = tl.load(key + place_ND, mask=is_key[:, None], other=0.0)
            for in_group in range(GROUP):
                place_Q = wide_token * HEADS + group * GROUP + in_group
                q_QD = tl.load(query + place_Q[:, None] * WIDTH + dim[None, :], mask=is_query[:, None], other=0.0)
                lse_Q = tl.load(lse + place_Q, mask=is_query, other=float("inf"))
                lse_Q = tl.where(lse_Q == float("-inf"), float("inf"), lse_Q * 1.4426950408889634)
                s_QN = tl.dot(q_QD, tl.trans(k_ND), input_precision=PRECISION)
                p_QN += tl.exp2(s_QN * scale_log2 - lse_Q[:, None])
        is_visible = (column[None, :] <= last_Q[:, None]) & (column[None, :] >= first_Q[:, None]) & is_key[None, :]
        if HAS_GAPS:
            gap_start_Q = tl.load(gap_starts + token, mask=is_query, other=0)
            gap_end_Q = tl.load(gap_ends + token, mask=is_query, other=0)
            is_visible &= (column[None, :] < gap_start_Q[:, None]) | (column[None, :] >= gap_end_Q[:, None])
        place_QN = wide_token[:, None] * slab_row + column[None, :]
        tl.store(probabilities + place_QN, p_QN * (1.0 / HEADS), mask=is_visible)
        index_dim = tl.arange(0, INDEX_WIDTH)
        place_NI = column.to(tl.int64)[:, None] * index_key_row + index_dim[None, :]
        k_NI = tl.load(index_key + place_NI, mask=is_key[:, None], other=0.0)
        i_QN = tl.zeros([BLOCK_QUERIES, BLOCK], tl.float32)
        for head in range(INDEX_HEADS):
            place_Q = wide_token * INDEX_HEADS + head
            q_QI = tl.load(index_query + place_Q[:, None] * INDEX_WIDTH + index_dim[None, :], mask=is_query[:, None], other=0.0)
            gate_Q = tl.load(gates + place_Q, mask=is_query, other=0.0).to(tl.float32)
            i_QN += tl.maximum(tl.dot(q_QI, tl.trans(k_NI), input_precision=INDEX_PRECISION), 0.0) * gate_Q[:, None]
        tl.store(scores + place_QN, i_QN, mask=is_visible)


@triton.jit
def _compare(
    probabilities,
    scores,
    begins,
    ends,
    gap_starts,
    gap_ends,
    weights,
    divergence,
    slab_row,
    HAS_BEGINS: tl.constexpr,
    HAS_GAPS: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    end = tl.load(ends + row).to(tl.int32)
    begin = 0
    if HAS_BEGINS:
        begin = tl.load(begins + row).to(tl.int32)
    gap_start, gap_end = end, end
    if HAS_GAPS:
        gap_start, gap_end = tl.load(gap_starts + row).to(tl.int32), tl.load(gap_ends + row).to(tl.int32)
    probabilities += row * slab_row
    scores += row * slab_row
    # Every lane keeps its own sums, which meet once at the end.
    top_N = tl.full([BLOCK], float("-inf"), tl.float32)
    total_N = tl.zeros([BLOCK], tl.float32)
    sum_N = tl.zeros([BLOCK], tl.float32)
    entropy_N = tl.zeros([BLOCK], tl.float32)
    cross_N = tl.zeros([BLOCK], tl.float32)
    first = begin // BLOCK * BLOCK
    for start in range(first, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_seen = (column >= begin) & (column < end) & ((column < gap_start) | (column >= gap_end))
        p_N = tl.load(probabilities + column, mask=is_seen, other=0.0)
        i_N = tl.load(scores + column, mask=is_seen, other=float("-inf"))
        new_top_N = tl.maximum(top_N, i_N)
        safe_N = tl.where(new_top_N == float("-inf"), 0.0, new_top_N)
        total_N = total_N * tl.exp(top_N - safe_N) + tl.exp(i_N - safe_N)
        top_N = new_top_N
        sum_N += p_N
        # Masked before the product: zero times an infinite logarithm or score would be NaN.
        entropy_N += p_N * tl.log(tl.where(p_N > 0, p_N, 1.0))
        cross_N += p_N * tl.where(is_seen, i_N, 0.0)
    top = tl.max(top_N, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    lse = safe + tl.log(tl.maximum(tl.sum(total_N * tl.exp(top_N - safe), 0), 1e-37))
    mass = tl.sum(sum_N, 0)
    has_target = mass > 0
    mass = tl.where(has_target, mass, 1.0)
    kl = (tl.sum(entropy_N, 0) - tl.sum(cross_N, 0)) / mass - tl.log(mass) + lse
    tl.store(divergence + row, tl.where(has_target, kl, 0.0))
    if WRITES:
        weight = tl.where(has_target, tl.load(weights + row), 0.0)
        for start in range(first, end, BLOCK):
            column = start + tl.arange(0, BLOCK)
            is_seen = (column >= begin) & (column < end) & ((column < gap_start) | (column >= gap_end))
            p_N = tl.load(probabilities + column, mask=is_seen, other=0.0)
            i_N = tl.load(scores + column, mask=is_seen, other=0.0)
            tl.store(probabilities + column, weight * (tl.exp(i_N - lse) - p_N / mass), mask=is_seen)


@triton.jit
def _score_selected(
    index_query,
    gates,
    index_key,
    union_keys,
    union_masks,
    union_counts,
    scores,
    counts,
    num_queries,
    room,
    top_k,
    key_row,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of the selected keys in the order of the lists, and how many there are."""
    tile, part = tl.program_id(0), tl.program_id(1)
    in_tile_B = part * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    token_B = tile * TILE + in_tile_B
    row = tl.arange(0, BLOCK_QUERIES * HEADS)
    place_M = (tile * TILE + part * BLOCK_QUERIES).to(tl.int64) * HEADS + row
    is_row = place_M < num_queries.to(tl.int64) * HEADS
    dim = tl.arange(0, WIDTH)
    q_MI = tl.load(index_query + place_M[:, None] * WIDTH + dim[None, :], mask=is_row[:, None], other=0.0)
    gate_M = tl.load(gates + place_M, mask=is_row, other=0.0).to(tl.float32)
    count = tl.load(union_counts + tile)
    union_keys += tile.to(tl.int64) * room
    union_masks += tile.to(tl.int64) * room
    met_B = tl.zeros([BLOCK_QUERIES], tl.int32)
    for start in range(0, count, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_key = column < count
        key_N = tl.load(union_keys + column, mask=is_key, other=0).to(tl.int64)
        bits_N = tl.load(union_masks + column, mask=is_key, other=0)
        k_NI = tl.load(index_key + key_N[:, None] * key_row + dim[None, :], mask=is_key[:, None], other=0.0)
        s_MN = tl.maximum(tl.dot(q_MI, tl.trans(k_NI), input_precision=PRECISION), 0.0) * gate_M[:, None]
        i_BN = tl.sum(tl.reshape(s_MN, (BLOCK_QUERIES, HEADS, BLOCK)), 1)
        is_chosen_BN = (bits_N[None, :] >> in_tile_B[:, None]) & 1
        rank_BN = met_B[:, None] + tl.cumsum(is_chosen_BN, 1) - 1
        is_stored = (is_chosen_BN != 0) & (token_B < num_queries)[:, None]
        tl.store(scores + token_B.to(tl.int64)[:, None] * top_k + rank_BN, i_BN, mask=is_stored)
        met_B += tl.sum(is_chosen_BN, 1)
    tl.store(counts + token_B, met_B, mask=token_B < num_queries)
