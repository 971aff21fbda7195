"""The reference policy beside the rollouts: in this process, and in one of its own that is killed at work."""

import asyncio
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from openkeye.rl.config import AlgorithmConfig
from openkeye.rl.loop import Orchestrator
from openkeye.rl.policy_roles import open_roles
from openkeye.rl.processes import ProcessScorer, RoleProcess, role_folder
from openkeye.rl.prompts import open_tasks, prompt_of
from openkeye.rl.reference_scorer import REF_LOGPROBS, ReferenceScorer, open_reference_scorer, streams_by
from openkeye.rl.roles import RoleLost, ScoredRollout
from openkeye.rl.rollout import Rollout, RolloutId
from openkeye.train.reporter import SilentReporter
from tests.rl.test_policy_roles import config_of

KL_WEIGHT = 0.125


def rollout_of(scorer: ReferenceScorer, folder: Path, length: int = 6) -> Rollout:
    prompt = prompt_of(open_tasks(config_of(folder))["sums"].read(3), scorer._scorer.engine.processor)
    return Rollout(
        id=RolloutId("sums", 3, 0, 0),
        prompt_ids=prompt.model_input.input_ids.numpy().astype(np.int32),
        output_ids=np.arange(40, 40 + length, dtype=np.int32),
        is_policy=np.ones(length, dtype=bool),
        logprobs=np.full(length, -1.0, dtype=np.float32),
        versions=np.zeros(length, dtype=np.int32),
        rewards={"outcome": 1.0},
    )


def test_a_killed_scorer_is_started_again_and_says_the_same(tmp_path: Path):
    config = config_of(tmp_path)

    async def main() -> tuple[ScoredRollout, ScoredRollout]:
        own = await open_reference_scorer(config)
        rollout = rollout_of(own, tmp_path)
        expected = await own.score(rollout)
        await own.close()
        async with role_folder() as folder:
            process = RoleProcess(folder, "scorer0", partial(open_reference_scorer, config))
            scorer = ProcessScorer(process)
            try:
                await scorer.ready()
                # Stopped, so that the kill meets a call that is under way.
                assert process.pid is not None
                os.kill(process.pid, signal.SIGSTOP)
                call = asyncio.create_task(scorer.score(rollout))
                await asyncio.sleep(0.1)
                os.kill(process.pid, signal.SIGKILL)
                with pytest.raises(RoleLost):
                    await call
                await scorer.ready()
                return expected, await scorer.score(rollout)
            finally:
                await process.stop()

    expected, found = asyncio.run(main())
    assert found.arrays[REF_LOGPROBS].shape == (6,) and (found.arrays[REF_LOGPROBS] < 0).all()
    assert found.arrays[REF_LOGPROBS] == pytest.approx(expected.arrays[REF_LOGPROBS], abs=1e-5)


def test_streams_carry_the_reference(tmp_path: Path):
    algorithm = AlgorithmConfig(ref_kl_weight=KL_WEIGHT)
    scorer = ReferenceScorer(config_of(tmp_path))
    first = rollout_of(scorer, tmp_path)
    group = [first, replace(first, rewards={"outcome": 0.0})]

    async def scored() -> list[ScoredRollout]:
        try:
            return [await scorer.score(one) for one in group]
        finally:
            await scorer.close()

    found = asyncio.run(scored())
    streams = streams_by(algorithm, found)
    assert streams is not None
    for stream, one in zip(streams, found, strict=True):
        assert (stream.ref_kl_weights == KL_WEIGHT).all() and np.array_equal(stream.ref_logprobs, one.arrays[REF_LOGPROBS])


def test_the_policy_begins_at_its_reference_and_leaves_it(tmp_path: Path):
    changes = {"algorithm": {"ref_kl_weight": KL_WEIGHT, "drops_zero_variance": False}, "num_steps": 1, "max_dropped": 2}
    reporter = SilentReporter()
    assert Orchestrator(config_of(tmp_path, **changes), open_roles, reporter).run()
    assert abs(float(reporter.records[0]["loss/ref_kl"])) < 1e-9
