"""Environments in hosts: their state travels, and what hangs or dies costs its own rollout."""

import asyncio
import os
import pickle
import signal
import time

import pytest

from openkeye.agents.environment import Observation, Opening
from openkeye.agents.model_client import ModelReply
from openkeye.rl.environment_pool import HostedEnvironment, environment_pool
from openkeye.rl.roles import RoleLost


class Counting:
    """Counts steps; some words have consequences."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int]] = []

    async def reset(self) -> Opening:
        self.steps = []
        return Opening(({"role": "user", "content": "count"},))

    async def step(self, reply: ModelReply) -> Observation:
        if reply.text == "hang":
            time.sleep(1e6)
        if reply.text == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.sleep(1.0 if reply.text == "slow" else 0)
        self.steps.append((reply.text, os.getpid()))
        return Observation(is_done=len(self.steps) == 3)

    async def score(self) -> dict[str, float]:
        return {"outcome": float(len(self.steps))}

    async def close(self) -> None:
        pass


def with_pool(work, num_hosts):
    async def main():
        async with environment_pool(num_hosts, blocked_seconds=0.8):
            return await work()

    return asyncio.run(main())


def test_state_travels_between_hosts_and_into_pickles():
    async def work():
        world = HostedEnvironment(Counting(), "a")
        assert (await world.reset()).messages[0]["content"] == "count"
        assert not (await world.step(ModelReply("one"))).is_done
        # Copied in the middle, as a partial rollout is.
        other = pickle.loads(pickle.dumps(world))
        for environment in (world, other):
            assert not (await environment.step(ModelReply("two"))).is_done
            assert (await environment.step(ModelReply("three"))).is_done
            assert await environment.score() == {"outcome": 3.0}
        return {pid for _, pid in pickle.loads(other._state).steps}

    pids = with_pool(work, 2)
    assert len(pids) == 2 and os.getpid() not in pids


@pytest.mark.parametrize("word", ["hang", "die"])
def test_a_step_that_takes_its_host_along_costs_its_own_rollout(word):
    async def work():
        bad, good = HostedEnvironment(Counting(), "bad"), HostedEnvironment(Counting(), "good")
        await asyncio.gather(bad.reset(), good.reset())
        await good.step(ModelReply("one"))
        slow = asyncio.create_task(good.step(ModelReply("slow")))
        await asyncio.sleep(0.1)
        with pytest.raises(RoleLost):
            await bad.step(ModelReply(word))
        await slow
        assert await good.score() == {"outcome": 2.0}

    with_pool(work, 1)
