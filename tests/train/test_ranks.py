"""How packs are shared out among ranks, and parameters among them, changes neither loss nor gradients: real gloo processes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openkeye.train.config import RunConfig
from tests.train.toy_runs import (
    ADAPTATION,
    WARM_UP,
    Job,
    log_of,
    run_jobs,
    run_keeping_gradients,
    toy_run,
    toy_stage,
    write_toy_model,
)

STAGES = (
    toy_stage("answers", num_steps=2, packs_per_step=4, balance_weight=0.1),
    toy_stage("projector", num_steps=1, packs_per_step=4, trains=("projector",)),
    toy_stage("warm-up", num_steps=1, packs_per_step=4, **WARM_UP),
    toy_stage("adaptation", num_steps=2, packs_per_step=4, **ADAPTATION),
)
# Small, so that Adam's first steps do not blow up differences of one rounding.
STAGES = tuple(replace(stage, rate=1e-5, context=64) for stage in STAGES)
FIGURES = ("loss", "answer_loss", "loss/seen", "loss/read", "indexer_kl", "indexer_recall", "balance", "gradient_norm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> tuple[list[dict[str, torch.Tensor]], list[dict]]:
    config = run_named(folder, "alone")
    return run_keeping_gradients(config), log_of(config)


def run_named(folder: Path, name: str, **changes: object) -> RunConfig:
    return toy_run(folder, *STAGES, run_dir=str(folder / name), out_dir=str(folder / name / "out"), **changes)


@pytest.fixture(scope="module")
def over_ranks(folder: Path) -> dict[int, RunConfig]:
    configs = {2: run_named(folder, "two"), 4: run_named(folder, "four", num_shards=2, recomputes=True)}
    run_jobs(folder, *(Job(config, size, keeps_gradients=True) for size, config in configs.items()))
    return configs


@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_gradients_are_those_of_one_process(alone, over_ranks, size: int):
    # Four are two replicas of two shards each, and compute activations again.
    config = over_ranks[size]
    expected_gradients, expected_records = alone
    for rank in range(size):
        gradients = torch.load(f"{config.out_dir}.gradients.{rank}.pt")
        assert len(gradients) == len(expected_gradients) == 6
        for step, (own, expected) in enumerate(zip(gradients, expected_gradients, strict=True)):
            assert own.keys() == expected.keys()
            for parameter, gradient in own.items():
                scale = float(expected[parameter].abs().max())
                difference = float((gradient - expected[parameter]).abs().max())
                assert difference <= 2e-5 * scale + 1e-8, (step, parameter, difference, scale)
    for own, expected in zip(log_of(config), expected_records, strict=True):
        assert {name for name in FIGURES if name in own} == {name for name in FIGURES if name in expected}
        for figure in FIGURES:
            if figure in expected:
                assert own[figure] == pytest.approx(expected[figure], rel=2e-5), figure


def test_the_packs_are_what_the_test_is_about(alone):
    gradients, records = alone
    assert all(
        float(gradient.abs().max()) > 0 for name, gradient in gradients[0].items() if "gate_up" in name or "visual" in name
    )
    assert "balance" in records[1] and "indexer_kl" in records[3] and "indexer_kl" in records[4]
