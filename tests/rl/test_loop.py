"""The orchestrator with roles in this process: order, groups, ages, stops."""

import asyncio
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from openkeye.common.checks import InputError
from openkeye.rl.data_order import DataOrder
from openkeye.rl.roles import RoleLost, ScoredRollout
from openkeye.rl.run_config import TaskConfig
from tests.rl.stand_ins import (
    LENGTH,
    SIZES,
    ZERO_VARIANCE_EVERY,
    DigestLearner,
    DigestWorker,
    config_of,
    open_roles,
    result_of,
    run_here,
)


class KeepingLearner(DigestLearner):
    """Keeps the updates themselves."""

    def __init__(self, config, **options):
        self.updates = []
        super().__init__(Path(config.run_dir), on_step=self.updates.append, **options)


def groups_of(update):
    """Numbers of an update's groups, in order."""
    return list(dict.fromkeys(sample.rollout.id.group for sample in update.samples))


def varied(id, total):
    """Every group teaches something."""
    return float(id.member == 0)


def test_groups_are_learnt_in_the_exact_order_of_the_data(tmp_path):
    # More slots and groups than an update needs, and updates that take their time: some rollouts are finished too early.
    config = config_of(tmp_path, oversampling=2.5, num_slots=20)
    learner = KeepingLearner(config, seconds=0.02)
    reporter = run_here(config, DigestWorker(num_slots=20), learner=learner)
    assert sum(record["groups/stale"] for record in reporter.records) > 20
    assert not any(record["groups/dropped_failed"] for record in reporter.records)
    order = DataOrder({"sums": 2.0, "words": 1.0}, SIZES, config.seed)
    taken = [group for update in learner.updates for group in groups_of(update)]
    assert taken == sorted(taken) and len(taken) == 12
    left_out = set(range(taken[-1])) - set(taken)
    assert {group for group in range(taken[-1]) if group % ZERO_VARIANCE_EVERY == 2} <= left_out
    for update in learner.updates:
        assert len(update.samples) == 2 * 3
        for sample in update.samples:
            id, rollout = sample.rollout.id, sample.rollout
            assert (id.task, id.number) == order.example(id.group)
            # On-policy: the very weights that learn.
            assert set(rollout.versions[rollout.is_policy]) == {update.version}
            assert rollout.routes.shape == (3 + LENGTH, 2, 1) and rollout.routes.dtype == np.int16


def test_groups_without_variance_are_dropped_counted_and_replaced(tmp_path):
    config = config_of(tmp_path)
    reporter = run_here(config)
    num_dropped = sum(record["groups/dropped_zero_variance"] for record in reporter.records)
    learnt = {int(line.split("/")[1].split(".")[0]) for line in result_of(config)["learnt"]}
    assert num_dropped == max(learnt) + 1 - len(learnt) > 0
    assert all(record["num_rollouts"] == 6 for record in reporter.records)


def test_the_first_to_finish_do_not_wait_for_a_slow_one_and_the_order_of_opening_does(tmp_path):
    slow = "/0.0"
    for takes, is_first in (("finished", False), ("opened", True)):
        config = config_of(tmp_path / takes, takes=takes, max_age=5, num_steps=3, num_slots=12)
        learner = KeepingLearner(config)

        class SlowWorker(DigestWorker):
            async def roll(self, order, on_partial):
                if str(order.id).endswith(slow):
                    await asyncio.sleep(0.3)
                return await super().roll(order, on_partial)

        run_here(config, SlowWorker(num_slots=12, outcome_of=varied), learner=learner)
        assert (0 in groups_of(learner.updates[0])) == is_first


