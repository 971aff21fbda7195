"""The stand-in roles in processes of their own."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from openkeye.rl.processes import ProcessLearner, ProcessWorker, RoleProcess, role_folder
from openkeye.rl.roles import Roles
from openkeye.rl.run_config import PostTrainingConfig
from tests.rl.stand_ins import SIZES, DigestLearner, DigestWorker, streams_of

BLOCKED_SECONDS = 1.0
started: list[RoleProcess] = []
# by the last run of this process


async def open_worker(**options: Any) -> DigestWorker:
    """In the worker's process."""
    return DigestWorker(**options)


async def open_learner(run_dir: str) -> DigestLearner:
    """In the learner's process."""
    return DigestLearner(Path(run_dir), seconds=0.02)


@asynccontextmanager
async def open_processes(config: PostTrainingConfig, num_workers: int = 2, **worker: Any) -> AsyncIterator[Roles]:
    """Workers and the learner, each in a process."""
    async with role_folder() as folder:
        learner = RoleProcess(folder, "learner", partial(open_learner, config.run_dir))
        workers = [
            RoleProcess(folder, f"worker{number}", partial(open_worker, **worker), blocked_seconds=BLOCKED_SECONDS)
            for number in range(num_workers)
        ]
        started[:] = [learner, *workers]
        try:
            yield Roles(
                ProcessLearner(learner), [ProcessWorker(process, config.num_slots) for process in workers], (), streams_of, SIZES
            )
        finally:
            for process in started:
                await process.stop()
