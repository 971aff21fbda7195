"""The real loop with trainer ranks under torchrun: as one rank learns, and through the death of a rank."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from openkeye.rl.context_rl import RecoverySettings
from openkeye.rl.groups import GroupBook
from openkeye.rl.journal import Journal
from openkeye.rl.loop import JOURNAL_DIR, Orchestrator
from openkeye.rl.processes import ProcessLearner
from openkeye.rl.roles import Record, RoleLost, Roles, Update
from openkeye.rl.run_config import PostTrainingConfig
from openkeye.train.reporter import SilentReporter
from tests.rl.test_policy_roles import config_of, open_taught

NUM_STEPS = 2


class Killing:
    """A learner of which one rank is killed while it makes its second step, once."""

    def __init__(self, learner: ProcessLearner) -> None:
        self._learner = learner
        self.samples: list[tuple[int, str]] = []
        # of every step that came to its end
        self.num_kills = 0

    def __getattr__(self, name: str):
        return getattr(self._learner, name)

    async def step(self, update: Update) -> Record:
        step = asyncio.create_task(self._learner.step(update))
        if update.version == 1 and not self.num_kills:
            self.num_kills += 1
            await asyncio.sleep(0.02)
            torchrun = self._learner.process.pid
            ranks = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
            os.kill(int(ranks[-1]), signal.SIGKILL)
            with pytest.raises(RoleLost):
                await step
        record = await step
        self.samples += [(update.version, str(sample.rollout.id)) for sample in update.samples]
        return record


killing: list[Killing] = []


@asynccontextmanager
async def open_killing(config: PostTrainingConfig) -> AsyncIterator[Roles]:
    async with open_taught(config) as roles:
        assert isinstance(roles.learner, ProcessLearner)
        killing[:] = [Killing(roles.learner)]
        yield replace(roles, learner=killing[0])


def test_two_ranks_learn_as_one_does_and_a_killed_one_costs_nothing(tmp_path: Path):
    reporters = []
    for name, num_ranks, opens in (("one", 1, open_taught), ("two", 2, open_killing)):
        reporter = SilentReporter()
        # (fields of the run that have to be alike for the same rollouts)
        config = config_of(tmp_path / name, num_workers=1, num_ranks=num_ranks, takes="opened", num_steps=NUM_STEPS)
        config = replace(config, engine={"is_batch_invariant": True})
        assert Orchestrator(config, opens, reporter).run()
        reporters.append(reporter)
    one, two = (reporter.records for reporter in reporters)
    assert [record["step"] for record in two] == [1, 2]
    for alone, over in zip(one, two, strict=True):
        for name in ("loss/rl", "entropy", "gradient_norm"):
            assert over[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-5), name
    assert killing[0].num_kills == 1 and any("begins again" in line for line in reporters[1].lines)
    # Each step of the run that lasted has its rollouts once; the step before the kill was on disk.
    assert len(killing[0].samples) == len(set(killing[0].samples)) == 4 * NUM_STEPS
    journal = Journal(tmp_path / "two" / "run" / JOURNAL_DIR)
    assert GroupBook(journal, False, RecoverySettings()).next_update == NUM_STEPS
    journal.close()