def test_ages_stay_within_their_bound_and_older_rollouts_are_begun_anew(tmp_path):
    config = config_of(tmp_path, max_age=1, takes="finished", num_steps=12, oversampling=2.0)
    learner = KeepingLearner(config)

    class UnevenWorker(DigestWorker):
        async def roll(self, order, on_partial):
            if order.id.member == 2 and order.id.group % 3 == 0:
                await asyncio.sleep(0.25)
            return await super().roll(order, on_partial)

    reporter = run_here(config, UnevenWorker(num_slots=12, outcome_of=varied), learner=learner)
    ages = [sample.rollout.age(update.version) for update in learner.updates for sample in update.samples]
    assert set(ages) == {0, 1}
    assert any(sample.attempt > 0 for update in learner.updates for sample in update.samples)
    assert sum(record["groups/stale"] for record in reporter.records) > 0
    assert max(record["age_max"] for record in reporter.records) == 1
    # Rollouts under way went on under newer weights, and say so token by token.
    assert any(record["mixed_share"] > 0 for record in reporter.records)


def test_weights_wait_for_rollouts_under_way_where_those_may_not_be_mixed(tmp_path):
    config = config_of(tmp_path, max_age=1, takes="finished", keeps_partial=False)
    reporter = run_here(config, DigestWorker(outcome_of=varied))
    assert all(record["mixed_share"] == 0 for record in reporter.records)
    assert any(record["age_max"] == 1 for record in reporter.records)


def test_a_stopped_run_goes_on_from_its_partial_rollouts(tmp_path):
    unbroken = config_of(tmp_path / "unbroken", num_steps=2)
    run_here(unbroken)
    config = config_of(tmp_path / "stopped", num_steps=2)
    first = DigestWorker(longest_seconds=0.05)
    reporter = run_here(config, first, stop_after_seconds=0.15)
    assert "out of time: step 0 is saved" in reporter.lines[-1] and not Path(config.out_dir).exists()
    second = DigestWorker()
    reporter = run_here(config, second)
    resumed = [order for order in second.orders if order.partial is not None]
    assert len(resumed) == first.num_slots and all(order.partial.num_tokens > 0 for order in resumed)
    assert sum(record["groups/resumed"] for record in reporter.records) > 0
    assert result_of(config) == result_of(unbroken)


def test_finished_rollouts_are_not_played_again_after_a_restart(tmp_path):
    config = config_of(tmp_path, num_steps=3, save_every_steps=10)

    class Killed(BaseException):
        pass

    class DyingLearner(DigestLearner):
        async def step(self, update):
            if update.version == 2:
                raise Killed
            return await super().step(update)

    first, second = DigestWorker(), DigestWorker()
    with pytest.raises(Killed):
        run_here(config, first, learner=DyingLearner(Path(config.run_dir)))
    learner = KeepingLearner(config)
    run_here(config, second, learner=learner)
    # No checkpoint was written: all three updates are repeated, from rollouts that nobody plays again.
    assert [update.version for update in learner.updates] == [0, 1, 2]
    learnt = {str(sample.rollout.id) for update in learner.updates for sample in update.samples}
    assert not learnt & {str(order.id) for order in second.orders}


class LabellingScorer:
    """Adds a reward and an array; the third call is lost, and one rollout cannot be scored."""

    def __init__(self):
        self.num_calls = 0

    async def ready(self):
        pass

    async def score(self, rollout):
        self.num_calls += 1
        await asyncio.sleep(0.001)
        if self.num_calls == 3:
            raise RoleLost("scorer", "signal 9")
        if (rollout.id.group, rollout.id.member) == (1, 1):
            raise OSError("no judge")
        scored = replace(rollout, rewards={**rollout.rewards, "judge": 0.5})
        return ScoredRollout(scored, {"support": np.full((len(rollout.output_ids), 2), rollout.id.member, np.int32)})


def test_scorers_add_to_rollouts_and_what_they_cannot_score_is_left_out(tmp_path):
    config = config_of(tmp_path, num_steps=2)
    learner, scorer = KeepingLearner(config), LabellingScorer()
    reporter = run_here(config, DigestWorker(outcome_of=varied), learner=learner, scorers=[scorer])
    assert all(record["reward/judge"] == 0.5 for record in reporter.records)
    ids = [sample.rollout.id for update in learner.updates for sample in update.samples]
    assert (1, 1) not in {(id.group, id.member) for id in ids} and len(ids) == 4 * 3 - 1
    assert reporter.records[0]["groups/failed"] == 1 and reporter.records[0]["seconds/score"] > 0


