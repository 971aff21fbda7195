"""`cross_entropy` that never holds the logits of all tokens: a vocabulary's worth of them comes and goes in chunks.

Twin: `reference_learning.cross_entropy`. On a GPU in bfloat16 the logits leave the matrix unit as fp32 and are summed there
and then (`cross_entropy_tiles`); everywhere else they are made by plain products, in slabs of tokens. Going back, logits are
made anew for a chunk of the vocabulary, turned into their gradients in place, and multiplied into both with fp32 sums.

Letters: T tokens, D width, V vocabulary; C entries of a chunk of the vocabulary, R tokens of a block.
"""

import torch
from torch import Tensor

from openkeye.kernels import reference_learning
from openkeye.kernels.reference import widen
from openkeye.kernels.reference_learning import TokenLosses

MAX_SCRATCH_BYTES = 512 << 20
# of logits' gradients, or of their partial sums
ROUND = 256
# entries of the vocabulary by whose multiples chunks grow
WIDE = 4096
# entries that a chunk should have at least, before tokens are parted into blocks


def cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    token_weights_T: Tensor | None = None,
    max_scratch_bytes: int | None = None,
) -> TokenLosses:
    """See `reference_learning.cross_entropy`; with gradients for tokens and weights.

    They flow from losses, log-probabilities and log-sum-exps.

    Args:
        labels_T: int32 or int64 below V, negative for tokens that are left out; a label beyond gives nan on a GPU.
        max_scratch_bytes: bound on the logits or partial sums that stand in memory at a time (at least 256 entries of the
            vocabulary for 128 tokens); None: 512 MiB. Beside it stand, going back, the tokens' gradients in fp32.

    Raises:
        ValueError: shapes that do not match or types that differ.
    """
    if hidden_TD.shape[1] != weight_VD.shape[1] or labels_T.shape != hidden_TD.shape[:1] or hidden_TD.dtype != weight_VD.dtype:
        raise ValueError(
            f"cross_entropy takes tokens [T, D] and a head [V, D] of one type with a label for each token, got "
            f"{hidden_TD.dtype} {tuple(hidden_TD.shape)}, {weight_VD.dtype} {tuple(weight_VD.shape)} "
            f"and {tuple(labels_T.shape)}"
        )
    is_tiled = hidden_TD.is_cuda and hidden_TD.dtype == torch.bfloat16
    scratch = max_scratch_bytes or MAX_SCRATCH_BYTES
    log_probability, lse, entropy, best = LogProbabilities.apply(hidden_TD, weight_VD, labels_T.long(), scratch, is_tiled)
    loss = -log_probability if token_weights_T is None else -log_probability * widen(token_weights_T)
    return TokenLosses(loss, log_probability, lse, entropy, best)


