"""The policy's losses as pure functions of tensors: per token streams, and which rollout a token belongs to.

A rollout's tokens are always in one pack, in order. What a sum is divided by (`LossCounts`) is counted over all packs of all
ranks of the step, so that packing changes nothing.

Letters: n learnt tokens of a pack, S rollouts of it, K tokens of a support.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from openkeye.rl.config import AlgorithmConfig

LARGEST_LOG_RATIO = 20.0
# beyond it a ratio is cut, so that nothing becomes infinite


@dataclass(frozen=True)
class LossCounts:
    """What the sums of a step are divided by, over all packs and ranks."""

    rl: float
    # rollouts with a weight, or tokens with one (`AlgorithmConfig.averaging`)
    ce: float
    ref_kl: float
    # tokens with a weight


@dataclass(frozen=True)
class PolicyTokens:
    """The learnt tokens of one pack; all [n] float32 but where it says otherwise. Only `logprobs` has a gradient."""

    logprobs: Tensor
    # of the policy as it is now
    proximal: Tensor
    # of the policy that ratios are to
    rollout: Tensor
    # as sampled
    advantages: Tensor
    rl_weights: Tensor
    ce_weights: Tensor
    ref_kl_weights: Tensor
    ref_logprobs: Tensor
    # 0 where there is no reference
    segments: Tensor
    # int64: the rollout that each token belongs to
    num_segments: int

    @property
    def is_rl(self) -> Tensor:
        """[n] bool: tokens that the policy loss is about."""
        return self.rl_weights != 0


@dataclass(frozen=True)
class Support:
    """Tokens over which the student is compared with a teacher, [n, K] each; ids of -1 are no part of it."""

    student: Tensor
    # log-probabilities, with gradient
    teacher: Tensor
    # log-probabilities
    ids: Tensor


class SupportLosses(NamedTuple):
    """What an estimator over supports makes of each token, [n]."""

    losses: Tensor
    # with gradient, to be weighted by `ref_kl_weights`
    figures: Mapping[str, Tensor]
    # for the log, by name: means over the tokens with a weight


SupportDivergence = Callable[[PolicyTokens, Support], SupportLosses]
# how tokens with a support differ from their teacher (`in_support_kl`)


class Surrogate(NamedTuple):
    """What an objective makes of each token, [n]."""

    losses: Tensor
    # to be weighted and summed; with gradient
    is_clipped_low: Tensor
    # bool: the ratio left the bounds and the token has no gradient (CISPO: it is cut and has one)
    is_clipped_high: Tensor


class PolicyLosses(NamedTuple):
    """One pack's part of the step's losses, 0-dimensional, with gradient; and masks for figures."""

    rl: Tensor
    ce: Tensor
    ref_kl: Tensor
    surrogate: Surrogate
    is_masked: Tensor
    # [n] bool: left out by the correction

    @property
    def total(self) -> Tensor:
        return self.rl + self.ce + self.ref_kl


def policy_losses(
    algorithm: AlgorithmConfig, tokens: PolicyTokens, counts: LossCounts, divergences_n: Tensor | None = None
) -> PolicyLosses:
    """L_rl / N_rl + L_ce / N_ce + L_ref / N_ref of one pack.

    divergences_n: of each token from its reference, with gradient; None: `sampled_divergences`.
    """
    surrogate = surrogate_of(algorithm, tokens)
    corrections_n, is_masked_n = correction_weights(algorithm, tokens)
    weights_n = tokens.rl_weights * corrections_n * averaging_weights(algorithm, tokens)
    # Where a weight is zero the factor may be anything, and 0 * nan would be nan.
    rl = torch.where(tokens.is_rl, weights_n * surrogate.losses, 0.0).sum() / max(1.0, counts.rl)
    ce = -torch.where(tokens.ce_weights != 0, tokens.ce_weights * tokens.logprobs, 0.0).sum() / max(1.0, counts.ce)
    if divergences_n is None:
        divergences_n = sampled_divergences(algorithm, tokens)
    has_reference = tokens.ref_kl_weights != 0
    ref_kl = torch.where(has_reference, tokens.ref_kl_weights * divergences_n, 0.0).sum() / max(1.0, counts.ref_kl)
    return PolicyLosses(rl, ce, ref_kl, surrogate, is_masked_n)


def sampled_divergences(algorithm: AlgorithmConfig, tokens: PolicyTokens) -> Tensor:
    """[n]: of each token's own log-probability from `ref_logprobs`, by the algorithm's estimator; with gradient."""
    return divergence(algorithm.kl_estimator, tokens.logprobs - tokens.ref_logprobs)


def surrogate_of(algorithm: AlgorithmConfig, tokens: PolicyTokens) -> Surrogate:
    """The objective's loss of each token, before weights.

    GRPO, Dr. GRPO and DAPO: -min(r A, clip(r) A) with r = pi / proximal; with a dual clip c at most -c A where A < 0 (Ye et al.
    2020). GSPO: the same with the rollout's s = exp(mean of log r), whose gradient goes to each token alike:
    log s_t = sg[log s] + log pi - sg[log pi] (GSPO eq. 5, 14). CISPO: -sg[clip(r)] A log pi.
    """
    low, high, dual = algorithm.bounds
    log_ratio_n = bounded(tokens.logprobs - tokens.proximal)
    if algorithm.objective == "cispo":
        ratio_n = log_ratio_n.detach().exp()
        losses_n = -ratio_n.clamp(1 - low, 1 + high) * tokens.advantages * tokens.logprobs
        return Surrogate(losses_n, ratio_n < 1 - low, ratio_n > 1 + high)
    if algorithm.objective == "gspo":
        mean_n = rollout_means(log_ratio_n.detach(), tokens)[tokens.segments]
        log_ratio_n = mean_n + tokens.logprobs - tokens.logprobs.detach()
    ratio_n = log_ratio_n.exp()
    advantages_n = tokens.advantages
    losses_n = torch.maximum(-ratio_n * advantages_n, -ratio_n.clamp(1 - low, 1 + high) * advantages_n)
    is_low = (advantages_n < 0) & (ratio_n.detach() < 1 - low)
    is_high = (advantages_n > 0) & (ratio_n.detach() > 1 + high)
    if dual:
        bounded_n = torch.minimum(losses_n, -dual * advantages_n)
        losses_n = torch.where(advantages_n < 0, bounded_n, losses_n)
        is_high = is_high | ((advantages_n < 0) & (ratio_n.detach() > dual))
    return Surrogate(losses_n, is_low, is_high)


def averaging_weights(algorithm: AlgorithmConfig, tokens: PolicyTokens) -> Tensor:
    """[n]: 1 / the rollout's tokens, 1, or 1 / max_tokens (`AlgorithmConfig.averaging`); `LossCounts.rl` has the rest."""
    ones_n = torch.ones_like(tokens.rl_weights)
    if algorithm.length_rule == "rollouts":
        return ones_n / rollout_lengths(tokens)[tokens.segments]
    return ones_n / algorithm.max_tokens if algorithm.length_rule == "constant" else ones_n


