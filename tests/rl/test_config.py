"""What settings refuse, and what they take where nothing is said."""

from typing import Any

import pytest

from openkeye.common.checks import InputError
from openkeye.rl.config import AlgorithmConfig, LearnerConfig


@pytest.mark.parametrize(
    ("objective", "bounds", "averaging"),
    [
        ("gspo", (3e-4, 4e-4, 0.0), "rollouts"),
        ("grpo", (0.2, 0.2, 3.0), "rollouts"),
        ("dapo", (0.2, 0.28, 3.0), "tokens"),
        ("dr_grpo", (0.2, 0.2, 3.0), "constant"),
    ],
)
def test_what_is_not_said_is_as_published(objective: str, bounds: tuple[float, float, float], averaging: str):
    algorithm = AlgorithmConfig(objective, max_tokens=10)
    assert algorithm.bounds == bounds and algorithm.length_rule == averaging
    assert algorithm.is_standardised == (objective != "dr_grpo")
    assert AlgorithmConfig(objective, max_tokens=10, clip_high=0.5).bounds == (bounds[0], 0.5, bounds[2])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"objective": "ppo"}, "gspo, grpo"),
        ({"kl_estimator": "k1"}, "no gradient"),
        ({"objective": "dr_grpo"}, "max_tokens"),
        ({"overlong_tokens": 5, "max_tokens": 4}, "exceeds"),
        ({"proximal": "rollout"}, "count twice"),
        ({"correction_low": 3.0}, "low < high"),
        ({"dual_clip": 0.5}, "more than 1"),
        ({"clip_low": -1.0}, "clip_low"),
        ({"reward_weights": {}}, "at least one"),
    ],
)
def test_an_algorithm_that_contradicts_itself_is_refused(changes: dict[str, Any], told: str):
    with pytest.raises(InputError, match=told):
        AlgorithmConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"trains": ("indexer",), "indexer_target": "selected"}, "rewards"),
        ({"trains": ("decoder", "indexer")}, "indexer_target"),
        ({"indexer_target": "selected"}, "trains names it"),
        ({"trains": ("decoder", "head")}, "head"),
        ({"rates": {"vision": 1e-5}}, "vision"),
        ({"trains": ("decoder", "indexer"), "indexer_target": "selected", "attention": "dense"}, "sparse"),
        ({"num_minibatches": 0}, "num_minibatches"),
        ({"rate": float("nan")}, "rate"),
        ({"clip": 0.0}, "clip"),
    ],
)
def test_a_learner_that_contradicts_itself_is_refused(changes: dict[str, Any], told: str):
    with pytest.raises(InputError, match=told):
        LearnerConfig("model", "run", **changes)


def test_rates_warm_up_and_stay():
    config = LearnerConfig(
        "model", "run", trains=("decoder", "projector"), rate=1.0, rates={"projector": 2.0}, num_warmup_steps=2
    )
    assert [config.rates_at(step) for step in (0, 1, 9)] == [
        {"decoder": 0.5, "projector": 1.0}, {"decoder": 1.0, "projector": 2.0}, {"decoder": 1.0, "projector": 2.0},
    ]  # fmt: skip
