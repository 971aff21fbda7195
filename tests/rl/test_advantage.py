"""Rewards to streams, by hand."""

from dataclasses import replace

import numpy as np
import pytest

from openkeye.common.checks import InputError
from openkeye.rl.advantage import imitation_streams, overlong_penalty, streams_of
from openkeye.rl.config import AlgorithmConfig
from openkeye.rl.rollout import Rollout
from tests.rl.toy_rollouts import toy_rollout


def rewarded(*outcomes: float) -> list[Rollout]:
    return [replace(toy_rollout(0, number), rewards={"outcome": value}) for number, value in enumerate(outcomes)]


def test_advantages_by_hand():
    group = rewarded(1, 0, 0, 1)
    for objective, high in (("grpo", 1 / (1 + 2e-6)), ("dr_grpo", 0.5), ("gspo", 1 / (1 + 2e-6))):
        streams = streams_of(group, AlgorithmConfig(objective, max_tokens=20))
        assert streams is not None
        for rollout, own, value in zip(group, streams, (high, -high, -high, high), strict=True):
            assert own.advantages == pytest.approx(np.full(len(rollout.output_ids), value), abs=1e-6)
            assert own.rl_weights.tolist() == [1.0] * len(rollout.output_ids)
            assert not own.ce_weights.any() and not own.ref_kl_weights.any()


def test_rewards_are_weighed_by_name():
    group = [
        replace(one, rewards={"outcome": o, "format": f}) for one, o, f in zip(rewarded(0, 0), (1, 0), (0, 1), strict=True)
    ]
    streams = streams_of(group, AlgorithmConfig("dr_grpo", max_tokens=20, reward_weights={"outcome": 1.0, "format": 0.2}))
    assert streams is not None and streams[0].advantages[0] == pytest.approx(0.4)
    with pytest.raises(InputError, match="style"):
        streams_of(group, AlgorithmConfig(reward_weights={"style": 1.0}))


def test_groups_without_variance_are_dropped_where_asked_for():
    # Whose mean is not their value to the last bit.
    group = rewarded(0.1, 0.1, 0.1)
    assert streams_of(group, AlgorithmConfig()) is None
    kept = streams_of(group, AlgorithmConfig(drops_zero_variance=False))
    assert kept is not None and all(abs(own.advantages).max() < 1e-6 for own in kept)


def test_a_failed_rollout_weighs_nothing_and_is_not_compared_with():
    group = [*rewarded(1, 0), replace(toy_rollout(0, 2), rewards={}, finish_reason="failed")]
    streams = streams_of(group, AlgorithmConfig("dr_grpo", max_tokens=20))
    assert streams is not None
    assert streams[0].advantages[0] == 0.5 and streams[1].advantages[0] == -0.5
    assert not streams[2].rl_weights.any() and not streams[2].advantages.any()
    assert streams_of(group[2:], AlgorithmConfig()) is None


def test_cut_rollouts_and_tool_output_weigh_nothing():
    cut, told = rewarded(1, 0)
    is_policy = np.arange(len(told.output_ids)) % 2 == 0
    group = [replace(cut, finish_reason="length"), replace(told, is_policy=is_policy)]
    streams = streams_of(
        group, AlgorithmConfig(masks_cut=True, ref_kl_weight=0.1), [np.zeros(len(r.output_ids)) for r in group]
    )
    assert streams is not None and not streams[0].rl_weights.any() and not streams[0].ref_kl_weights.any()
    assert streams[1].rl_weights.tolist() == is_policy.astype(float).tolist()
    assert streams[1].ref_kl_weights == pytest.approx(0.1 * is_policy)
    with pytest.raises(InputError, match="reference"):
        streams_of(group, AlgorithmConfig(ref_kl_weight=0.1))


@pytest.mark.parametrize(("length", "expected"), [(0, 0), (60, 0), (80, -0.5), (100, -1), (130, -1)])
def test_the_overlong_penalty(length: int, expected: float):
    assert overlong_penalty(length, 100, 40) == pytest.approx(expected)
    assert overlong_penalty(length, 100, 0) == 0


def test_the_penalty_counts_as_reward():
    group = [
        replace(toy_rollout(0, 0, num_output=10), rewards={"outcome": 1.0}),
        replace(toy_rollout(0, 1, num_output=6), rewards={"outcome": 1.0}),
    ]
    streams = streams_of(group, AlgorithmConfig("dr_grpo", max_tokens=10, overlong_tokens=4))
    assert (
        streams is not None
        and streams[0].advantages[0] == pytest.approx(-0.5)
        and streams[1].advantages[0] == pytest.approx(0.5)
    )


def test_imitation_weighs_what_was_sampled():
    rollout = replace(toy_rollout(0, 0, num_output=3), is_policy=np.array([True, False, True]))
    assert imitation_streams(rollout, 0.5).ce_weights.tolist() == [0.5, 0, 0.5]
