"""How far the student is from its teacher at every token, as losses: pure functions of log-probabilities (report, MOPD).

With the student's distribution pi, the teacher's T, a support O of tokens, and pi renormalised on O written q:

    A(s)      = sum over O of q(v) * (log T(v) - log pi(v))            the report's advantage, a number of the state alone
    in-support  KL(q || T renormalised on O); its gradient is that of -sum over O of q(v) * stop[log T(v) - log pi(v)]
    with rest   sum over O of pi(v) * (log pi(v) - log T(v)) + pi(rest) * (log pi(rest) - log T(rest)), all that is outside of O
                as one token: by the chain rule pi(O) times the in-support one and the KL of the masses on O, without which
                nothing holds a student to the mass that its teacher has there
    literal     -A(s) * log pi(y), y the sampled token: over y its gradient is zero, whatever the teacher says
    sampled     -stop[log T(y) - log pi(y)] * log pi(y): over y its gradient is that of KL(pi || T)
    baseline    -[y in O] * stop[log T(y) - log pi(y) - A(s)] * log pi(y): over y its gradient is pi(O) times the in-support one

Every loss is exactly 0, and so is its gradient, where teacher and student give the same numbers.

Letters: n tokens, K tokens of a support, V vocabulary, D width of the student, E width of the teacher.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from openkeye.distill.estimator_config import EstimatorConfig

NO_TOKEN = -1
LEAST_REST = 1e-6
# probability outside of a support, as far as a sum in fp32 tells it
# in a support, where it is smaller than K
SLAB_ROWS = 256
# tokens whose logits stand in memory at once: a row is as wide as the vocabulary


def choose_support(kind: str, student_ids_nK: Tensor, teacher_ids_nK: Tensor) -> Tensor:
    """[n, K] int64: the tokens of a support of `estimator_config.SUPPORTS`, in the order of whose they are, or NO_TOKEN."""
    if kind == "teacher":
        return teacher_ids_nK
    if kind == "student":
        return student_ids_nK
    return student_ids_nK.masked_fill(~is_among(student_ids_nK, teacher_ids_nK), NO_TOKEN)


def is_among(ids_nK: Tensor, others_nM: Tensor) -> Tensor:
    """[n, K] bool: whether each id is one of its row's others."""
    ordered = others_nM.sort(dim=-1).values
    places = torch.searchsorted(ordered, ids_nK.contiguous()).clamp(max=ordered.shape[-1] - 1)
    return ordered.gather(-1, places) == ids_nK


@dataclass(frozen=True)
class SupportTerms:
    """What a support says, token by token."""

    kl_n: Tensor
    # in-support reverse KL, with gradient to the student; 0 for an empty support
    coarse_kl_n: Tensor
    # the same of whole distributions, what is outside of the support taken for one token; with gradient
    advantage_n: Tensor
    # A(s), without gradient; 0 for an empty support
    student_mass_n: Tensor
    teacher_mass_n: Tensor
    # probability on the support, without gradient
    num_shared_n: Tensor
    # tokens in the support


def support_terms(student_nK: Tensor, teacher_nK: Tensor, is_used_nK: Tensor) -> SupportTerms:
    """Compare log-probabilities on a support.

    Args:
        student_nK: natural logarithms of probabilities, with gradient.
        teacher_nK: the same of the teacher.
        is_used_nK: which of them are in the support; what stands elsewhere is never read.
    """
    num_shared = is_used_nK.sum(dim=-1)
    is_empty_n1 = (num_shared == 0)[:, None]
    # An empty row stands for equal numbers, so that nothing is NaN, and is multiplied away.
    own = student_nK.masked_fill(~is_used_nK, -torch.inf).masked_fill(is_empty_n1, 0.0)
    share_nK = own.softmax(dim=-1)
    with torch.no_grad():
        given = teacher_nK.masked_fill(~is_used_nK, -torch.inf).masked_fill(is_empty_n1, 0.0)
        student_mass, teacher_mass = (torch.where(is_used_nK, part.exp(), 0.0).sum(dim=-1) for part in (own, given))
        renormalised = own.log_softmax(dim=-1) - given.log_softmax(dim=-1)
        difference_nK = renormalised.masked_fill(~is_used_nK, 0.0)
        advantage_n = (share_nK * (given - own).masked_fill(~is_used_nK, 0.0)).sum(dim=-1)
    # Through the share alone: sum of q * grad log q is zero, and here it is exactly so.
    kl_n = (share_nK * difference_nK).sum(dim=-1)
    coarse_kl_n = _coarse_kl(torch.where(is_used_nK, student_nK, 0.0), teacher_nK, is_used_nK, student_mass, teacher_mass)
    return SupportTerms(kl_n, coarse_kl_n, advantage_n, student_mass, teacher_mass, num_shared)


