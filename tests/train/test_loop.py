"""The loop on its own: what is logged, when a stage ends, what is said, what trains."""

import math
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from openkeye.model.weights import PACKING_TABLE
from openkeye.train.groups import part_of
from tests.rank_processes import started
from tests.train.toy_runs import (
    ADAPTATION,
    TOY,
    WARM_UP,
    Job,
    command_of,
    log_of,
    run_here,
    toy_run,
    toy_stage,
    write_toy_model,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("loop"))


def named_run(folder: Path, name: str, *stages, **changes):
    return toy_run(folder, *stages, run_dir=str(folder / name), out_dir=str(folder / f"{name}-out"), **changes)


def moved_parts(config) -> set[str]:
    before, after = (load_file(Path(one) / "model.safetensors") for one in (config.model_dir, config.out_dir))
    return {part_of(name) for name in before if not torch.equal(before[name], after[name])}


def test_it_learns_and_tells(folder: Path):
    config = named_run(folder, "learns", toy_stage(num_steps=24, rate=1e-2), log_every=6)
    reporter = run_here(config)
    assert reporter.stages == [("first", 24)] and reporter.lines == [f"finished: {config.out_dir} holds the model"]
    assert [record["step"] for record in reporter.records] == [6, 12, 18, 24]
    # The documents count upwards: what a network of two layers finds out in a few steps.
    losses = [record["loss"] for record in reporter.records]
    assert losses[-1] < losses[0] - 0.5, losses
    last = reporter.records[-1]
    assert last["stage"] == "first" and last["seconds_left"] == 0 and last["num_skipped"] == 0
    assert last["rate/decoder"] == pytest.approx(1e-3) and last["tokens_per_second"] > 0 and last["memory_bytes"] > 1 << 20
    assert last["loader/num_read"] > 24 and 0 < last["loader/fill_share"] <= 1
    assert "peak_share" not in last
    # What went to the reporter is what went to the file, to six digits.
    for told, written in zip(reporter.records, log_of(config), strict=True):
        assert told.keys() == written.keys()
        assert written["loss"] == pytest.approx(told["loss"], rel=1e-5)
    # The tasks' losses are means over their own tokens.
    assert min(last["loss/seen"], last["loss/read"]) <= last["answer_loss"] <= max(last["loss/seen"], last["loss/read"])


@pytest.mark.parametrize("changes", [{"trains": ("projector",)}, {"trains": ("vision", "decoder")}, WARM_UP, ADAPTATION])
def test_only_what_trains_moves(folder: Path, changes: dict):
    config = named_run(folder, "-".join(changes.get("trains")), toy_stage(num_steps=2, **changes))
    run_here(config)
    assert moved_parts(config) == set(changes["trains"])


def test_a_warm_up_ends_when_its_recall_is_reached(folder: Path):
    warm_up = toy_stage("warm-up", num_steps=9, stop_at_recall=0.01, **WARM_UP)
    config = named_run(folder, "recall", warm_up, toy_stage("adaptation", num_steps=2, **ADAPTATION))
    records = run_here(config).records
    # Recall is measured at the first step already.
    assert [(record["step"], record["stage"]) for record in records] == [(1, "warm-up"), (2, "adaptation"), (3, "adaptation")]
    unreachable = named_run(folder, "unreachable", replace(warm_up, stop_at_recall=1.0, num_steps=2))
    assert [record["step"] for record in run_here(unreachable).records] == [1, 2]


def test_a_model_without_vision_or_a_stage_without_pictures(tmp_path: Path):
    from openkeye.data.config import Share

    write_toy_model(tmp_path, replace(TOY, vision=None, tie_word_embeddings=True))
    config = toy_run(tmp_path, toy_stage(num_steps=2, mixture=(Share("text"),), trains=("decoder",)))
    assert math.isfinite(run_here(config).records[-1]["loss"])


def test_bf16_computes_and_fp32_keeps(folder: Path):
    stages = (toy_stage("answers", num_steps=2), toy_stage("adaptation", num_steps=2, **ADAPTATION))
    wide, narrow = (
        run_here(named_run(folder, dtype, *stages, compute_dtype=dtype, recomputes=dtype == "bfloat16")).records
        for dtype in ("float32", "bfloat16")
    )
    for own, expected in zip(narrow, wide, strict=True):
        assert own["answer_loss"] == pytest.approx(expected["answer_loss"], rel=2e-2)
        assert own["answer_loss"] != expected["answer_loss"]


def test_recomputing_changes_nothing(folder: Path):
    stages = (
        toy_stage("answers", num_steps=2),
        toy_stage("warm-up", num_steps=1, **WARM_UP),
        toy_stage("adaptation", num_steps=2, **ADAPTATION),
    )
    plain, again = (
        run_here(named_run(folder, f"recomputes-{recomputes}", *stages, recomputes=recomputes)).records
        for recomputes in (False, True)
    )
    for own, expected in zip(again, plain, strict=True):
        assert {name: own.get(name) for name in ("loss", "indexer_kl", "balance", "gradient_norm", "indexer_recall")} == {
            name: expected.get(name) for name in ("loss", "indexer_kl", "balance", "gradient_norm", "indexer_recall")
        }


def test_a_fresh_part_is_drawn_and_what_nobody_uses_is_carried_along(tmp_path: Path):
    from safetensors.torch import save_file

    write_toy_model(tmp_path)
    path = tmp_path / "model" / "model.safetensors"
    table = torch.randn(5, 16)
    save_file({**load_file(path), PACKING_TABLE: table}, path)
    config = toy_run(tmp_path, toy_stage(num_steps=1, trains=("projector",)), fresh=("indexer",), seed=9)
    run_here(config)
    before, after = load_file(path), load_file(Path(config.out_dir) / "model.safetensors")
    assert torch.equal(after[PACKING_TABLE], table) and before.keys() == after.keys()
    name = "model.layers.1.self_attn.sa_indexer.q_proj.weight"
    assert not torch.equal(before[name], after[name])
    assert torch.equal(before["model.layers.1.self_attn.q_proj.weight"], after["model.layers.1.self_attn.q_proj.weight"])


def test_the_second_ctrl_c_ends_the_process_at_once(folder: Path):
    # A stage that would take hours, and a first signal that comes twice.
    config = named_run(folder, "second", toy_stage(num_steps=1_000_000))
    with started(1, *command_of(folder, Job(config))) as (process,):
        log = Path(config.run_dir) / "log.jsonl"
        deadline = time.monotonic() + 60
        while not (log.is_file() and log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        # Stopped, so that both are there before the loop comes to look.
        process.send_signal(signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    assert "is saved" not in output
