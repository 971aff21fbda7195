"""How well the indexer chooses, measured on a few tokens of a pack: recall, attention mass, unique keys. Without gradients.

Letters: T tokens of the pack, R tokens of a sampled run, S keys of its document, H query heads, G KV heads, K picked keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from openkeye.kernels.dispatch import index_scores, top_k_positions, widen
from openkeye.kernels.visible_keys import Span, VisibleKeys, branches_of
from openkeye.model.past import IndexerOutput

RUN = 16
# neighbouring tokens, as many as one tile of the sparse attention kernels holds
NUM_RUNS = 8
# of a pack, evenly spread over its tokens that see more than k keys


@dataclass(frozen=True)
class SampledRun:
    """Up to RUN neighbouring tokens of one segment that all see more than k keys."""

    span: Span
    start: int
    end: int


def sample_runs(visible: VisibleKeys, k: int) -> list[SampledRun]:
    """The runs to measure on, always the same ones of a layout; whole ones where there are any."""
    runs = []
    for span in visible.spans:
        num_trunk = span.trunk_end - span.start
        segments = [(span.start, span.trunk_end, 0), *((*branch, num_trunk) for branch in branches_of(span))]
        for start, end, num_before in segments:
            # The first token that sees more than k keys.
            first = start + max(0, k - num_before)
            runs += [SampledRun(span, begin, min(begin + RUN, end)) for begin in range(first, end, RUN)]
    whole = [run for run in runs if run.end - run.start == RUN] or runs
    count = min(NUM_RUNS, len(whole))
    return [whole[(2 * number + 1) * len(whole) // (2 * count)] for number in range(count)]


@torch.no_grad()
def measure(
    query_THD: Tensor,
    key_TGD: Tensor,
    index: IndexerOutput,
    picked_TK: Tensor | None,
    visible: VisibleKeys,
    runs: list[SampledRun],
    k: int,
    scale: float,
) -> dict[str, Tensor]:
    """Scalars on the device: averages over the runs' tokens, NaN where there are no runs.

    `indexer_recall`: share of attention's own k likeliest keys (mean over heads) that the indexer picks. `indexer_mass`: the
    attention probability inside its pick. `indexer_unique_keys`: different keys that a run of 16 tokens picks between them.
    """
    sums = torch.zeros(3, dtype=torch.float32, device=query_THD.device)
    num_tokens = sum(run.end - run.start for run in runs)
    for run in runs:
        rows = slice(run.start, run.end)
        columns = torch.arange(run.span.start, run.span.end, device=query_THD.device)
        keys = slice(run.span.start, run.span.end)
        is_visible_RS = visible.mask(torch.arange(run.start, run.end, device=columns.device), columns)
        target_RS = _mean_probabilities(query_THD[rows], key_TGD[keys], is_visible_RS, scale)
        if picked_TK is None:
            scores_RS = index_scores(index.query_TJI[rows], index.gates_TJ[rows], index.key_TI[keys])
            picked_RK = _best(scores_RS, is_visible_RS, k)
        else:
            picked_RK = picked_TK[rows].long() - run.span.start
        is_picked_RS = torch.zeros_like(is_visible_RS).scatter_(1, picked_RK, True)
        recall = is_picked_RS.gather(1, _best(target_RS, is_visible_RS, k)).sum() / k
        mass = (target_RS * is_picked_RS).sum()
        unique = is_picked_RS.any(dim=0).sum() * (run.end - run.start)
        sums += torch.stack([recall.float(), mass.float(), unique.float()])
    means = sums / num_tokens if num_tokens else torch.full_like(sums, torch.nan)
    return dict(zip(("indexer_recall", "indexer_mass", "indexer_unique_keys"), means.unbind(), strict=True))


def _mean_probabilities(query_RHD: Tensor, key_SGD: Tensor, is_visible_RS: Tensor, scale: float) -> Tensor:
    keys_HDS = widen(key_SGD).repeat_interleave(query_RHD.shape[1] // key_SGD.shape[1], dim=1).permute(1, 2, 0)
    logits_HRS = widen(query_RHD).transpose(0, 1) @ keys_HDS * scale
    return logits_HRS.masked_fill(~is_visible_RS, -torch.inf).softmax(dim=-1).mean(dim=0)


def _best(scores_RS: Tensor, is_visible_RS: Tensor, k: int) -> Tensor:
    """[R, k] int64: the k best visible keys of each token; all see more than k."""
    scores = scores_RS.masked_fill(~is_visible_RS, -torch.inf)
    num_columns = torch.full((scores.shape[0],), scores.shape[1], dtype=torch.int32, device=scores.device)
    return top_k_positions(scores, k, num_columns).long()
