"""The recipe of openkeye-tiny on a CPU: every stage runs, stops, resumes and leaves a checkpoint that loads."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openkeye.common.checks import InputError
from openkeye.model.weights import load_model
from recipes.tiny import FrameCounts, run, smoke, tiny, with_stage_steps

ROOT = Path(__file__).parents[2]


def one_step_each():
    return with_stage_steps(smoke(), [1, 1, 1, 1, 1])


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    torch.manual_seed(0)
    config = one_step_each()
    assert run(config, tmp_path / "whole", tmp_path / "whole_out", float("inf"))
    # Time is up after the first step of every piece: five pieces make a run.
    pieces = [run(config, tmp_path / "cut", tmp_path / "cut_out", 0.001) for _ in config.stages]
    assert pieces == [False, False, False, False, True]
    whole, cut = (load_model(tmp_path / name, "cpu").state_dict() for name in ("whole_out", "cut_out"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_every_figure_of_the_log_is_a_number(tmp_path):
    run(with_stage_steps(smoke(), [1, 0, 0, 1, 1]), tmp_path / "run", tmp_path / "out", float("inf"))
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["stage"] for record in records] == ["short clips", "indexer warm-up", "sparse adaptation"]
    assert all(value == value for record in records for value in record.values())
    assert {"answer_loss", "cell_loss", "sight_loss", "hint_0", "exact/counting"} <= set(records[0])
    assert {"indexer_loss", "indexer_recall"} <= set(records[1]) and "answer_loss" not in records[1]


def test_only_the_indexer_learns_in_its_warm_up(tmp_path):
    config = with_stage_steps(smoke(), [0, 0, 0, 2, 0])
    run(config, tmp_path / "none", tmp_path / "before", 0.0)
    run(config, tmp_path / "run", tmp_path / "after", float("inf"))
    before, after = (load_model(tmp_path / name, "cpu").state_dict() for name in ("before", "after"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("sa_indexer" in name for name in changed)


def test_stage_lengths_are_applied_and_their_number_is_checked():
    assert [stage.num_steps for stage in with_stage_steps(tiny(), [5, 0, 7, 0, 9]).stages] == [5, 7, 9]
    with pytest.raises(InputError, match="one for each of: short clips"):
        with_stage_steps(tiny(), [1, 2])


def test_clip_lengths_follow_the_stage_and_the_seed():
    counts = FrameCounts(replace(tiny(), seed=3))
    drawn = [counts(step) for step in range(0, tiny().num_steps, 97)]
    assert drawn == [counts(step) for step in range(0, tiny().num_steps, 97)]
    for step, count in zip(range(0, tiny().num_steps, 97), drawn, strict=True):
        assert count in tiny().stage_at(step)[0].frame_counts


def test_the_command_line_reaches_every_option(tmp_path):
    command = [sys.executable, "-m", "recipes.tiny", "--smoke", "--num-workers", "0", "--stage-steps", "1", "0", "0", "0", "0"]
    paths = ["--run-dir", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--seed", "2"]
    weights = ["--start-from", str(ROOT / "openkeye/checkpoints/openkeye-tiny/model.safetensors")]
    result = subprocess.run([*command, *paths, *weights], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stdout.endswith("finished\n"), result.stderr
    assert "step 0 of 1," in result.stdout and (tmp_path / "out" / "model.safetensors").is_file()
