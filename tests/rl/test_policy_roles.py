"""The whole loop with a real engine, a real learner and a real task, on the bundled model."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openkeye.inputs.processor import resolve_model_dir
from openkeye.model.weights import load_model
from openkeye.rl import policy_roles
from openkeye.rl.loop import Orchestrator
from openkeye.rl.policy_roles import open_roles
from openkeye.rl.roles import Roles, ScoredRollout
from openkeye.rl.rollout import TokenStreams
from openkeye.rl.run_config import PostTrainingConfig, TaskConfig
from openkeye.train.reporter import SilentReporter
from tests.rl.toy_world import ToyEnvironment, ToyTask


def config_of(folder: Path, **changes: Any) -> PostTrainingConfig:
    """Two updates of two short answers to two sums each."""
    settings: dict[str, Any] = {
        "model_dir": "openkeye-tiny",
        "run_dir": str(folder / "run"),
        "out_dir": str(folder / "out"),
        "tasks": {"sums": TaskConfig("arithmetic")},
        "num_steps": 2,
        "opens": "openkeye.rl.policy_roles:open_roles",
        "group_size": 2,
        "groups_per_step": 2,
        "oversampling": 1.0,
        "max_age": 0,
        "max_tokens": 8,
        "num_slots": 4,
        "learner": {"rate": 3e-4, "tokens_per_pack": 4096},
        "save_every_steps": 1,
    }
    return PostTrainingConfig(**settings | changes)


def first_is_better(group: Sequence[ScoredRollout]) -> list[TokenStreams]:
    """The bundled model's short answers to sums are all wrong, so that rewards would teach nothing."""
    streams = []
    for scored in group:
        weights = scored.rollout.is_policy.astype(np.float32)
        sign = np.float32(1.0 if scored.rollout.id.member == 0 else -1.0)
        streams.append(TokenStreams(sign * weights, weights, 0 * weights, 0 * weights))
    return streams


@asynccontextmanager
async def open_taught(config: PostTrainingConfig) -> AsyncIterator[Roles]:
    """The real roles with these streams."""
    async with open_roles(config) as roles:
        yield replace(roles, streams_of=first_is_better)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_engine_samples_with_what_the_learner_has_learnt(tmp_path: Path, num_workers: int):
    reporter = SilentReporter()
    config = config_of(tmp_path, num_workers=num_workers)
    assert Orchestrator(config, open_taught, reporter).run()
    assert [record["step"] for record in reporter.records] == [1, 2]
    told = {"mismatch/k3", "clip_high_share", "masked_share", "entropy", "route_disagreement", "reward/outcome", "length"}
    for record in reporter.records:
        # Sampled by the very weights that learn, before the first update and behind it.
        assert record["mismatch/mean_abs"] < 1e-5 and record["age_max"] == 0
        assert record["effective_sample_size"] == pytest.approx(1.0, abs=1e-4) and told <= record.keys()
    before, after = (
        load_model(folder, dtype=torch.float32) for folder in (resolve_model_dir("openkeye-tiny"), tmp_path / "out")
    )
    changes = [
        float((old - new).abs().max())
        for old, new in zip(before.state_dict().values(), after.state_dict().values(), strict=True)
    ]
    assert max(changes) > 1e-4


def test_episodes_act_in_environments_of_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(policy_roles, "open_tasks", lambda config: {"toy": ToyTask(ToyEnvironment(2))})
    reporter = SilentReporter()
    changes = {"tasks": {"toy": TaskConfig("toy")}, "num_environments": 1, "num_steps": 1, "max_tokens": 64}
    assert Orchestrator(config_of(tmp_path, **changes), open_taught, reporter).run()
    record = reporter.records[0]
    assert record["reward/outcome"] == 1.0 and record["groups/failed"] == 0 and record["mismatch/mean_abs"] < 1e-5
