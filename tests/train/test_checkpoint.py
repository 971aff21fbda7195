"""A run that is stopped, killed or moved to other ranks goes on as if nothing had been: bit for bit on the same ranks."""

import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from openkeye.common.checks import InputError
from openkeye.model.weights import load_model
from openkeye.train.checkpoint import Checkpoints, Place
from openkeye.train.config import RunConfig
from openkeye.train.shard import joined
from tests.rank_processes import started
from tests.train.toy_runs import (
    ADAPTATION,
    WARM_UP,
    Job,
    command_of,
    log_of,
    run_here,
    run_jobs,
    toy_run,
    toy_stage,
    write_toy_model,
)

STAGES = (
    toy_stage("answers", num_steps=3, trains=("decoder",), balance_weight=0.1),
    toy_stage("warm-up", num_steps=2, **WARM_UP),
    toy_stage("adaptation", num_steps=3, **ADAPTATION),
)
EXACT = ("step", "stage", "loss", "answer_loss", "indexer_kl", "balance", "gradient_norm", "rate/decoder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def straight(folder: Path) -> RunConfig:
    config = named_run(folder, "straight")
    run_here(config)
    return config


def named_run(folder: Path, name: str, **changes: object) -> RunConfig:
    where = {
        "run_dir": str(folder / name),
        "out_dir": str(folder / f"{name}-out"),
        "optimizer": "muon",
        "indexer_optimizer": "muon",
    }
    return toy_run(folder, *STAGES, **{**where, **changes})


def exact_figures(config: RunConfig) -> list[dict]:
    return [{name: record.get(name) for name in EXACT} for record in log_of(config)]


def weights_of(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.out_dir) / "model.safetensors")


def assert_same_end(config: RunConfig, straight: RunConfig) -> None:
    own, expected = weights_of(config), weights_of(straight)
    assert own.keys() == expected.keys()
    assert [name for name in own if not torch.equal(own[name], expected[name])] == []


def test_a_run_that_stops_after_every_step_is_the_same_run(folder: Path, straight: RunConfig):
    # Also at the ends of stages, so that each boundary is crossed by a new start.
    config = named_run(folder, "pieces")
    lines = [run_here(config, stop_after_seconds=0).lines[-1] for _ in range(8)]
    assert lines[2].startswith("out of time: step 3 is saved") and lines[-1].startswith("finished")
    assert exact_figures(config) == exact_figures(straight)
    assert_same_end(config, straight)
    # Two are kept.
    assert sorted(path.name for path in (Path(config.run_dir) / "checkpoints").iterdir()) == ["latest", "step-7", "step-8"]


def test_the_finished_model_is_a_whole_checkpoint(straight: RunConfig):
    model = load_model(straight.out_dir)
    before = load_file(Path(straight.model_dir) / "model.safetensors")
    after = weights_of(straight)
    assert (Path(straight.out_dir) / "tokenizer.json").is_file()
    assert model.config.num_hidden_layers == 2
    # Everything has trained in some stage.
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    # A finished run that is started again only says so.
    assert run_here(straight).records == []


def test_killed_in_the_middle_of_saves(folder: Path, straight: RunConfig):
    config = named_run(folder, "killed", save_every_seconds=0.0)
    checkpoints = Path(config.run_dir) / "checkpoints"
    num_killed = 0
    for least in (2, 5):
        with started(1, *command_of(folder, Job(config))) as (process,):
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                steps = [int(path.stem.partition("-")[2]) for path in checkpoints.glob("step-*.unfinished")]
                if any(step >= least for step in steps):
                    process.send_signal(signal.SIGKILL)
                    num_killed += process.wait() == -signal.SIGKILL
                    break
        assert (checkpoints / "latest").is_file()
    assert num_killed == 2
    run_here(config)
    assert not list(checkpoints.glob("*.unfinished"))
    # Steps that were made twice are told once.
    assert exact_figures(config) == exact_figures(straight)
    assert_same_end(config, straight)


def test_ctrl_c_saves_and_says_so(folder: Path, straight: RunConfig):
    config = named_run(folder, "interrupted")
    with started(1, *command_of(folder, Job(config))) as (process,):
        log = Path(config.run_dir) / "log.jsonl"
        deadline = time.monotonic() + 60
        while not (log.is_file() and log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "interrupted: step" in output and "start the same run again" in output
    assert 1 <= len(log_of(config)) < 8
    run_here(config)
    assert exact_figures(config) == exact_figures(straight)
    assert_same_end(config, straight)


def test_from_two_ranks_to_four_to_one(folder: Path):
    # Slow steps: Adam's first ones would blow up the roundings in which numbers of ranks differ.
    changes = ({}, WARM_UP, ADAPTATION)
    stages = [toy_stage(f"stage {i}", num_steps=2, packs_per_step=4, rate=1e-5, **one) for i, one in enumerate(changes)]
    moved, unmoved = (
        toy_run(
            folder,
            *stages,
            run_dir=str(folder / name),
            out_dir=str(folder / f"{name}-out"),
            optimizer="muon",
            indexer_optimizer="muon",
        )
        for name in ("moved", "unmoved")
    )
    output = run_jobs(folder, Job(moved, 2, stop_after_seconds=0), Job(moved, 4, stop_after_seconds=0))
    assert "step 1 is saved" in output and "going on from step 1 of 6" in output and "step 2 is saved" in output
    run_here(moved)
    run_here(unmoved)
    for own, expected in zip(log_of(moved), log_of(unmoved), strict=True):
        for figure in ("loss", "gradient_norm"):
            assert own[figure] == pytest.approx(expected[figure], rel=1e-4), (own["step"], figure)
    expected_weights = weights_of(unmoved)
    for name, weight in weights_of(moved).items():
        assert torch.allclose(weight, expected_weights[name], atol=1e-6), name


def test_what_is_saved_is_what_was_there_when_saving_began(tmp_path: Path):
    with joined(torch.device("cpu"), 1) as ranks:
        checkpoints = Checkpoints(tmp_path, ranks)
        tensors = {"weights": torch.full((1 << 23,), 3.0), "count": torch.tensor(1.0)}
        checkpoints.save(Place(step=1, stage=1, step_in_stage=0), tensors)
        tensors["weights"].zero_()
        tensors["count"].zero_()
        checkpoints.wait()
        assert checkpoints.place() == Place(step=1, stage=1, step_in_stage=0)
        checkpoints.load(tensors, {"moments": torch.zeros(3)})
        assert float(tensors["weights"].min()) == 3.0 and float(tensors["count"]) == 1.0
        with pytest.raises(InputError, match="lacks other"):
            checkpoints.load({**tensors, "other": torch.zeros(1)}, {})
