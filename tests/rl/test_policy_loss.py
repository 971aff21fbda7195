"""Objectives against their closed forms on numbers done by hand, and against a second implementation in double precision."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openkeye.rl.config import AlgorithmConfig
from openkeye.rl.policy_loss import (
    LossCounts,
    PolicyTokens,
    Support,
    correction_weights,
    divergence,
    in_support_kl,
    policy_losses,
)

OBJECTIVES = ("gspo", "grpo", "dr_grpo", "dapo", "cispo")
CORRECTIONS = ("none", "tis", "icepop", "sequence_mask")


def tokens_of(
    logprobs: list[float],
    proximal: list[float],
    advantages: list[float],
    segments: list[int],
    rollout: list[float] | None = None,
) -> PolicyTokens:
    def row(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    ones, zeros = torch.ones(len(logprobs), dtype=torch.float64), torch.zeros(len(logprobs), dtype=torch.float64)
    return PolicyTokens(
        logprobs=row(logprobs).requires_grad_(),
        proximal=row(proximal),
        rollout=row(proximal if rollout is None else rollout),
        advantages=row(advantages),
        rl_weights=ones,
        ce_weights=zeros,
        ref_kl_weights=zeros,
        ref_logprobs=zeros,
        segments=torch.tensor(segments),
        num_segments=max(segments) + 1,
    )


def loss_and_gradient(algorithm: AlgorithmConfig, tokens: PolicyTokens, counts: LossCounts) -> tuple[float, list[float]]:
    tokens.logprobs.grad = None
    loss = policy_losses(algorithm, tokens, counts).total
    loss.backward()
    assert tokens.logprobs.grad is not None
    return float(loss.detach()), tokens.logprobs.grad.tolist()


# Two rollouts of two and one tokens; ratios 1.5, 1.0 and 0.5, advantages 1, 1 and -1.
RATIOS = [math.log(1.5), 0.0, math.log(0.5)]


def by_hand() -> PolicyTokens:
    return tokens_of([-1 + ratio for ratio in RATIOS], [-1.0] * 3, [1, 1, -1], [0, 0, 1])


def test_grpo_by_hand():
    # Token losses: -1.2 (clipped), -1, +0.8 (clipped); mean of rollouts: (-1.1 + 0.8) / 2.
    loss, gradient = loss_and_gradient(AlgorithmConfig("grpo", correction="none"), by_hand(), LossCounts(2, 0, 0))
    assert loss == pytest.approx(-0.15, abs=1e-12)
    # Only the middle token is inside of the bounds: -r A / (2 tokens * 2 rollouts).
    assert gradient == pytest.approx([0, -0.25, 0], abs=1e-12)


def test_dapo_by_hand():
    # Bounds 0.8 .. 1.28, mean over the three tokens.
    loss, gradient = loss_and_gradient(AlgorithmConfig("dapo", correction="none"), by_hand(), LossCounts(3, 0, 0))
    assert loss == pytest.approx((-1.28 - 1 + 0.8) / 3, abs=1e-12)
    assert gradient == pytest.approx([0, -1 / 3, 0], abs=1e-12)


def test_dr_grpo_by_hand():
    # Sum over tokens, divided by a constant of 10 tokens and 2 rollouts.
    algorithm = AlgorithmConfig("dr_grpo", max_tokens=10, correction="none")
    loss, gradient = loss_and_gradient(algorithm, by_hand(), LossCounts(2, 0, 0))
    assert loss == pytest.approx((-1.2 - 1 + 0.8) / 20, abs=1e-12)
    assert gradient == pytest.approx([0, -1 / 20, 0], abs=1e-12)


def test_cispo_by_hand():
    # -clip(r) A log pi with r constant; cut above at 1.3, not below.
    algorithm = AlgorithmConfig("cispo", clip_high=0.3, correction="none")
    loss, gradient = loss_and_gradient(algorithm, by_hand(), LossCounts(3, 0, 0))
    logprobs = [-1 + ratio for ratio in RATIOS]
    assert loss == pytest.approx(-(1.3 * logprobs[0] + logprobs[1] - 0.5 * logprobs[2]) / 3, abs=1e-12)
    # A cut ratio still teaches.
    assert gradient == pytest.approx([-1.3 / 3, -1 / 3, 0.5 / 3], abs=1e-12)


def test_gspo_by_hand():
    # s = sqrt(1.5) and 0.5; bounds 0.5 .. 2 leave the first whole, and the second stands on its bound with A < 0.
    algorithm = AlgorithmConfig("gspo", clip_low=0.6, clip_high=1.0, correction="none")
    loss, gradient = loss_and_gradient(algorithm, by_hand(), LossCounts(2, 0, 0))
    assert loss == pytest.approx((-math.sqrt(1.5) + 0.5) / 2, abs=1e-12)
    assert gradient == pytest.approx([-math.sqrt(1.5) / 4, -math.sqrt(1.5) / 4, 0.25], abs=1e-12)
    # By the published bounds both leave them; only those on the side of their advantage are clipped.
    clipped, gradient = loss_and_gradient(AlgorithmConfig("gspo", correction="none"), by_hand(), LossCounts(2, 0, 0))
    assert clipped == pytest.approx((-(1 + 4e-4) + (1 - 3e-4)) / 2, abs=1e-12)
    assert gradient == [0, 0, 0]


def test_a_dual_clip_bounds_what_a_bad_token_costs():
    tokens = tokens_of([-1 + math.log(5)], [-1.0], [-2.0], [0])
    bounded, gradient = loss_and_gradient(AlgorithmConfig("grpo", correction="none"), tokens, LossCounts(1, 0, 0))
    assert bounded == pytest.approx(3 * 2) and gradient == [0]
    free, gradient = loss_and_gradient(AlgorithmConfig("grpo", dual_clip=0, correction="none"), tokens, LossCounts(1, 0, 0))
    assert free == pytest.approx(5 * 2) and gradient == pytest.approx([10])
    assert bool(policy_losses(AlgorithmConfig("grpo"), tokens, LossCounts(1, 0, 0)).surrogate.is_clipped_high.all())


def draw(seed: int, num_rollouts: int = 5) -> PolicyTokens:
    """Random streams with other weights than 1, tokens that are left out, and all three kinds of loss."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 7, num_rollouts)
    segments = np.repeat(np.arange(num_rollouts), lengths)
    total = len(segments)

    def row(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.float64))

    return PolicyTokens(
        logprobs=row(-rng.exponential(1, total)).requires_grad_(),
        proximal=row(-rng.exponential(1, total)),
        rollout=row(-rng.exponential(1, total)),
        advantages=row(rng.normal(0, 1, num_rollouts)[segments]),
        rl_weights=row(rng.choice([0.0, 0.5, 1.0, 2.0], total)),
        ce_weights=row(rng.choice([0.0, 1.0, 0.3], total)),
        ref_kl_weights=row(rng.choice([0.0, 0.1], total)),
        ref_logprobs=row(-rng.exponential(1, total)),
        segments=torch.from_numpy(segments),
        num_segments=num_rollouts,
    )


