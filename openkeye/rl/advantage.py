"""From the rewards of a group to what each of its tokens counts for; functions of records alone.

Letters: T tokens behind the prompt.
"""

from collections.abc import Sequence

import numpy as np

from openkeye.common.checks import InputError
from openkeye.rl.config import AlgorithmConfig
from openkeye.rl.rollout import Rollout, TokenStreams

STD_EPSILON = 1e-6


def streams_of(
    group: Sequence[Rollout], algorithm: AlgorithmConfig, ref_logprobs: Sequence[np.ndarray] | None = None
) -> list[TokenStreams] | None:
    """What each token of a group's rollouts counts for, in the group's order.

    Every token that the policy sampled has its rollout's advantage and weight 1; how lengths are evened out is the loss's
    business (`policy_loss.averaging_weights`). Failed rollouts, and with `masks_cut` those that ended for length, weigh
    nothing; failed ones have no reward either, and the others are compared among themselves.

    Args:
        group: all answers to one asking of an example.
        algorithm: how rewards become advantages.
        ref_logprobs: [T] of each rollout, of the reference policy; needed where `ref_kl_weight` is above 0.

    Returns:
        None where there is nothing to learn: all rewards equal (dropped by `drops_zero_variance`), or none.

    Raises:
        InputError: a reward that the algorithm weighs is not among a rollout's, or log-probabilities are missing.
    """
    if algorithm.ref_kl_weight and ref_logprobs is None:
        raise InputError(f"ref_kl_weight is {algorithm.ref_kl_weight:g} and no log-probabilities of a reference came with it")
    is_scored = np.array([rollout.finish_reason != "failed" for rollout in group], dtype=bool)
    if not is_scored.any():
        return None
    scored = [rollout for rollout in group if rollout.finish_reason != "failed"]
    rewards = np.array([reward_of(rollout, algorithm) for rollout in scored])
    if algorithm.drops_zero_variance and np.ptp(rewards) == 0:
        return None
    values = np.zeros(len(group))
    values[is_scored] = advantages_of(rewards, algorithm.is_standardised)
    streams = []
    for number, (rollout, value) in enumerate(zip(group, values, strict=True)):
        is_learnt = is_scored[number] and not (algorithm.masks_cut and rollout.finish_reason == "length")
        weights = (rollout.is_policy & is_learnt).astype(np.float32)
        reference = None if ref_logprobs is None else np.asarray(ref_logprobs[number], dtype=np.float32)
        streams.append(
            TokenStreams(
                advantages=np.float32(value) * weights,
                rl_weights=weights,
                ce_weights=np.zeros_like(weights),
                ref_kl_weights=np.float32(algorithm.ref_kl_weight) * weights,
                ref_logprobs=reference,
            )
        )
    return streams


def advantages_of(rewards: np.ndarray, is_standardised: bool) -> np.ndarray:
    """R - mean, divided by (std + 1e-6) where asked for; the standard deviation is over G values, not G - 1."""
    centred = rewards - rewards.mean()
    return centred / (rewards.std() + STD_EPSILON) if is_standardised else centred


def reward_of(rollout: Rollout, algorithm: AlgorithmConfig) -> float:
    """The weighted sum of a rollout's named rewards, and the penalty of its length.

    Raises:
        InputError: a reward that has a weight is missing.
    """
    if missing := [name for name in algorithm.reward_weights if name not in rollout.rewards]:
        raise InputError(
            f"{rollout.id}: reward_weights names {', '.join(missing)}; its rewards are {', '.join(rollout.rewards) or 'none'}"
        )
    total = sum(weight * rollout.rewards[name] for name, weight in algorithm.reward_weights.items())
    return total + overlong_penalty(rollout.num_policy_tokens, algorithm.max_tokens, algorithm.overlong_tokens)


def overlong_penalty(num_tokens: int, max_tokens: int, overlong_tokens: int) -> float:
    """0 up to max_tokens - overlong_tokens, falling to -1 at max_tokens and beyond (DAPO eq. 13); 0 without overlong_tokens."""
    if not overlong_tokens:
        return 0.0
    return float(np.clip((max_tokens - overlong_tokens - num_tokens) / overlong_tokens, -1.0, 0.0))


def imitation_streams(rollout: Rollout, weight: float = 1.0) -> TokenStreams:
    """Plain imitation of what was sampled, whoever sampled it."""
    weights = np.float32(weight) * rollout.is_policy.astype(np.float32)
    nothing = np.zeros_like(weights)
    return TokenStreams(advantages=nothing, rl_weights=nothing, ce_weights=weights, ref_kl_weights=nothing)
