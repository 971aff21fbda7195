"""Begins an episode, writes its state down after each turn, and is killed after the first."""

import asyncio
import os
import pickle
import signal
import sys
from pathlib import Path

from openkeye.engine.config import EngineConfig
from openkeye.engine.loop import Engine
from openkeye.rl.episode import EpisodeState, run_episode
from openkeye.rl.policy_engine import PolicyEngine
from openkeye.rl.rollout import RolloutId
from tests.rl.toy_world import ToyEnvironment, ToyTask


def die(state: EpisodeState, path: Path) -> None:
    path.write_bytes(pickle.dumps(state))
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    task = ToyTask(ToyEnvironment(3))
    config = EngineConfig(is_batch_invariant=True, prefill_chunk_tokens=128, max_batch_requests=6, page_size=16)
    policy = PolicyEngine(Engine(config=config))
    asyncio.run(run_episode(policy, task, task.read(0), RolloutId("toy", 0, 0, 0), lambda state: die(state, target)))
