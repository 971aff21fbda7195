"""From what teachers have said to what each token counts for: the streams that the learner reads, and how it compares supports.

The learner knows one thing about teachers: a support of tokens with the teacher's log-probabilities, of which it computes the
student's with gradient, and a function that makes a loss of both. Here the support's first column is the sampled token itself,
so that every estimator has one; the teacher's log-probability of it is `ref_logprobs` too.

Letters: T tokens of a response, n tokens of a pack, K columns.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from openkeye.distill.config import DistillConfig
from openkeye.distill.divergence import (
    NO_TOKEN,
    OVERLAP_FIGURES,
    TokenInputs,
    choose_support,
    overlap_figures,
    token_losses,
)
from openkeye.distill.estimator_config import EstimatorConfig
from openkeye.distill.repetition import Repetition, RepetitionConfig, count_by_granularity, find_repetition
from openkeye.distill.scaling import category_factors, domain_scales
from openkeye.distill.scored import Scored
from openkeye.distill.token_categories import CATEGORY_NAMES, Category, token_categories, token_spans
from openkeye.inputs.tokenizer import TextTokenizer
from openkeye.rl.rollout import Rollout, TokenStreams

Record = dict[str, float | int | str]
NUM_OWN_COLUMNS = 1
# before the support itself: the sampled token


@dataclass(frozen=True)
class ReadTokens:
    """What the tokens of a response are, by their text."""

    categories: np.ndarray
    # [T] uint8 `Category`; what the policy has not said is format
    repetition: Repetition | None


@dataclass(frozen=True)
class TaughtSample:
    """A response, and what its teacher says of it."""

    rollout: Rollout
    teacher: str
    # its name, which is also the domain's
    scored: Scored
    # the teacher's; `chosen` are the student's top k, where that was asked
    student: Scored | None
    # its own top k
    tokens: ReadTokens


def read_tokens(
    rollout: Rollout, tokenizer: TextTokenizer | None, has_pictures: bool, begins_in_thinking: bool, config: RepetitionConfig
) -> ReadTokens:
    """Categories and the onset of repetition, of what the policy has said.

    tokenizer: None for tokens that are no text; then all are reasoning, and only tokens can repeat.
    """
    categories = np.full(len(rollout.output_ids), Category.FORMAT, np.uint8)
    own = rollout.output_ids[rollout.is_policy]
    if tokenizer is None:
        categories[rollout.is_policy] = Category.REASONING
        found = find_repetition(own, config)
    else:
        text, spans = token_spans(tokenizer, own.tolist())
        categories[rollout.is_policy] = token_categories(text, spans, has_pictures, begins_in_thinking)
        found = find_repetition(own, config, text, spans)
    if found is not None:
        onset = int(np.flatnonzero(rollout.is_policy)[found.onset])
        found = Repetition(onset, found.granularity, found.num_copies)
    return ReadTokens(categories, found)


def step_streams(samples: Sequence[TaughtSample], config: DistillConfig) -> tuple[list[TokenStreams], Record]:
    """The streams of all samples of a step, and figures of what they hold.

    Weights are of the whole step: categories average one over all tokens, domains are weighed against each other.
    """
    policies = [sample.rollout.is_policy for sample in samples]
    factors = category_factors([sample.tokens.categories for sample in samples], policies, config.scaling)
    log_ratios = [(sample.scored.logprobs - sample.rollout.logprobs)[sample.rollout.is_policy] for sample in samples]
    scales = domain_scales([sample.teacher for sample in samples], log_ratios, config.scaling)
    num_tokens = sum(int(is_policy.sum()) for is_policy in policies)
    streams = []
    for sample, factor in zip(samples, factors, strict=True):
        weights = factor * scales[sample.teacher]
        if config.averaging == "rollouts":
            weights = weights * (num_tokens / len(samples) / max(1, sample.rollout.num_policy_tokens))
        streams.append(_streams(sample, weights, config))
    return streams, step_figures(samples, log_ratios) | {f"scale/{name}": scale for name, scale in scales.items()}


def _streams(sample: TaughtSample, weights: np.ndarray, config: DistillConfig) -> TokenStreams:
    rollout, found = sample.rollout, sample.tokens.repetition
    is_policy = rollout.is_policy.astype(np.float32)
    advantages = np.zeros(len(is_policy), np.float32)
    if found is not None:
        # Behind the onset each token is made less likely, whatever its category and teacher (report, MOPD: lambda).
        advantages[found.onset :] = -config.repetition.penalty
    support_ids, support_logprobs = joined_support(sample, config.estimator)
    return TokenStreams(
        advantages=advantages * is_policy,
        rl_weights=is_policy if config.repetition.penalty else np.zeros_like(is_policy),
        ce_weights=np.zeros_like(is_policy),
        ref_kl_weights=(weights * is_policy).astype(np.float32),
        ref_logprobs=sample.scored.logprobs,
        support_ids=support_ids,
        support_logprobs=support_logprobs,
    )


def joined_support(sample: TaughtSample, config: EstimatorConfig) -> tuple[np.ndarray, np.ndarray]:
    """([T, 1 + K] int32 ids, [T, 1 + K] float32 log-probabilities of the teacher): the sampled token, and then the support."""
    ids, logprobs = [sample.rollout.output_ids[:, None]], [sample.scored.logprobs[:, None]]
    if config.has_support:
        chosen, given = _support(sample, config)
        ids.append(chosen)
        logprobs.append(given)
    return np.concatenate(ids, axis=1).astype(np.int32), np.concatenate(logprobs, axis=1).astype(np.float32)


def _support(sample: TaughtSample, config: EstimatorConfig) -> tuple[np.ndarray, np.ndarray]:
    scored = sample.scored
    if config.name == "full" or config.support == "teacher":
        return scored.top_ids, scored.top_logprobs
    assert sample.student is not None, "a support of the student needs its top k"
    own, given = (torch.from_numpy(ids).long() for ids in (sample.student.top_ids, scored.top_ids))
    chosen = choose_support(config.support, own, given)
    if config.support == "overlap" and config.widens and config.fallback_mass:
        mass_T = torch.where(chosen != NO_TOKEN, torch.from_numpy(sample.student.top_logprobs).exp(), 0.0).sum(dim=-1)
        chosen = torch.where((mass_T < config.fallback_mass)[:, None], own, chosen)
    return chosen.numpy(), scored.chosen


class SampledTokens(Protocol):
    """What the learner knows of n tokens, [n] each; only `logprobs` has a gradient."""

    @property
    def logprobs(self) -> Tensor: ...

    @property
    def rollout(self) -> Tensor:
        """As they were sampled."""
        ...

    @property
    def ref_logprobs(self) -> Tensor:
        """The teacher's."""
        ...


