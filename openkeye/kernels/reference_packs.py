"""Operations over packs of documents with branches, in plain PyTorch with autograd: the definitions.

They work document by document and may hold a square of one document's tokens, never one of the pack's.
Letters as in `reference`; what a token sees says `visible_keys`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from openkeye.kernels import reference, reference_learning
from openkeye.kernels.reference import widen
from openkeye.kernels.visible_keys import Span, VisibleKeys, branches_of


def branched_attention(
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    visible: VisibleKeys,
    scale: float,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor] = reference.dense_attention,
) -> Tensor:
    """softmax(q . k * scale) v over the keys that each token of the pack sees, [T, H, D]; attend: of one trunk."""
    outputs = []
    for span in visible.spans:
        trunk = slice(span.start, span.trunk_end)
        positions = torch.arange(span.trunk_end - span.start, device=query_THD.device)
        outputs.append(attend(query_THD[trunk], key_TGD[trunk], value_TGD[trunk], positions, scale))
        if span.branches:
            outputs.append(_attend_branches(query_THD, key_TGD, value_TGD, visible, span, scale))
    return torch.cat(outputs)


def _attend_branches(
    query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, visible: VisibleKeys, span: Span, scale: float
) -> Tensor:
    """The branches' tokens of one document, through a mask over all its keys."""
    rows, columns = _numbers(span.trunk_end, span.end, query_THD), _numbers(span.start, span.end, query_THD)
    group = query_THD.shape[1] // key_TGD.shape[1]
    key, value = (widen(x[span.start : span.end]).transpose(0, 1).repeat_interleave(group, dim=0) for x in (key_TGD, value_TGD))
    query = widen(query_THD[span.trunk_end : span.end]).transpose(0, 1)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=visible.mask(rows, columns), scale=scale)
    return output.transpose(0, 1).to(query_THD.dtype)


@torch.no_grad()
def branched_attention_lse(query_THD: Tensor, key_TGD: Tensor, visible: VisibleKeys, scale: float) -> Tensor:
    """log sum exp(q . k * scale) over the keys that each token sees, [T, H], without gradient."""
    group = query_THD.shape[1] // key_TGD.shape[1]
    sums = []
    for span in visible.spans:
        rows = _numbers(span.start, span.end, query_THD)
        is_visible = visible.mask(rows, rows)
        keys_HDS = widen(key_TGD[span.start : span.end]).repeat_interleave(group, dim=1).permute(1, 2, 0)
        query = widen(query_THD[span.start : span.end])
        its_sums = [
            (query[:, head] @ keys_DS * scale).masked_fill(~is_visible, -torch.inf).logsumexp(dim=1)
            for head, keys_DS in enumerate(keys_HDS)
        ]
        sums.append(torch.stack(its_sums, dim=1))
    return torch.cat(sums)


@torch.no_grad()
def branched_select(
    query_TJI: Tensor,
    gates_TJ: Tensor,
    key_TI: Tensor,
    k: int,
    visible: VisibleKeys,
    key_scales_T: Tensor | None = None,
) -> Tensor:
    """Positions in the pack that each token attends to: the k largest `index_scores` of the keys that it sees.

    For a branch the trunk's keys come before its own; equal scores go to the earlier key. Tokens that see at most k keys take
    them all.

    Returns:
        [T, k] int32, ascending, -1 at the end of rows that see fewer than k.
    """
    if key_scales_T is not None:
        query_TJI, gates_TJ = reference.quantized_query(query_TJI, gates_TJ)
    picked = []
    for span in visible.spans:
        for keys, rows in _views(span, key_TI):
            positions = torch.arange(keys.shape[0] - (rows.stop - rows.start), keys.shape[0], device=keys.device)
            scales = None if key_scales_T is None else key_scales_T[keys]
            its_keys = _gather(key_TI, keys)
            columns = reference.indexer_select(query_TJI[rows], gates_TJ[rows], its_keys, k, positions, key_scales_S=scales)
            picked.append(torch.where(columns < 0, -1, keys[columns.clamp_min(0).long()]).int())
    return torch.cat(picked)


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
    """`reference_learning.dense_indexer_loss` over the keys that each token sees: (sum of weights * KL, KL [T]).

    lse_TH is not needed here.
    """
    losses, divergences = [], []
    for span in visible.spans:
        tokens = slice(span.start, span.end)
        rows = _numbers(span.start, span.end, query_THD)
        loss, divergence = reference_learning.masked_indexer_loss(
            query_THD[tokens],
            key_TGD[tokens],
            index_query_TJI[tokens],
            gates_TJ[tokens],
            index_key_TI[tokens],
            visible.mask(rows, rows),
            scale,
            weights_T[tokens],
        )
        losses.append(loss)
        divergences.append(divergence)
    return torch.stack(losses).sum(), torch.cat(divergences)


def _views(span: Span, like: Tensor) -> list[tuple[Tensor, slice]]:
    """The keys of the trunk, and of the trunk and each branch, with the tokens that are the last of them."""
    trunk = _numbers(span.start, span.trunk_end, like)
    views = [(trunk, slice(span.start, span.trunk_end))]
    views += [(torch.cat([trunk, _numbers(start, end, like)]), slice(start, end)) for start, end in branches_of(span)]
    return views


def _gather(key_TI: Tensor, rows: Tensor) -> Tensor:
    # Bytes, because not every device gathers e4m3 by index.
    if key_TI.dtype == torch.float8_e4m3fn:
        return key_TI.view(torch.uint8)[rows].view(torch.float8_e4m3fn)
    return key_TI[rows]


def _numbers(start: int, end: int, like: Tensor) -> Tensor:
    return torch.arange(start, end, device=like.device)
