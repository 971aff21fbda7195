"""Environments of `verifiers`, with the real package where it is installed."""

import asyncio
import pickle
import sys
from pathlib import Path

import pytest

from openkeye.agents.loop import run_agent
from openkeye.agents.verifiers_environment import VerifiersEnvironment, VerifiersError
from openkeye.common.checks import InputError
from tests.agents.scripted import Scripted, call, say


def make():
    """The environment of `verifiers_taskset.py`, which verifiers finds by its module's name."""
    import verifiers.v1 as vf

    folder = str(Path(__file__).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    import verifiers_taskset

    agent = vf.AgentConfig(harness=vf.HarnessConfig(id="verifiers_taskset"), runtime=vf.SubprocessConfig())
    taskset = vf.TasksetConfig(id=verifiers_taskset.__name__)
    return vf.SingleAgentEnv(vf.SingleAgentEnvConfig(taskset=taskset, agent=agent))


def test_an_episode():
    pytest.importorskip("verifiers")
    client = Scripted([call("add", a=4, b=4), say("It is 8.")])
    episode = asyncio.run(run_agent(client, VerifiersEnvironment(make)))
    assert episode.opening[-1]["content"].startswith("What is 4 + 4?") and client.seen_tools == ["add"]
    assert [message["role"] for message in episode.transcript] == ["assistant", "tool", "assistant"]
    assert episode.transcript[1]["content"] == "8" and episode.finish == "done"
    assert episode.rewards == {"right": 1.0, "outcome": 1.0}
    wrong = asyncio.run(run_agent(Scripted([say("It is 9.")]), VerifiersEnvironment(make, number=1)))
    assert wrong.opening[-1]["content"].startswith("What is 70 + 70?") and wrong.rewards["outcome"] == 0.0


def test_a_pickled_episode_goes_on_elsewhere():
    pytest.importorskip("verifiers")

    async def move() -> dict:
        first = VerifiersEnvironment(make)
        await first.reset()
        await first.step(call("add", a=4, b=4))
        moved = pickle.loads(pickle.dumps(first))
        await first.close()
        observation = await moved.step(say("8"))
        assert observation.is_done
        rewards = dict(await moved.score())
        await moved.close()
        await moved.close()
        return rewards

    assert asyncio.run(move())["outcome"] == 1.0


def test_what_breaks_is_an_error_of_the_world():
    pytest.importorskip("verifiers")
    with pytest.raises(VerifiersError, match="KeyError"):
        asyncio.run(run_agent(Scripted([call("add", a=4)]), VerifiersEnvironment(make)))
    with pytest.raises(InputError, match="no task 7"):
        asyncio.run(run_agent(Scripted([]), VerifiersEnvironment(make, number=7)))


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(InputError, match="pip install 'verifiers"):
        VerifiersEnvironment(make)