def second_implementation(algorithm: AlgorithmConfig, tokens: PolicyTokens, counts: LossCounts) -> tuple[float, list[float]]:
    """Loss and gradient by loops over rollouts and tokens, the derivatives by hand."""
    columns = {name: value.detach().tolist() for name, value in vars(tokens).items() if isinstance(value, Tensor)}
    low, high, dual = algorithm.bounds
    total, gradient = 0.0, [0.0] * len(columns["logprobs"])
    for rollout in range(tokens.num_segments):
        mine = [t for t, segment in enumerate(columns["segments"]) if segment == rollout]
        kept = [t for t in mine if columns["rl_weights"][t]]
        if kept:
            log_ratios = {t: columns["logprobs"][t] - columns["proximal"][t] for t in kept}
            mismatch = {t: columns["proximal"][t] - columns["rollout"][t] for t in kept}
            sequence = math.exp(sum(log_ratios.values()) / len(kept))
            whole = math.exp(sum(mismatch.values()) / len(kept))
            for t in kept:
                ratio = sequence if algorithm.objective == "gspo" else math.exp(log_ratios[t])
                advantage = columns["advantages"][t]
                if algorithm.objective == "cispo":
                    cut = min(max(ratio, 1 - low), 1 + high)
                    value, slope = -cut * advantage * columns["logprobs"][t], -cut * advantage
                else:
                    is_clipped = ratio > 1 + high if advantage > 0 else ratio < 1 - low
                    cut = min(max(ratio, 1 - low), 1 + high)
                    value, slope = (-cut * advantage, 0.0) if is_clipped else (-ratio * advantage, -ratio * advantage)
                    if dual and advantage < 0 and value > -dual * advantage:
                        value, slope = -dual * advantage, 0.0
                rho = math.exp(mismatch[t])
                inside = algorithm.correction_low <= rho <= algorithm.correction_high
                weight = {
                    "none": 1.0,
                    "tis": min(max(rho, algorithm.correction_low), algorithm.correction_high),
                    "icepop": rho if inside else 0.0,
                    "sequence_mask": rho if algorithm.correction_low <= whole <= algorithm.correction_high else 0.0,
                }[algorithm.correction] * columns["rl_weights"][t]
                if algorithm.length_rule == "rollouts":
                    weight /= len(kept)
                elif algorithm.length_rule == "constant":
                    weight /= algorithm.max_tokens
                total += weight * value / counts.rl
                gradient[t] += weight * slope / counts.rl
        for t in mine:
            total -= columns["ce_weights"][t] * columns["logprobs"][t] / counts.ce
            gradient[t] -= columns["ce_weights"][t] / counts.ce
            x = columns["logprobs"][t] - columns["ref_logprobs"][t]
            value, slope = (x * x / 2, x) if algorithm.kl_estimator == "k2" else (math.exp(-x) - 1 + x, 1 - math.exp(-x))
            total += columns["ref_kl_weights"][t] * value / counts.ref_kl
            gradient[t] += columns["ref_kl_weights"][t] * slope / counts.ref_kl
    return total, gradient


