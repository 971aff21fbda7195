"""What learning alone needs, in plain PyTorch with autograd: the indexer's losses, the head's cross entropy, replayed routes.

The definitions, beside those of `reference`.

Letters as in `reference`. All pairs stand in memory while gradients are wanted.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from openkeye.kernels.reference import index_scores, slab_rows, widen


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
) -> tuple[Tensor, Tensor]:
    """(sum of weights * KL(p || softmax(I)), KL [T] without gradient) over the keys that each query sees (report, warm-up).

    p is the mean over heads of the attention probabilities, from detached queries and keys. One target a KV head has the same
    gradient: every head's probabilities sum to one.

    Args:
        query_positions_T: the last key that each query sees.
        first_keys_T: the first one; None: 0.
        weights_T: of each query in the loss; None: 1 / T.
    """
    columns = torch.arange(key_SGD.shape[0], device=key_SGD.device)
    is_visible_TS = columns <= query_positions_T[:, None]
    if first_keys_T is not None:
        is_visible_TS &= columns >= first_keys_T[:, None]
    return masked_indexer_loss(query_THD, key_SGD, index_query_TJI, gates_TJ, index_key_SI, is_visible_TS, scale, weights_T)


def masked_indexer_loss(
    query_THD: Tensor,
    key_SGD: Tensor,
    index_query_TJI: Tensor,
    gates_TJ: Tensor,
    index_key_SI: Tensor,
    is_visible_TS: Tensor,
    scale: float,
    weights_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`dense_indexer_loss` with what each query sees as a mask; a row that sees nothing gives 0."""
    target_TS = mean_probabilities(query_THD, key_SGD, is_visible_TS, scale)
    return _weighted(_divergence(target_TS, index_scores(index_query_TJI, gates_TJ, index_key_SI), is_visible_TS), weights_T)


