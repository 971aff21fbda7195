"""Two real gloo processes, with different samples and numbers of packs, make the steps of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from openkeye.rl.learner import opened_learner
from tests.rank_processes import run_ranks
from tests.rl import learner_ranks
from tests.train.toy_runs import CPU, write_toy_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return learner_ranks.run(folder, "alone")


@pytest.fixture(scope="module")
def over_ranks(folder: Path) -> list[dict[str, Any]]:
    for status, _, errors in run_ranks(2, "tests.rl.learner_ranks", folder, "recomputed"):
        assert status == 0, errors
    return [torch.load(folder / f"recomputed.{rank}.pt", weights_only=False) for rank in range(2)]


def test_gradients_are_those_of_one_process(alone, over_ranks):
    assert len(alone["gradients"]) == 2
    for found in over_ranks:
        for own, expected in zip(found["gradients"], alone["gradients"], strict=True):
            assert own.keys() == expected.keys()
            for name, gradient in own.items():
                scale = float(expected[name].abs().max())
                assert float((gradient - expected[name]).abs().max()) <= 2e-5 * scale + 1e-8, name
    assert all(
        float(alone["gradients"][0][name].abs().max()) > 0
        for name in alone["gradients"][0]
        if "visual" in name or "gate" in name
    )


def test_records_are_the_same_on_every_rank_and_in_one_process(alone, over_ranks):
    for own, other, expected in zip(over_ranks[0]["records"], over_ranks[1]["records"], alone["records"], strict=True):
        assert own == other and own.keys() == expected.keys()
        for name, value in expected.items():
            assert own[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
    assert {"route_disagreement", "indexer_kl", "effective_sample_size", "reward/outcome"} <= alone["records"][0].keys()


def test_log_probabilities_are_the_same(alone, over_ranks):
    joined = over_ranks[0]["logprobs"] | over_ranks[1]["logprobs"]
    assert joined.keys() == alone["logprobs"].keys()
    assert all(joined[name] == pytest.approx(own, abs=1e-5) for name, own in alone["logprobs"].items())


def test_a_rank_without_a_minibatch_steps_with_the_others(over_ranks):
    assert over_ranks[0]["minibatches"] == over_ranks[1]["minibatches"] and len(over_ranks[0]["minibatches"]) == 2
    weights, others = (found["weights"] for found in over_ranks)
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_what_one_rank_cannot_take_is_refused_by_all(over_ranks):
    assert over_ranks[0]["refused"] == over_ranks[1]["refused"] and "tokens_per_pack" in over_ranks[0]["refused"]


def test_one_process_goes_on_from_the_checkpoint_of_two(folder: Path, over_ranks):
    with opened_learner(learner_ranks.config_of(folder, "recomputed"), learner_ranks.ALGORITHM, CPU) as learner:
        assert learner.version == 3 and learner.notes == {"journal": 7}
        found = dict(learner.weights(is_whole=True))
    assert all(torch.equal(found[name], weight) for name, weight in over_ranks[0]["weights"].items())