@settings(max_examples=60, deadline=None)
@given(
    objective=st.sampled_from(OBJECTIVES),
    correction=st.sampled_from(CORRECTIONS),
    averaging=st.sampled_from(["rollouts", "tokens", "constant"]),
    estimator=st.sampled_from(["k2", "k3"]),
    seed=st.integers(0, 10_000),
    clip=st.sampled_from([None, 0.3]),
)
def test_every_objective_is_that_of_a_second_implementation(objective, correction, averaging, estimator, seed, clip):
    algorithm = AlgorithmConfig(
        objective, clip_low=clip, clip_high=clip, averaging=averaging, correction=correction, correction_low=0.4,
        correction_high=2.5, max_tokens=8, kl_estimator=estimator,
    )  # fmt: skip
    tokens, counts = draw(seed), LossCounts(3.0, 7.0, 5.0)
    expected, expected_gradient = second_implementation(algorithm, tokens, counts)
    loss, gradient = loss_and_gradient(algorithm, tokens, counts)
    assert loss == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert gradient == pytest.approx(expected_gradient, rel=1e-10, abs=1e-12)


def part_of(tokens: PolicyTokens, rollouts: list[int]) -> PolicyTokens:
    """The tokens of some rollouts, as another pack has them."""
    kept = torch.cat([(tokens.segments == number).nonzero()[:, 0] for number in rollouts])
    numbers = torch.full((tokens.num_segments,), -1)
    numbers[rollouts] = torch.arange(len(rollouts))
    rows = {name: value.detach()[kept] for name, value in vars(tokens).items() if isinstance(value, Tensor)}
    rows["segments"] = numbers[rows["segments"]]
    rows["logprobs"].requires_grad_()
    return PolicyTokens(**rows, num_segments=len(rollouts))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_packing_changes_nothing(objective: str):
    algorithm, counts = AlgorithmConfig(objective, max_tokens=9, correction="sequence_mask"), LossCounts(5, 8, 9)
    tokens = draw(3)
    whole, _ = loss_and_gradient(algorithm, tokens, counts)
    apart = [loss_and_gradient(algorithm, part_of(tokens, rollouts), counts)[0] for rollouts in ([4, 1], [0], [3, 2])]
    assert sum(apart) == pytest.approx(whole, abs=1e-12)


def test_gspo_by_tokens_has_the_gradient_of_gspo_by_rollouts():
    tokens = draw(8)
    algorithm = AlgorithmConfig("gspo", clip_low=0.5, clip_high=0.5, correction="none")
    tokens = PolicyTokens(**vars(tokens) | {"rl_weights": torch.ones_like(tokens.rl_weights)})
    counts = LossCounts(tokens.num_segments, 1e300, 1e300)
    _, by_tokens = loss_and_gradient(algorithm, tokens, counts)
    logprobs = tokens.logprobs.detach().clone().requires_grad_()
    losses = []
    for number in range(tokens.num_segments):
        mine = tokens.segments == number
        ratio = (logprobs[mine] - tokens.proximal[mine]).mean().exp()
        advantage = tokens.advantages[mine][0]
        losses.append(-torch.minimum(ratio * advantage, ratio.clamp(0.5, 1.5) * advantage))
    torch.stack(losses).mean().backward()
    assert logprobs.grad is not None and by_tokens == pytest.approx(logprobs.grad.tolist(), abs=1e-12)


