"""Recovery of groups in which every rollout failed."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from openkeye.common.checks import InputError
from openkeye.rl.context_rl import RecoveredGroup, RecoverySettings, importance_weights, recover, with_report
from openkeye.rl.roles import AskedAgain
from openkeye.rl.rollout import Rollout, RolloutId
from openkeye.tasks.arithmetic import ArithmeticOptions, ArithmeticTask
from openkeye.tasks.mistake_reports import RuleArithmeticReporter
from openkeye.tasks.task import Response

TASK = ArithmeticTask(ArithmeticOptions(seed=9, kinds=("total",)))
EXAMPLE = TASK.read(0)
ON = RecoverySettings(is_on=True, num_retries=3)


def prompt_ids(example):
    """Ids of letters: what matters is that other messages give other ids."""
    return np.frombuffer(repr(example.messages).encode(), np.uint8).astype(np.int32)


async def rollout_of(example, rollout_id, text, finish="stop"):
    rewards = await TASK.score(example, Response(text))
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    size = len(ids)
    routes = np.zeros((len(prompt_ids(example)) + size, 2, 1), np.int16)
    logprobs = np.linspace(-1, 0, size).astype(np.float32)
    is_policy, versions = np.ones(size, bool), np.zeros(size, np.int32)
    return Rollout(rollout_id, prompt_ids(example), ids, is_policy, logprobs, versions, routes, finish, rewards, text)


def group_of(*texts):
    async def all_of_them():
        return [await rollout_of(EXAMPLE, RolloutId("arithmetic", 0, 7, n), text) for n, text in enumerate(texts)]

    return asyncio.run(all_of_them())


WRONG = "<think>1 + 1 = 2.</think><answer>2</answer>"
FAILED = group_of(WRONG, "I do not know.", WRONG)


class Policy:
    """Right in some of its retries; keeps what it was asked."""

    def __init__(self, *is_right):
        self.is_right = is_right
        self.asked = []

    async def __call__(self, example, rollout_id):
        self.asked.append((example, rollout_id))
        text = EXAMPLE.facts["reference"] if self.is_right[len(self.asked) - 1] else WRONG
        return await rollout_of(example, rollout_id, text)


def recovered(policy, settings=ON, group=FAILED):
    return asyncio.run(recover(group, EXAMPLE, RuleArithmeticReporter(), policy, settings))


def test_successes_join_on_the_prompt_with_the_report():
    policy = Policy(False, True, True)
    result = recovered(policy)
    assert result.num_joined == 2 and result.num_retries == 3 and result.num_succeeded == 2
    assert result.trained_on == "report" and result.rollouts[:3] == tuple(FAILED)
    assert [str(rollout.id) for rollout in result.rollouts[3:]] == ["arithmetic:0/7.4", "arithmetic:0/7.5"]
    for rollout in result.rollouts[3:]:
        assert rollout.rewards["outcome"] == rollout.rewards["recovered"] == 1.0
        assert rollout.rewards["recovered_on_bare_prompt"] == 0.0 and rollout.routes is not None
        asked = next(example for example, rollout_id in policy.asked if rollout_id == rollout.id)
        assert np.array_equal(rollout.prompt_ids, prompt_ids(asked))
        assert result.reports[rollout.id.member] in asked.messages[-1]["content"]
        assert asked.messages[1]["role"] == "assistant" and asked.facts == EXAMPLE.facts
    assert len({rollout.rewards["outcome"] for rollout in result.rollouts}) == 2


def test_on_the_bare_prompt_the_behaviour_logprobs_stay():
    policy = Policy(True, False, False)
    result = recovered(policy, replace(ON, trained_on="bare"))
    (joined,) = result.rollouts[3:]
    assert np.array_equal(joined.prompt_ids, FAILED[0].prompt_ids) and joined.routes is None
    assert np.array_equal(joined.logprobs, np.linspace(-1, 0, len(joined.output_ids)).astype(np.float32))
    assert joined.rewards["recovered_on_bare_prompt"] == 1.0 and result.trained_on == "bare"


def test_the_two_ways_are_never_mixed():
    result = recovered(Policy(True, True, True))
    with pytest.raises(ValueError, match="joined on another prompt"):
        RecoveredGroup(result.rollouts, "bare", result.reports)
    bare = recovered(Policy(True, False, False), replace(ON, trained_on="bare"))
    with pytest.raises(ValueError, match="joined on another prompt"):
        RecoveredGroup((*bare.rollouts, result.rollouts[-1]), "bare", {**bare.reports, **result.reports})


@pytest.mark.parametrize("settings", [RecoverySettings(), ON])
def test_off_or_not_failed_nothing_is_asked(settings):
    group = FAILED if not settings.is_on else group_of(WRONG, EXAMPLE.facts["reference"])
    policy = Policy()
    result = recovered(policy, settings, group)
    assert result.rollouts == tuple(group) and not policy.asked and not result.num_joined


def test_a_right_answer_by_a_wrong_road_is_a_failure_where_context_decides():
    group = group_of(f"<think>So.</think><answer>{EXAMPLE.facts['answer']}</answer>", WRONG)
    assert not recovered(Policy(), ON, group).num_joined
    assert recovered(Policy(True, True, True), replace(ON, reward="context"), group).num_joined == 2


def test_a_reporter_that_gives_the_answer_away_is_refused_and_nothing_is_asked():
    class Traitor:
        async def report(self, example, attempt, number):
            return f"Say {example.facts['answer']}."

    policy = Policy()
    result = asyncio.run(recover(FAILED, EXAMPLE, Traitor(), policy, ON))
    assert not policy.asked and result.rollouts == tuple(FAILED) and result.num_refused_reports == 12


def test_broken_environments_are_no_attempts():
    broken = [replace(rollout, finish_reason="failed") for rollout in FAILED]
    assert not recovered(Policy(), ON, broken).num_joined


def test_the_report_can_stand_behind_the_question_alone():
    asked = with_report(EXAMPLE, AskedAgain(WRONG, "A step is computed wrongly."), shows_attempt=False)
    assert len(asked.messages) == 1 and WRONG not in str(asked.messages)
    assert str(EXAMPLE.messages[0]["content"]) in asked.messages[0]["content"]


def test_importance_weights_are_ratios_with_a_ceiling():
    weights = importance_weights(
        np.array([-1.0, -3.0, -0.1, -5.0]), np.array([-1.0, -1.0, -2.0, 0.0]), np.array([True, True, True, False]), 2.0
    )
    assert weights == pytest.approx([1.0, np.exp(-2.0), 2.0, 1.0]) and weights.dtype == np.float32
    with pytest.raises(InputError, match="'both'"):
        RecoverySettings(trained_on="both")
