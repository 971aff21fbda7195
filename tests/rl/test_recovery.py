"""Groups in which all fail, asked again by the orchestrator: what joins, what is learnt, and what a kill repeats."""

from collections import Counter
from pathlib import Path

import pytest

from openkeye.common.checks import InputError
from openkeye.rl.journal import Journal
from openkeye.rl.loop import Orchestrator
from openkeye.rl.roles import AskedAgain
from openkeye.train.reporter import SilentReporter
from tests.rl.stand_ins import (
    GROUP_SIZE,
    DigestLearner,
    DigestWorker,
    config_of,
    failing_outcome_of,
    result_of,
    roles_of,
    run_here,
)
from tests.rl.test_chaos import end_of

ON = {"is_on": True, "trained_on": "report", "max_joined": 1}


class KeepingLearner(DigestLearner):
    """Keeps the updates themselves."""

    def __init__(self, config):
        self.updates = []
        super().__init__(Path(config.run_dir), on_step=self.updates.append)


@pytest.mark.parametrize("trained_on", ["report", "bare"])
def test_successes_join_their_group_and_nothing_else_does(tmp_path, trained_on):
    config = config_of(tmp_path, recovery={**ON, "trained_on": trained_on})
    learner, worker = KeepingLearner(config), DigestWorker(outcome_of=failing_outcome_of)
    reporter = run_here(config, worker, learner=learner)
    samples = [sample for update in learner.updates for sample in update.samples]
    joined = [sample for sample in samples if sample.rollout.id.member >= GROUP_SIZE]
    assert 3 <= len(joined) == sum(record["groups/recovered"] for record in reporter.records)
    assert sum(record["groups/asked_again"] for record in reporter.records) >= len(joined)
    for sample in samples:
        id = sample.rollout.id
        assert (sample.again is not None) == (trained_on == "report" and id.member >= GROUP_SIZE)
        if id.member < GROUP_SIZE:
            continue
        assert id.group % 2 and sample.rollout.rewards["outcome"] == sample.rollout.rewards["recovered"] == 1.0
        assert (sample.rollout.routes is None) == (trained_on == "bare")
        others = [one for one in samples if one.rollout.id.group == id.group and one is not sample]
        # All of the group's own, which failed, and one that did not.
        assert [one.rollout.id.member for one in others] == list(range(GROUP_SIZE))
        assert all(one.rollout.rewards["outcome"] == 0 for one in others) and sample.streams.advantages.max() > 0
        (order,) = {order.again for order in worker.orders if order.id == id and order.again} & {
            AskedAgain(one.rollout.text, f"not {one.rollout.text}") for one in others
        }
        assert trained_on == "bare" or sample.again == order


def test_while_it_is_off_failed_groups_are_dropped(tmp_path):
    config = config_of(tmp_path)
    learner = KeepingLearner(config)
    reporter = run_here(config, DigestWorker(outcome_of=failing_outcome_of), learner=learner)
    samples = [sample for update in learner.updates for sample in update.samples]
    assert all(sample.rollout.id.group % 2 == 0 for sample in samples)
    assert not any(record["groups/asked_again"] for record in reporter.records)


@pytest.mark.parametrize("max_age", [0, 1])
def test_a_run_that_is_killed_asks_no_group_twice_and_learns_what_an_unbroken_one_does(tmp_path, max_age):
    changes = {"num_steps": 4, "recovery": ON, "max_age": max_age}
    assert end_of(tmp_path / "broken", 11, **changes, least_compacted_bytes=6000) >= 8
    learnt = result_of(config_of(tmp_path / "broken", **changes))["learnt"]
    ids = [line.split()[1] for line in learnt]
    assert Counter(ids).most_common(1)[0][1] == 1 and any(int(id.rpartition(".")[2]) >= GROUP_SIZE for id in ids)
    if not max_age:
        # On-policy and in order, it repeats exactly.
        unbroken = config_of(tmp_path / "unbroken", **changes)
        run_here(unbroken)
        assert result_of(unbroken)["learnt"] == learnt


def test_what_is_written_of_retries_is_not_played_again(tmp_path):
    config = config_of(tmp_path, recovery=ON, num_steps=2)
    first, second = DigestWorker(outcome_of=failing_outcome_of), DigestWorker(outcome_of=failing_outcome_of)
    run_here(config, first, stop_after_seconds=0.15)
    journal = Journal(Path(config.run_dir) / "journal")
    done = {
        (event.facts["group"], event.facts["member"], event.facts["attempt"])
        for event in journal.events
        if event.kind == "finished"
    }
    journal.close()
    run_here(config, second)
    assert done and not done & {(order.id.group, order.id.member, order.attempt) for order in second.orders}


def test_a_reward_that_nobody_gives_and_a_run_without_reports_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"recovery\.reward is 'context'"):
        run_here(config_of(tmp_path / "a", recovery={**ON, "reward": "context"}))
    config = config_of(tmp_path / "b", recovery=ON)

    def without_reports(config):
        from contextlib import asynccontextmanager
        from dataclasses import replace

        @asynccontextmanager
        async def opened(config):
            yield replace(roles_of(config), report_on=None)

        return opened(config)

    with pytest.raises(InputError, match="nobody tells of mistakes"):
        Orchestrator(config, without_reports, SilentReporter()).run()
