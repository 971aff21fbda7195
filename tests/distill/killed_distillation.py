"""A distillation that is killed again and again, at moments that are named: python -m tests.distill.killed_distillation FOLDER.

Every life is a process of its own (forked, so that nothing is imported twice) over the folder that the one before left behind.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from openkeye.distill.config import DistillRun
from openkeye.distill.loop import DistillParts, distill
from openkeye.distill.streams import Record, SupportDivergence
from openkeye.rl.rollout import Rollout
from openkeye.tasks.task import Example
from tests.distill.toy_distillation import (
    LENGTH,
    RolloutId,
    ToyLearner,
    ToyPolicy,
    ToySample,
    open_toys,
    toy_run,
    write_toys,
)

MOMENTS = ("learnt 1", "saving 2", "written 2", "told 3", "written 4", "model")
# at each of these the process dies, once; the last life dies of nothing
SURVIVED = ["none yet"]


def die_at(moment: str) -> None:
    """End as if by kill -9 where this is the moment."""
    if moment == SURVIVED[0]:
        os.kill(os.getpid(), signal.SIGKILL)


class SavedLearner(ToyLearner):
    """A toy with a checkpoint, and a list of what it has learnt from that is written before anything is learnt."""

    def __init__(self, run: DistillRun, divergence: SupportDivergence) -> None:
        super().__init__(Path(run.model_dir), divergence)
        self._path = Path(run.run_dir) / "learner.pt"
        if self._path.is_file():
            saved = torch.load(self._path)
            self.version = saved["version"]
            self.model.load_state_dict(saved["model"])
            self._optimizer.load_state_dict(saved["optimizer"])

    def step(self, samples: Sequence[ToySample]) -> Record:
        with (self._path.parent / "attempts.txt").open("a") as file:
            file.write(f"{self.version} {sorted(str(sample.rollout.id) for sample in samples)}\n")
        record = super().step(samples)
        die_at(f"learnt {self.version}")
        return record

    def save(self) -> None:
        die_at(f"saving {self.version}")
        unfinished = self._path.with_suffix(".unfinished")
        state = {"version": self.version, "model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save(state, unfinished)
        os.replace(unfinished, self._path)
        die_at(f"written {self.version}")

    def write_model(self, out_dir: Path) -> None:
        die_at("model")
        super().write_model(out_dir)


class RepeatedPolicy(ToyPolicy):
    """What it says depends on weights and id alone, as a `PolicyEngine`'s answers do."""

    async def roll(self, example: Example, id: RolloutId) -> Rollout:
        self._generator.manual_seed(hash_of(id))
        return await super().roll(example, id)


def hash_of(id: RolloutId) -> int:
    """The same in every process. All rollouts of a step are drawn together, so by its number."""
    return int(np.random.default_rng([id.group, LENGTH]).integers(1 << 31))


def open_killed(run: DistillRun) -> DistillParts:
    """Toys that can be killed."""
    parts = open_toys(run)
    policy = RepeatedPolicy(Path(run.model_dir))
    student = type(parts.student)(policy)  # type: ignore[call-arg]
    return replace(parts, policy=policy, student=student, learner=SavedLearner(run, SupportDivergence(run.distill.estimator)))


def live(run: DistillRun, moment: str) -> int:
    """One life in a process of its own; its exit status, negative for a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    SURVIVED[0] = moment
    asyncio.run(distill(run, open_killed(run), lambda record: die_at(f"told {record['step']}")))
    os._exit(0)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folders = write_toys(folder)
    unbroken, broken = (
        toy_run(folder / name, folders, num_steps=5, save_every_steps=2, rollouts_per_step=8) for name in ("unbroken", "broken")
    )
    assert live(unbroken, "never") == 0
    for moment in MOMENTS:
        print(moment, live(broken, moment))
    print("end", live(broken, "never"))
