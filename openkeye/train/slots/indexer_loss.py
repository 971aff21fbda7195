"""The lightning indexer learns which positions attention would look at (report, dense warm-up and sparse adaptation).

    L = mean over rows of KL( p[t, :] || softmax(I[t, :]) ),   p = mean over heads of the attention probabilities

over all positions that the row may see (warm-up), or over the selected ones (the report's adaptation). What was never selected
has no voice in the second; where only sampled rows are taken the first costs little in the adaptation too. Taking the mean
over the groups instead of one KL a group gives the same gradient, since the two losses differ by a term free of the indexer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from openkeye.model.past import IndexerOutput


@dataclass(frozen=True)
class IndexerLoss:
    """The loss of one layer on the sampled rows, and two figures without gradient."""

    loss: Tensor
    recall: Tensor | None
    # share of attention's own top-k that the indexer's top-k holds, on rows that see more than k positions
    mass: Tensor | None
    # attention probability inside the indexer's top-k, on the same rows; both None where they were not asked for


def index_scores(query_BRJI: Tensor, gates_BRJ: Tensor, key_BLI: Tensor) -> Tensor:
    """I[t, s] = sum_j gate[t, j] relu(q[t, j] . k[s]), float32 [B, R, L] (report, DSA equation)."""
    products_BRJL = (query_BRJI.flatten(1, 2) @ key_BLI.transpose(1, 2)).unflatten(1, query_BRJI.shape[1:3])
    weigh = _compiled_weigh() if products_BRJL.is_cuda else _weigh
    return weigh(products_BRJL, gates_BRJ)


def _weigh(products_BRJL: Tensor, gates_BRJ: Tensor) -> Tensor:
    return (torch.relu(products_BRJL).float() * gates_BRJ.float()[..., None]).sum(dim=2)


@lru_cache(maxsize=1)
def _compiled_weigh() -> Callable[[Tensor, Tensor], Tensor]:
    """`_weigh` in one pass over the products, which are by far the largest tensor of a sparse step."""
    return torch.compile(_weigh, dynamic=True)


def indexer_loss(
    query_BHRD: Tensor,
    key_BHLD: Tensor,
    index: IndexerOutput,
    visible_BRL: Tensor,
    top_k: int,
    selected_BRL: Tensor | None = None,
) -> IndexerLoss:
    """KL of the indexer's distribution against attention's, over the visible or the selected positions of each row.

    Args:
        query_BHRD, key_BHLD: the attention's own queries and keys (heads repeated to H), detached.
        index: the indexer's output for the same rows ([B, R, J, I], [B, R, J]) and all keys ([B, L, I]).
        visible_BRL: bool, at least one True a row.
        top_k: the k of the selection, for the two figures; 0 leaves them out.
        selected_BRL: bool, take the loss over these; the figures always look at all that is visible.
    """
    scale = query_BHRD.shape[-1] ** -0.5
    with torch.no_grad():
        logits = (query_BHRD @ key_BHLD.transpose(2, 3)).float() * scale
        seen_BRL = visible_BRL if selected_BRL is None else selected_BRL
        target = logits.masked_fill(~seen_BRL[:, None], -torch.inf).softmax(dim=-1).mean(dim=1)
    scores = index_scores(index.query_TJI, index.gates_TJ, index.key_TI)
    # A finite fill: minus infinity would turn 0 * (0 - inf) into NaN, in the value or in its gradient.
    log_probability = scores.masked_fill(~seen_BRL, -1e9).log_softmax(dim=-1)
    terms = target * (target.clamp_min(1e-20).log() - log_probability)
    loss = terms.masked_fill(~seen_BRL, 0.0).sum(dim=-1).mean()
    if not top_k:
        return IndexerLoss(loss, None, None)
    with torch.no_grad():
        if selected_BRL is not None:
            target = logits.masked_fill(~visible_BRL[:, None], -torch.inf).softmax(dim=-1).mean(dim=1)
        k = min(top_k, visible_BRL.shape[-1])
        is_long = visible_BRL.sum(dim=-1) > k
        chosen = scores.masked_fill(~visible_BRL, -torch.inf).topk(k, dim=-1, sorted=False).indices
        wanted = torch.zeros_like(target).scatter_(2, target.topk(k, dim=-1, sorted=False).indices, 1.0)
        num_rows = is_long.sum().clamp_min(1)
        recall = (wanted.gather(2, chosen).sum(dim=-1) / k * is_long).sum() / num_rows
        mass = (target.gather(2, chosen).sum(dim=-1) * is_long).sum() / num_rows
    return IndexerLoss(loss, recall, mass)
