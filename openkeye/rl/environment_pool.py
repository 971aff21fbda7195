"""Environments in processes of their own, so that code of theirs that hangs, crashes or fills the memory costs one rollout.

Between two calls an environment is a pickle that the rollout's worker holds. A call carries it to any host, which unpickles it,
lets it act, and sends it back as it is then. Where a host dies under a call of one rollout, the calls of others are repeated
elsewhere from the pickles that they began with.
"""

import asyncio
import pickle
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from openkeye.agents.environment import Environment, Observation, Opening
from openkeye.agents.model_client import ModelReply
from openkeye.rl.processes import RoleProcess, role_folder
from openkeye.rl.roles import RoleLost


class EnvironmentHost:
    """Runs in a process of its own, and holds nothing between calls."""

    async def call(self, state: bytes, method: str, arguments: tuple[Any, ...]) -> tuple[Any, bytes]:
        """(what the environment's method returns, the environment after it)."""
        environment: Environment = pickle.loads(state)
        result = await getattr(environment, method)(*arguments)
        return result, pickle.dumps(environment)


async def open_host() -> EnvironmentHost:
    """In the host's process."""
    return EnvironmentHost()


class EnvironmentPool:
    """Hosts that take turns."""

    current: "EnvironmentPool | None" = None
    # of this process: a pickled environment finds it wherever it is unpickled

    def __init__(self, processes: list[RoleProcess]) -> None:
        self._processes = processes
        self._turn = 0
        self._suspects = asyncio.Lock()

    async def call(self, label: str, state: bytes, method: str, arguments: tuple[Any, ...]) -> tuple[Any, bytes]:
        """See `EnvironmentHost.call`.

        Args:
            label: of the rollout.

        Raises:
            RoleLost: the call has held up its host, or hosts die of it.
            RoleError, InputError: what the environment raised.
        """
        try:
            return await self._ask(label, state, method, arguments)
        except RoleLost as lost:
            if lost.culprit == label:
                raise
        # Nobody knows which call it was: those of a host that died are repeated one at a time.
        async with self._suspects:
            try:
                return await self._ask(label, state, method, arguments)
            except RoleLost as lost:
                if lost.culprit in (label, ""):
                    raise
            return await self._ask(label, state, method, arguments)

    async def _ask(self, label: str, *call: Any) -> tuple[Any, bytes]:
        self._turn += 1
        process = self._processes[self._turn % len(self._processes)]
        await process.ready()
        return await process.call("call", *call, label=label)


@asynccontextmanager
async def environment_pool(
    num_hosts: int, blocked_seconds: float, inside: Path | None = None
) -> AsyncIterator[EnvironmentPool]:
    """This process' pool while the block runs.

    Args:
        blocked_seconds: for which an environment may hold up its host.
        inside: a folder for what hosts and pool meet in; None: the system's for temporary files.
    """
    async with role_folder(inside) as folder:
        processes = [
            RoleProcess(folder, f"host{number}", open_host, blocked_seconds=blocked_seconds) for number in range(num_hosts)
        ]
        EnvironmentPool.current = EnvironmentPool(processes)
        try:
            yield EnvironmentPool.current
        finally:
            EnvironmentPool.current = None
            await asyncio.gather(*(process.stop() for process in processes))


class HostedEnvironment:
    """An `Environment` whose code runs in the pool of whichever process holds it."""

    def __init__(self, environment: Environment, label: str) -> None:
        """label: of the rollout that acts in it."""
        self.label = label
        self._state = pickle.dumps(environment)

    async def reset(self) -> Opening:
        """See `Environment.reset`."""
        return await self._call("reset")

    async def step(self, reply: ModelReply) -> Observation:
        """See `Environment.step`."""
        return await self._call("step", reply)

    async def score(self) -> Mapping[str, float]:
        """See `Environment.score`."""
        return await self._call("score")

    async def close(self) -> None:
        """See `Environment.close`."""
        await self._call("close")

    async def _call(self, method: str, *arguments: Any) -> Any:
        pool = EnvironmentPool.current
        assert pool is not None, "hosted environments live in a process with a pool"
        result, self._state = await pool.call(self.label, self._state, method, arguments)
        return result
