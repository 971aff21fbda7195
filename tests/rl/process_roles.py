"""The stand-in roles in processes of their own."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from openkeye.common.checks import InputError
from openkeye.common.launch import num_ranks, rank
from openkeye.rl.processes import ProcessLearner, ProcessWorker, RoleProcess, role_folder
from openkeye.rl.roles import OnPartial, PartialRollout, Roles, RolloutOrder
from openkeye.rl.rollout import Rollout
from openkeye.rl.run_config import PostTrainingConfig
from tests.rl.stand_ins import SIZES, DigestLearner, DigestWorker, streams_of

BLOCKED_SECONDS = 1.0
started: list[RoleProcess] = []
# by the last run of this process


class InnerWorker(DigestWorker):
    """Plays in tasks of its own making, as code of environments does."""

    async def roll(self, order: RolloutOrder, on_partial: OnPartial) -> Rollout | PartialRollout:
        """See `RolloutWorker.roll`."""
        return await asyncio.create_task(super().roll(order, on_partial))


async def open_worker(blocks: str = "", waits: str = "") -> DigestWorker:
    """In the worker's process; rollouts whose ids end so hold up everything, or wait for ever."""

    def hangs(order: RolloutOrder) -> bool:
        place = str(order.id).partition("/")[2]
        if place == blocks:
            time.sleep(1e6)
        return place == waits

    return InnerWorker(hangs=hangs, outcome_of=(lambda id, total: float(id.member == 0)) if blocks else None)


async def open_learner(run_dir: str) -> DigestLearner:
    """In the learner's process."""
    return DigestLearner(Path(run_dir), seconds=0.02)


@asynccontextmanager
async def open_processes(
    config: PostTrainingConfig, say: Callable[[str], None] = print, num_workers: int = 2, **worker: Any
) -> AsyncIterator[Roles]:
    """Workers and the learner, each in a process."""
    async with role_folder() as folder:
        learner = RoleProcess(folder, "learner", partial(open_learner, config.run_dir), say=say)
        workers = [
            RoleProcess(folder, f"worker{number}", partial(open_worker, **worker), blocked_seconds=BLOCKED_SECONDS, say=say)
            for number in range(num_workers)
        ]
        started[:] = [learner, *workers]
        try:
            yield Roles(
                ProcessLearner(learner),
                [ProcessWorker(process, config.num_slots) for process in workers],
                (),
                streams_of,
                SIZES,
            )
        finally:
            for process in started:
                await process.stop()


class Echo:
    """A role for tests of calls."""

    def __init__(self) -> None:
        self.num_cancels = 0

    async def echo(self, value: Any, tell: Callable[[str], None]) -> Any:
        """The value, after two words."""
        tell("first")
        tell("second")
        return value

    async def refuse(self) -> None:
        """Wrong input."""
        raise InputError("wrong shape")

    async def break_down(self) -> float:
        """A mistake of its own."""
        return 1 / 0

    async def wait(self) -> None:
        """Until cancelled, which is counted."""
        try:
            await asyncio.sleep(1e6)
        except asyncio.CancelledError:
            self.num_cancels += 1
            raise

    async def num_cancelled(self) -> int:
        """Of `wait`."""
        return self.num_cancels

    async def ranks(self) -> tuple[int, int]:
        """Own rank, and how many there are."""
        return rank(), num_ranks()

    async def end_rank(self, number: int) -> None:
        """One rank dies, the others wait."""
        if rank() == number:
            os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.sleep(1e6)


async def open_echo() -> Echo:
    """In its process."""
    return Echo()


async def open_refusing() -> Echo:
    """In its process."""
    raise InputError("no such model")