def _coarse_kl(
    student_nK: Tensor, teacher_nK: Tensor, is_used_nK: Tensor, student_mass_n: Tensor, teacher_mass_n: Tensor
) -> Tensor:
    """[n]. The probability of the rest is one less the support's, so its gradient is in the support's tokens too."""
    with torch.no_grad():
        own_rest, given_rest = ((1 - mass).clamp_min(LEAST_REST).log() for mass in (student_mass_n, teacher_mass_n))
        rest_n = own_rest - given_rest
        difference_nK = torch.where(is_used_nK, student_nK - teacher_nK, 0.0)
    # Differences are constants: the gradients of their own logarithms cancel.
    moved_nK = torch.where(is_used_nK, student_nK.exp() * (difference_nK - rest_n[:, None]), 0.0)
    return moved_nK.sum(dim=-1) + rest_n


def sampled_losses(
    config: EstimatorConfig,
    logprobs_n: Tensor,
    teacher_logprobs_n: Tensor,
    rollout_logprobs_n: Tensor,
    baseline_n: Tensor | None = None,
    is_in_support_n: Tensor | None = None,
) -> Tensor:
    """[n]: the sampled token's log-ratio as its advantage, with stop-gradient (MiMo-V2-Flash).

    Args:
        config: the window of ratios, and how far advantages go.
        logprobs_n: the student's, of the sampled tokens, with gradient.
        teacher_logprobs_n: the teacher's of the same.
        rollout_logprobs_n: the student's at the time of sampling; the ratio to now is the weight, 0 outside the window.
        baseline_n: taken off the advantage.
        is_in_support_n: where given, tokens outside of it are left out.
    """
    with torch.no_grad():
        advantage_n = teacher_logprobs_n - logprobs_n
        if baseline_n is not None:
            advantage_n = advantage_n - baseline_n
        advantage_n = advantage_n.clamp(-config.max_advantage, config.max_advantage)
        ratio_n = (logprobs_n - rollout_logprobs_n).exp()
        is_kept_n = (ratio_n >= config.low_ratio) & (ratio_n <= config.high_ratio)
        if is_in_support_n is not None:
            is_kept_n &= is_in_support_n
        coefficient_n = torch.where(is_kept_n, ratio_n * advantage_n, 0.0)
    return -coefficient_n * logprobs_n


@dataclass(frozen=True)
class TokenInputs:
    """Everything about n sampled tokens that an estimator may read; what it does not read may be None."""

    logprobs_n: Tensor
    # the student's now, with gradient
    rollout_logprobs_n: Tensor
    # the student's at the time of sampling
    teacher_logprobs_n: Tensor
    sampled_ids_n: Tensor | None = None
    support_ids_nK: Tensor | None = None
    # NO_TOKEN where unused
    student_nK: Tensor | None = None
    # the student's log-probabilities of the support now, with gradient
    teacher_nK: Tensor | None = None