@torch.no_grad()
def mean_probabilities(query_THD: Tensor, key_SGD: Tensor, is_visible_TS: Tensor, scale: float) -> Tensor:
    """Attention's probabilities, mean over heads, [T, S]; zeros where a query sees nothing."""
    num_heads = query_THD.shape[1]
    keys_HDS = widen(key_SGD).repeat_interleave(num_heads // key_SGD.shape[1], dim=1).permute(1, 2, 0)
    total_TS = torch.zeros(is_visible_TS.shape, dtype=keys_HDS.dtype, device=key_SGD.device)
    for head, keys_DS in enumerate(keys_HDS):
        logits = (widen(query_THD[:, head]) @ keys_DS * scale).masked_fill(~is_visible_TS, -torch.inf)
        total_TS += logits.softmax(dim=1).nan_to_num(nan=0.0)
    return total_TS / num_heads


def selected_probabilities(
    query_THD: Tensor, key_SGD: Tensor, indices_TK: Tensor, scale: float, dense_lse_TH: Tensor | None = None
) -> Tensor:
    """What the indexer learns from in the sparse adaptation, [T, K] in the lists' order, up to a factor a row.

    Without dense_lse_TH every head's softmax over its list, summed over heads. With it (`attention_lse` over all visible keys)
    the dense probabilities, summed over the heads of a KV head, cut to the list, normalised, and summed over KV heads.
    """
    num_groups = key_SGD.shape[1]
    keys_TKGD = widen(key_SGD.detach())[indices_TK.clamp_min(0).long()]
    query_TGRD = widen(query_THD.detach()).unflatten(1, (num_groups, -1))
    scores_TGRK = torch.einsum("tgrd,tkgd->tgrk", query_TGRD, keys_TKGD) * scale
    scores_TGRK = scores_TGRK.masked_fill((indices_TK < 0)[:, None, None], -torch.inf)
    if dense_lse_TH is None:
        return scores_TGRK.softmax(dim=3).nan_to_num(nan=0.0).sum(dim=(1, 2))
    kept_TGK = (scores_TGRK - dense_lse_TH.unflatten(1, (num_groups, -1)).unsqueeze(3)).exp().nan_to_num(nan=0.0).sum(dim=2)
    return (kept_TGK / kept_TGK.sum(dim=2, keepdim=True).clamp_min(1e-30)).sum(dim=1)


def sparse_indexer_loss(
    probabilities_TK: Tensor,
    index_query_TJI: Tensor,
    gates_TJ: Tensor,
    index_key_SI: Tensor,
    indices_TK: Tensor,
    weights_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(sum of weights * KL(p || softmax(I)), KL [T] without gradient) over each query's list (report, sparse adaptation).

    p is probabilities_TK (`selected_probabilities`) divided by each row's sum; a row of -1 gives 0.
    """
    keys_TKI = widen(index_key_SI)[indices_TK.clamp_min(0).long()]
    products_TJK = (widen(index_query_TJI) @ keys_TKI.transpose(1, 2)).relu()
    scores_TK = (widen(gates_TJ)[:, None] @ products_TJK)[:, 0]
    return _weighted(_divergence(widen(probabilities_TK.detach()), scores_TK, indices_TK >= 0), weights_T)


def _divergence(target_TS: Tensor, scores_TS: Tensor, is_seen_TS: Tensor) -> Tensor:
    """KL(target / its sum || softmax(scores)) over what is seen, [T]; 0 where nothing is."""
    # Finite fills and masks before the products: 0 * (0 - inf) is NaN, in the value or in its gradient.
    target = target_TS.masked_fill(~is_seen_TS, 0.0)
    target = target / target.sum(dim=1, keepdim=True).clamp_min(1e-30)
    log_probability = scores_TS.masked_fill(~is_seen_TS, -1e30).log_softmax(dim=1).masked_fill(~is_seen_TS, 0.0)
    return (target * (target.clamp_min(1e-37).log() - log_probability)).sum(dim=1)


def _weighted(divergence_T: Tensor, weights_T: Tensor | None) -> tuple[Tensor, Tensor]:
    weights = torch.full_like(divergence_T, 1 / max(1, divergence_T.shape[0])) if weights_T is None else weights_T.detach()
    return (weights * divergence_T).sum(), divergence_T.detach()


class TokenLosses(NamedTuple):
    """What `cross_entropy` says of each token, all [T]; zeros, and -1 for best_T, where a token has no label."""

    loss_T: Tensor
    # weight * -log p(label), fp32 as all but best_T
    log_probability_T: Tensor
    # log p(label)
    lse_T: Tensor
    # logarithm of the softmax's sum
    entropy_T: Tensor
    # of the softmax, in nats; without gradient
    best_T: Tensor
    # int64, the likeliest entry of the vocabulary, the smaller of equals; without gradient


def cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    token_weights_T: Tensor | None = None,
    max_scratch_bytes: int | None = None,
) -> TokenLosses:
    """Cross entropy of softmax(hidden weight^T) with one label a token; a negative label leaves its token out.

    Learning keeps the logits [T, V]; without gradients only those of a slab of tokens stand in memory at a time.
    """
    slab = slab_rows(4 * weight_VD.shape[0] * widen(hidden_TD[:0]).element_size(), max_scratch_bytes, hidden_TD.device)
    is_learnt = labels_T >= 0
    parts = []
    for start in range(0, max(1, labels_T.shape[0]), slab):
        logits = widen(hidden_TD[start : start + slab]) @ widen(weight_VD).t()
        labels = labels_T[start : start + slab].clamp_min(0)[:, None]
        lse = logits.logsumexp(dim=-1)
        still = logits.detach()
        mean = (still.softmax(dim=-1) * still).sum(dim=-1)
        parts.append((logits.gather(1, labels)[:, 0] - lse, lse, lse.detach() - mean, still.argmax(dim=-1)))
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    log_probability, lse, entropy = (torch.where(is_learnt, column, 0.0) for column in columns[:3])
    loss = -log_probability if token_weights_T is None else -log_probability * widen(token_weights_T)
    return TokenLosses(loss, log_probability, lse, entropy, torch.where(is_learnt, columns[3], -1))


def route_as(logits_TE: Tensor, expert_ids_TK: Tensor, is_normalised: bool) -> tuple[Tensor, Tensor]:
    """`route` to experts that were chosen before: only the choice is replayed, the weights are those of these logits.

    They come from the softmax over all experts, so that an expert which these logits would not choose has a gradient too. Where
    the choice is that of these logits, in its order, everything is the same to the last bit.

    expert_ids_TK: whole numbers, no expert twice in a row; a row of -1 is routed by its logits.
    """
    probability_TE = widen(logits_TE).softmax(dim=-1)
    own_TK = probability_TE.detach().topk(expert_ids_TK.shape[1], dim=-1).indices
    ids_TK = torch.where(expert_ids_TK < 0, own_TK, expert_ids_TK.long())
    weights = probability_TE.gather(1, ids_TK)
    if is_normalised:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(logits_TE.dtype), ids_TK