def correction_weights(algorithm: AlgorithmConfig, tokens: PolicyTokens) -> tuple[Tensor, Tensor]:
    """[n] constant weights for the difference between trainer and sampling, and [n] bool: what they leave out.

    Of r = proximal / rollout: truncated (TIS, Yao et al. 2025), zero outside of the bounds (IcePop, Ling team 2025), or whole
    with rollouts left out whose geometric mean is outside.
    """
    nothing_n = torch.zeros_like(tokens.is_rl)
    if algorithm.correction == "none":
        return torch.ones_like(tokens.rl_weights), nothing_n
    low, high = algorithm.correction_low, algorithm.correction_high
    log_ratio_n = bounded(tokens.proximal - tokens.rollout).detach()
    ratio_n = log_ratio_n.exp()
    if algorithm.correction == "tis":
        return ratio_n.clamp(low, high), nothing_n
    judged_n = rollout_means(log_ratio_n, tokens)[tokens.segments].exp() if algorithm.correction == "sequence_mask" else ratio_n
    is_masked_n = ((judged_n < low) | (judged_n > high)) & tokens.is_rl
    return torch.where(is_masked_n, 0.0, ratio_n), is_masked_n


def divergence(estimator: str, log_ratio: Tensor) -> Tensor:
    """Estimators of KL(pi || ref) from x = log pi - log ref of tokens that pi sampled: k1 x, k2 x^2 / 2, k3 exp(-x) - 1 + x.

    k1 and k3 are unbiased in value, for logs. Differentiated, k1's expectation is zero, k2 has the gradient of the reverse KL.

    Raises:
        ValueError: another estimator.
    """
    x = bounded(log_ratio)
    if estimator == "k1":
        return x
    if estimator == "k2":
        return x.square() / 2
    if estimator == "k3":
        return torch.expm1(-x) + x
    raise ValueError(f"the estimator is {estimator!r}; give k1, k2 or k3")


def in_support_kl(tokens: PolicyTokens, support: Support) -> SupportLosses:
    """KL(student || teacher), both renormalised over the support, differentiated through the student; an empty one gives 0.

    No sampling is in it, and so no variance; what lies outside of the support is not taught.
    """
    is_used_nK = support.ids >= 0
    student, teacher = (
        x.masked_fill(~is_used_nK, -1e30).log_softmax(dim=-1).masked_fill(~is_used_nK, 0.0)
        for x in (support.student, support.teacher)
    )
    losses_n = (torch.where(is_used_nK, student.exp(), 0.0) * (student - teacher)).sum(dim=-1)
    return SupportLosses(losses_n.to(tokens.logprobs.dtype), masses_of(support))


@torch.no_grad()
def masses_of(support: Support) -> dict[str, Tensor]:
    """[n] each, for figures: the student's and the teacher's probability of the whole support, and whether it is empty."""
    is_used_nK = support.ids >= 0
    masses = {
        name: torch.where(is_used_nK, logprobs.exp(), 0.0).sum(dim=-1)
        for name, logprobs in (("student_mass", support.student), ("teacher_mass", support.teacher))
    }
    return masses | {"empty_share": (~is_used_nK.any(dim=-1)).float()}


def bounded(log_ratio: Tensor) -> Tensor:
    """Logarithms of ratios, cut where their exponential would leave all bounds."""
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def rollout_sums(values_n: Tensor, tokens: PolicyTokens) -> Tensor:
    """[S]: the sum over each rollout's tokens of the policy loss."""
    kept_n = torch.where(tokens.is_rl, values_n, 0.0)
    return kept_n.new_zeros(tokens.num_segments).index_add(0, tokens.segments, kept_n)


def rollout_lengths(tokens: PolicyTokens) -> Tensor:
    """[S]: each rollout's tokens of the policy loss, at least 1."""
    return rollout_sums(torch.ones_like(tokens.rl_weights), tokens).clamp_min(1.0)


def rollout_means(values_n: Tensor, tokens: PolicyTokens) -> Tensor:
    """[S]: the mean over each rollout's tokens of the policy loss."""
    return rollout_sums(values_n, tokens) / rollout_lengths(tokens)