class LogProbabilities(torch.autograd.Function):
    """Log-probabilities, log-sum-exps, entropies and best entries of `cross_entropy`; the first two have gradients."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        max_scratch_bytes: int,
        is_tiled: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All [T]."""
        if is_tiled and labels_T.shape[0]:
            from openkeye.kernels.cross_entropy_tiles import statistics

            found = statistics(hidden_TD.contiguous(), weight_VD.contiguous(), labels_T, max_scratch_bytes)
        else:
            found = reference_learning.cross_entropy(hidden_TD, weight_VD, labels_T, None, max_scratch_bytes)[1:]
        ctx.save_for_backward(hidden_TD, weight_VD, labels_T, found[1])
        ctx.max_scratch_bytes, ctx.is_tiled = max_scratch_bytes, is_tiled  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(*found[2:])
        return found

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the tokens and the head."""
        hidden, weight, labels, lse = ctx.saved_tensors  # type: ignore[attr-defined]
        return (
            *cross_entropy_backward(
                hidden.contiguous(),
                weight.contiguous(),
                labels,
                lse,
                gradients[0],
                gradients[1],
                ctx.max_scratch_bytes,  # type: ignore[attr-defined]
                ctx.is_tiled,  # type: ignore[attr-defined]
                ctx.needs_input_grad[:2],  # type: ignore[attr-defined]
            ),
            None,
            None,
            None,
        )


def choose_chunks(num_tokens: int, vocabulary: int, element_size: int, max_scratch_bytes: int) -> tuple[int, int]:
    """Tokens of a block and entries of a chunk, whose logits' gradients fill the scratch."""
    block = min(num_tokens, max(128, max_scratch_bytes // (element_size * WIDE)))
    chunk = max(1, max_scratch_bytes // (element_size * block) // ROUND) * ROUND
    return block, min(chunk, vocabulary)


def cross_entropy_backward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    lse_T: Tensor,
    log_probability_gradient_T: Tensor,
    lse_gradient_T: Tensor,
    max_scratch_bytes: int,
    is_tiled: bool,
    needed: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the tokens and the head, in their dtype; None where `needed` says so."""
    num_tokens, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
    if not num_tokens:
        return torch.zeros_like(hidden_TD), torch.zeros_like(weight_VD)
    is_learnt = labels_T >= 0
    # A logit's gradient is all_T p, and label_T more where it is the label's; without a label all is zero, exp(-inf) too.
    label_T = torch.where(is_learnt, log_probability_gradient_T, 0.0).contiguous()
    all_T = torch.where(is_learnt, lse_gradient_T, 0.0) - label_T
    safe_lse_T = torch.where(is_learnt, lse_T, torch.inf)
    block, chunk = choose_chunks(num_tokens, vocabulary, hidden_TD.element_size(), max_scratch_bytes)
    wide = widen(hidden_TD[:0]).dtype
    hidden_gradient = torch.zeros(hidden_TD.shape, dtype=wide, device=hidden_TD.device) if needed[0] else None
    weight_gradient = torch.empty_like(weight_VD) if needed[1] else None
    scratch = hidden_TD.new_empty(block * chunk)
    for first in range(0, vocabulary, chunk):
        entries = weight_VD[first : first + chunk]
        sums = None
        for start in range(0, num_tokens, block):
            rows = slice(start, min(start + block, num_tokens))
            hidden, size = hidden_TD[rows], rows.stop - rows.start
            logit_gradients = scratch[: size * entries.shape[0]].view(size, entries.shape[0])
            terms = (safe_lse_T[rows], all_T[rows], label_T[rows], labels_T[rows])
            _fill_logit_gradients(logit_gradients, hidden, entries, first, terms, is_tiled)
            if hidden_gradient is not None:
                _add_product(hidden_gradient[rows], logit_gradients, entries)
            if weight_gradient is not None and block == num_tokens:
                torch.mm(logit_gradients.t(), hidden, out=weight_gradient[first : first + chunk])
            elif weight_gradient is not None:
                sums = torch.zeros(entries.shape, dtype=wide, device=hidden.device) if sums is None else sums
                _add_product(sums, logit_gradients.t(), hidden)
        if weight_gradient is not None and sums is not None:
            weight_gradient[first : first + chunk] = sums
    return None if hidden_gradient is None else hidden_gradient.to(hidden_TD.dtype), weight_gradient


def _fill_logit_gradients(
    logit_gradients_RC: Tensor,
    hidden_RD: Tensor,
    entries_CD: Tensor,
    first: int,
    terms: tuple[Tensor, Tensor, Tensor, Tensor],
    is_tiled: bool,
) -> None:
    """Write all_R exp(logit - lse_R), plus label_R at each token's label, for the entries from `first` on."""
    if is_tiled:
        from openkeye.kernels.cross_entropy_tiles import fill_logit_gradients

        fill_logit_gradients(logit_gradients_RC, hidden_RD, entries_CD, first, terms)
        return
    lse_R, all_R, label_R, labels_R = terms
    probabilities = (widen(hidden_RD) @ widen(entries_CD).t()).sub_(lse_R[:, None]).exp_().mul_(all_R[:, None])
    column_R = labels_R - first
    is_here = (column_R >= 0) & (column_R < entries_CD.shape[0])
    column_R = torch.where(is_here, column_R, 0)[:, None]
    probabilities.scatter_add_(1, column_R, torch.where(is_here, label_R, 0.0)[:, None].to(probabilities.dtype))
    logit_gradients_RC.copy_(probabilities)


def _add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """sums += left right, summed in the sums' dtype."""
    if sums.dtype == left.dtype:
        sums.addmm_(left, right)
    elif sums.is_cuda:
        torch.addmm(sums, left, right, out_dtype=sums.dtype, out=sums)
    else:
        sums.addmm_(left.to(sums.dtype), right.to(sums.dtype))