def test_a_rollout_that_hangs_or_breaks_costs_itself_alone(tmp_path):
    config = config_of(tmp_path, rollout_seconds=0.3, num_steps=2)

    class BreakingWorker(DigestWorker):
        async def roll(self, order, on_partial):
            if (order.id.group, order.id.member) == (1, 2):
                raise ZeroDivisionError("in an environment")
            return await super().roll(order, on_partial)

    def hangs(order):
        return (order.id.group, order.id.member) == (0, 1)

    learner = KeepingLearner(config)
    reporter = run_here(config, BreakingWorker(outcome_of=varied, hangs=hangs), learner=learner)
    learnt = {(sample.rollout.id.group, sample.rollout.id.member) for sample in learner.updates[0].samples}
    assert learnt == {(0, 0), (0, 2), (1, 0), (1, 1)}
    assert reporter.records[0]["groups/failed"] == 2
    told = "\n".join(reporter.lines)
    assert "nothing after 0.3 s" in told and "ZeroDivisionError: in an environment" in told


def test_a_run_in_which_nothing_can_be_learnt_ends(tmp_path):
    config = config_of(tmp_path, max_dropped=5)
    with pytest.raises(InputError, match=r"6 groups in a row taught nothing.*zero_variance"):
        run_here(config, DigestWorker(outcome_of=lambda id, total: 1.0))


def test_evaluations_come_at_their_steps_and_only_once(tmp_path):
    changes = {"evaluate_every": 2, "evaluation_tasks": {"probe": TaskConfig("probe")}, "num_steps": 3}
    config = config_of(tmp_path, **changes)
    worker = DigestWorker(longest_seconds=0)
    reporter = run_here(config, worker)
    asked = Counter((order.id.group, order.id.number) for order in worker.orders if order.is_evaluation)
    assert asked == {(-1 - version, number): 1 for version in (0, 2, 3) for number in range(3)}
    steps = [record["step"] for record in reporter.records if "evaluation/probe/outcome" in record]
    assert steps == [0, 2, 3]
    log = [json.loads(line) for line in (Path(config.run_dir) / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [0, 1, 2, 3]


def test_a_finished_run_only_writes_its_model_again(tmp_path):
    config = config_of(tmp_path, num_steps=1)
    run_here(config)
    before = result_of(config)
    worker = DigestWorker()
    run_here(config, worker)
    assert not worker.orders and result_of(config) == before


def test_a_learner_that_does_not_fit_the_journal_is_refused(tmp_path):
    config = config_of(tmp_path, num_steps=2)
    run_here(config)
    (Path(config.run_dir) / "learner.json").unlink()
    with pytest.raises(InputError, match="the learner stands at step 0, and the journal goes on from steps 2 to 2"):
        run_here(config)
    with pytest.raises(InputError, match="group_size was 3 and is 4"):
        run_here(config_of(tmp_path, num_steps=2, group_size=4))


def test_a_learner_that_keeps_dying_ends_the_run(tmp_path):
    class LostLearner(DigestLearner):
        async def step(self, update):
            raise RoleLost("learner", "signal 9")

    config = config_of(tmp_path)
    with pytest.raises(InputError, match="update 0 was given up after 3 losses"):
        run_here(config, learner=LostLearner(Path(config.run_dir)))


def test_log_records_tell_what_is_always_told(tmp_path):
    record = run_here(config_of(tmp_path, num_steps=1)).records[0]
    names = {
        "reward/outcome", "reward/format", "length", "length_max", "cut_share", "repetition_share", "age", "age_max",
        "mixed_share",
        "groups/dropped_zero_variance", "groups/dropped_failed", "groups/stale", "groups/resumed", "groups/failed",
        "groups/open", "groups/lost", "seconds/rollout", "seconds/score", "seconds/update", "seconds_per_step",
        "tokens_per_second", "num_rollouts", "sampled_tokens", "loss", "entropy",
    }  # fmt: skip
    assert names <= record.keys()


def test_the_stand_ins_open_as_a_recipe_would_have_them(tmp_path):
    async def main():
        async with open_roles(config_of(tmp_path)) as roles:
            assert roles.task_sizes == SIZES

    asyncio.run(main())