class ComparedSupport(Protocol):
    """What the learner knows of their supports, [n, K] each."""

    @property
    def student(self) -> Tensor:
        """With gradient."""
        ...

    @property
    def teacher(self) -> Tensor: ...

    @property
    def ids(self) -> Tensor: ...


class SupportLosses(NamedTuple):
    """What an estimator makes of each token, [n]."""

    losses: Tensor
    # with gradient
    figures: dict[str, Tensor]
    # for the log, by name


@dataclass(frozen=True)
class SupportDivergence:
    """What the learner calls for tokens with a support."""

    config: EstimatorConfig

    def __call__(self, tokens: SampledTokens, support: ComparedSupport) -> SupportLosses:
        """The loss of each token, from the columns of `joined_support`."""
        kept = slice(NUM_OWN_COLUMNS, None)
        inputs = TokenInputs(
            logprobs_n=tokens.logprobs,
            rollout_logprobs_n=tokens.rollout,
            teacher_logprobs_n=tokens.ref_logprobs,
            sampled_ids_n=support.ids[:, 0],
            support_ids_nK=support.ids[:, kept],
            student_nK=support.student[:, kept],
            teacher_nK=support.teacher[:, kept],
        )
        figures = {"log_ratio_abs": (tokens.ref_logprobs - tokens.logprobs.detach()).abs()}
        return SupportLosses(token_losses(self.config, inputs), figures)


def step_figures(samples: Sequence[TaughtSample], log_ratios: Sequence[np.ndarray]) -> Record:
    """Of all samples, and by domain: divergence from the teacher (k1, and its absolute value, since signs hide errors),
    overlap as verl names it; shares of categories; how many responses repeat themselves.
    """
    sums: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    categories = np.zeros(len(CATEGORY_NAMES))
    for sample, ratio in zip(samples, log_ratios, strict=True):
        values = {"kl": float(-ratio.sum()), "kl_abs": float(np.abs(ratio).sum())}
        if sample.student is not None:
            values |= dict(zip(OVERLAP_FIGURES, _overlap(sample, sample.student), strict=True))
        for name, value in values.items():
            for key in (name, f"{name}/{sample.teacher}"):
                sums[key] += value
                counts[key] += len(ratio)
        categories += np.bincount(sample.tokens.categories[sample.rollout.is_policy], minlength=len(CATEGORY_NAMES))
    record: Record = {name: sums[name] / max(1, counts[name]) for name in sums}
    shares = categories / max(1, categories.sum())
    record |= {f"category/{name}": float(share) for name, share in zip(CATEGORY_NAMES, shares, strict=True)}
    repeated = count_by_granularity([sample.tokens.repetition for sample in samples])
    return record | {f"repetition/{name}": number for name, number in repeated.items()}


def _overlap(sample: TaughtSample, student: Scored) -> list[float]:
    """[5] sums over the tokens of the policy."""
    kept, k = sample.rollout.is_policy, student.top_ids.shape[1]
    own_ids, own, given_ids, given = (
        torch.from_numpy(array[kept])
        for array in (student.top_ids, student.top_logprobs, sample.scored.top_ids[:, :k], sample.scored.chosen)
    )
    return overlap_figures(own_ids.long(), own, given_ids.long(), given).tolist()