def token_losses(config: EstimatorConfig, tokens: TokenInputs) -> Tensor:
    """[n] with gradient: what each token adds to the loss, before weights.

    Raises:
        ValueError: the estimator needs a support and there is none.
    """
    if not config.has_support:
        return _sampled(config, tokens)
    if tokens.support_ids_nK is None or tokens.student_nK is None or tokens.teacher_nK is None:
        raise ValueError(f"estimator {config.name} compares whole supports, and the tokens come without")
    terms = support_terms(tokens.student_nK, tokens.teacher_nK, tokens.support_ids_nK != NO_TOKEN)
    if config.name == "keye_literal":
        return -terms.advantage_n * tokens.logprobs_n
    if config.name == "full":
        return terms.kl_n
    if config.name == "sampled":
        if tokens.sampled_ids_n is None:
            raise ValueError("a baseline needs the sampled tokens' ids")
        is_in_support_n = is_among(tokens.sampled_ids_n[:, None], tokens.support_ids_nK)[:, 0]
        return _sampled(config, tokens, terms.advantage_n, is_in_support_n)
    if config.has_rest:
        losses_n = terms.coarse_kl_n
    else:
        losses_n = terms.kl_n * terms.student_mass_n if config.is_mass_weighted else terms.kl_n
    if config.fallback_mass:
        # Without its mean the advantage is negative nearly everywhere: whatever was sampled would be made less likely.
        baseline_n = -terms.coarse_kl_n.detach() if config.has_rest else None
        losses_n = torch.where(terms.student_mass_n < config.fallback_mass, _sampled(config, tokens, baseline_n), losses_n)
    return losses_n


def _sampled(
    config: EstimatorConfig, tokens: TokenInputs, baseline_n: Tensor | None = None, is_in_support_n: Tensor | None = None
) -> Tensor:
    given = (tokens.logprobs_n, tokens.teacher_logprobs_n, tokens.rollout_logprobs_n)
    return sampled_losses(config, *given, baseline_n, is_in_support_n)


def full_kl(
    hidden_nD: Tensor, head_VD: Tensor, teacher_hidden_nE: Tensor, teacher_head_VE: Tensor, slab_rows: int = SLAB_ROWS
) -> Tensor:
    """[n]: reverse KL over the whole vocabulary from both models' last hidden states, with gradient to the student's.

    Logits stand in memory for one slab of rows at a time, and are made again in the backward pass.
    """
    slabs = zip(hidden_nD.split(slab_rows), teacher_hidden_nE.split(slab_rows), strict=True)
    losses = [checkpoint(_slab_kl, own, head_VD, given, teacher_head_VE, use_reentrant=False) for own, given in slabs]
    return torch.cat(losses) if losses else hidden_nD.sum(dim=-1)


def _slab_kl(hidden_nD: Tensor, head_VD: Tensor, teacher_hidden_nE: Tensor, teacher_head_VE: Tensor) -> Tensor:
    own_nV = _log_softmax(hidden_nD @ head_VD.T)
    with torch.no_grad():
        difference_nV = own_nV - _log_softmax(teacher_hidden_nE @ teacher_head_VE.T)
    return (own_nV.exp() * difference_nV).sum(dim=-1)


def _log_softmax(logits_nV: Tensor) -> Tensor:
    wide = logits_nV if logits_nV.dtype == torch.float64 else logits_nV.float()
    return wide.log_softmax(dim=-1)


def overlap_figures(
    student_ids_nK: Tensor, student_nK: Tensor, teacher_ids_nK: Tensor, teacher_at_student_nK: Tensor
) -> Tensor:
    """[5] sums over n tokens, of OVERLAP_FIGURES in their order; divide by n.

    Args:
        student_ids_nK: the student's top k.
        student_nK: its log-probabilities of them.
        teacher_ids_nK: the teacher's top k.
        teacher_at_student_nK: the teacher's log-probabilities of the student's top k.
    """
    is_shared_nK = is_among(student_ids_nK, teacher_ids_nK)
    terms = support_terms(student_nK.detach(), teacher_at_student_nK, is_shared_nK)
    ratio_n = terms.num_shared_n / student_ids_nK.shape[1]
    columns = (ratio_n, terms.advantage_n, terms.student_mass_n, terms.teacher_mass_n, terms.num_shared_n == 0)
    return torch.stack([column.float().sum() for column in columns])


OVERLAP_FIGURES = ("overlap_ratio", "overlap_token_advantage", "student_mass", "teacher_mass", "empty_overlap")
# names as verl has them; on the overlap of both top k, whichever support is learnt on