def test_a_correction_is_a_constant():
    tokens = draw(5)
    proximal = tokens.proximal.clone().requires_grad_()
    for correction in CORRECTIONS[1:]:
        weights, _ = correction_weights(
            AlgorithmConfig(correction=correction), PolicyTokens(**vars(tokens) | {"proximal": proximal})
        )
        assert not weights.requires_grad


def test_a_token_without_weight_may_say_anything():
    tokens = draw(3)
    is_out = tokens.rl_weights == 0
    mad = torch.where(is_out, torch.inf, tokens.rollout)
    calm, expected = loss_and_gradient(AlgorithmConfig(), tokens, LossCounts(5, 5, 5))
    odd, gradient = loss_and_gradient(AlgorithmConfig(), PolicyTokens(**vars(tokens) | {"rollout": mad}), LossCounts(5, 5, 5))
    assert bool(is_out.any()) and odd == calm and gradient == expected


def expected_over_samples(estimator: str, logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient of the estimator as a loss, in expectation over tokens that the policy samples."""
    logprobs = logits.log_softmax(-1)
    values = divergence(estimator, logprobs - reference)
    probability = logprobs.detach().exp()
    gradient = torch.autograd.grad((probability * values).sum(), logits)[0]
    return (probability * values.detach()).sum(), gradient


def test_estimators_as_values_and_as_losses():
    generator = torch.Generator().manual_seed(1)
    logits, other = (torch.randn(50, generator=generator, dtype=torch.float64) * 0.6 for _ in range(2))
    logits.requires_grad_()
    reference = other.log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    kl = (logprobs.exp() * (logprobs - reference)).sum()
    (exact,) = torch.autograd.grad(kl, logits)
    found = {name: expected_over_samples(name, logits, reference) for name in ("k1", "k2", "k3")}
    for name in ("k1", "k3"):
        assert float(found[name][0]) == pytest.approx(float(kl.detach()), abs=1e-12)
    assert abs(float(found["k2"][0] - kl.detach())) > 1e-3
    # As a loss k1 teaches nothing, k2 the reverse KL, k3 something else.
    assert float(found["k1"][1].abs().max()) < 1e-15
    assert torch.allclose(found["k2"][1], exact, atol=1e-15, rtol=0)
    cosine = torch.cosine_similarity(found["k3"][1], exact, dim=0)
    assert 0.5 < float(cosine) < 0.999


def test_in_support_divergence_is_zero_for_the_same_and_leaves_unused_ids_out():
    generator = torch.Generator().manual_seed(2)
    tokens = tokens_of([-1.0] * 3, [-1.0] * 3, [0.0] * 3, [0, 0, 0])
    logprobs = torch.randn(3, 4, generator=generator, dtype=torch.float64).log_softmax(-1).requires_grad_()
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, -1, -1], [-1, -1, -1, -1]])
    same = in_support_kl(tokens, Support(logprobs, logprobs.detach(), ids))
    assert same.losses.tolist() == [0, 0, 0] and same.figures["empty_share"].tolist() == [0, 0, 1]
    single = logprobs.detach().float()
    assert in_support_kl(tokens, Support(single, single, ids)).losses.tolist() == [0, 0, 0]
    teacher = torch.randn(3, 4, generator=generator, dtype=torch.float64).log_softmax(-1)
    found = in_support_kl(tokens, Support(logprobs, teacher, ids))
    student, its = (x[1, :2].detach().log_softmax(-1) for x in (logprobs, teacher))
    assert float(found.losses[1].detach()) == pytest.approx(float((student.exp() * (student - its)).sum()), abs=1e-12)
    assert found.figures["student_mass"].tolist() == pytest.approx([1, float(logprobs.detach()[1, :2].exp().sum()), 0])
    found.losses.sum().backward()
    assert logprobs.grad is not None and not bool(logprobs.grad[1, 2:].any()) and not bool(logprobs.grad[2].any())
    assert bool(logprobs.grad[0].abs().min() > 0)


def test_another_estimator_is_refused():
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        divergence("k4", torch.zeros(1))
