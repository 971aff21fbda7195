"""`openkeye evaluate` on the hour tier and on needles, as a user meets it."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from openkeye.apps import evaluate_needle
from openkeye.apps.evaluate_needle import draw_frames, wilson_interval
from openkeye.apps.video_room import check_room, whole_video_limits
from openkeye.common.checks import InputError
from openkeye.engine.config import EngineConfig
from openkeye.engine.loop import Engine
from openkeye.frameforge.writer import needle_of
from openkeye.inputs.sampling import plan_video

ROOT = Path(__file__).parents[2]


def openkeye(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "openkeye.apps.commands", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("openkeye-tiny", "cpu")


def test_a_sparse_minute_is_made_and_scored(tmp_path):
    made = openkeye(
        "frameforge", "make", "--tier", "hour", "--seconds", "60..60", "--num", "1", "--workers", "1", "--out", tmp_path
    )
    assert made.returncode == 0, made.stderr
    # 40 of 120 frames: what the budget says.
    command = ("evaluate", "frameforge", "--tier", "hour", "--data", tmp_path, "--num", "1", "--json", "--total-tokens", "640")
    report = json.loads(openkeye(*command).stdout)
    settings = report["settings"]
    assert settings["tier"] == "hour" and settings["mean_frames"] == 40 and 880 < settings["mean_prompt_tokens"] < 960
    assert report["timestamp_localisation"]["num_questions"] == 4 and report["reading"]["num_questions"] >= 2


def test_an_hour_that_does_not_fit_is_told_before_it_is_filmed():
    result = openkeye("evaluate", "frameforge", "--tier", "hour", "--num", "1")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "7,200 frames of 60 minutes take 163,600 tokens" in result.stderr
    assert "holds 32,768 (max_position_embeddings in config.json)" in result.stderr


def test_the_room_is_counted_as_the_prompt_is(engine):
    limits = whole_video_limits(engine, 15.0, 2.0, None)
    needle = needle_of(0, 0, 0.25, 0.5)
    frames = draw_frames(needle, limits, "cpu")
    (answer,) = engine.ask_many(frames, [needle.questions[0].text])
    num_tokens = check_room(engine, 15.0, limits, 112, 2.0)
    assert 20 < answer.num_prompt_tokens - num_tokens < 60 and answer.num_frames == 30


def test_an_hour_takes_every_frame_where_there_is_room(engine):
    limits = whole_video_limits(engine, 3600.0, 2.0, None)
    assert plan_video(128, 128, 7200, 2.0, limits).num_frames == 7200
    assert plan_video(128, 128, 7200, 2.0, engine.processor.video_limits).num_frames == 640
    assert whole_video_limits(engine, 3600.0, 2.0, 8000).total_tokens == 8000


def test_a_cache_that_is_too_small_names_the_size_it_needs():
    engine = Engine("openkeye-tiny", "cpu", config=EngineConfig(cache_tokens=2048))
    limits = whole_video_limits(engine, 120.0, 2.0, None)
    with pytest.raises(InputError, match="holds 2,048: give --cache-tokens 5632 or more"):
        check_room(engine, 120.0, limits, 112, 2.0)


def test_frames_show_the_needle_at_its_time_only(engine):
    needle = needle_of(3, 1, 1.0, 0.5)
    frames = draw_frames(needle, whole_video_limits(engine, 60.0, 2.0, None), "cpu")
    assert frames.pixels.shape == (120, 112, 112, 3) and frames.duration_seconds == 60.0
    times = np.array(frames.times_seconds)
    first, last = needle.questions[0].intervals[0]
    is_shown = (times >= first) & (times < last)
    near = (times >= first - 2.4) & (times < last + 2.4)
    empty = frames.pixels[near & ~is_shown][0]
    differs = (frames.pixels[near] != empty).any(axis=(1, 2, 3))
    assert differs.tolist() == is_shown[near].tolist() and 5 < is_shown.sum() < 9


def test_needles_are_found_and_reported(capsys):
    parser = argparse.ArgumentParser()
    evaluate_needle.add_arguments(parser)
    options = ["--lengths", "0.3", "0.25", "--depths", "0.5", "--num", "1", "--attention", "both", "--device", "cpu", "--json"]
    assert evaluate_needle.run(parser.parse_args(options)) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(row["minutes"], row["depth"], row["num"]) for row in report["rows"]] == [
        (0.25, None, 1),
        (0.25, 0.5, 1),
        (0.3, None, 1),
        (0.3, 0.5, 1),
    ]
    for row in report["rows"]:
        assert abs(row["times_k"] * 192 - row["tokens"]) < 1 and row["tokens"] > 600
        for name in ("sparse_found", "sparse_read", "dense_found", "dense_read"):
            low, high = row[f"{name}_interval"]
            assert 0 <= low <= row[name] <= high <= 1
        # On clips of its training lengths the packaged model finds what is there.
        assert row["sparse_found"] == row["dense_found"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--lengths", "0.1"), "--lengths are [0.1]; give minutes from 0.25 to 60"),
        (("--depths", "1.5"), "--depths are [1.5]; give shares"),
        (("--num", "0"), "--num is 0; give at least 1"),
        (("--seed", "-1"), "--seed is -1"),
        (("--fps", "0.5"), "--fps is 0.5"),
        (("--lengths", "20"), "2,400 frames of 20 minutes take 53,200 tokens; the context of"),
    ],
)
def test_wrong_needles_are_refused(arguments, said):
    parser = argparse.ArgumentParser()
    evaluate_needle.add_arguments(parser)
    with pytest.raises(InputError, match=re.escape(said)):
        evaluate_needle.run(parser.parse_args([*arguments, "--device", "cpu"]))


def test_wilson_intervals():
    # Newcombe 1998, table I: 81 of 263, and 0 of 20.
    assert np.allclose(wilson_interval(81, 263), [0.2553, 0.3662], atol=1e-4)
    assert np.allclose(wilson_interval(0, 20), [0.0, 0.1611], atol=1e-4)


def test_a_budget_takes_fewer_frames_for_a_question_and_for_a_conversation(engine):
    demo = ROOT / "openkeye" / "media" / "demo.mp4"
    question = "When is the red circle visible?"
    assert engine.ask(demo, question, total_tokens=160).num_frames == 10
    assert engine.open(demo, total_tokens=160).ask(question).num_frames == 10
    answer = json.loads(openkeye("ask", demo, question, "--total-tokens", "160", "--json").stdout)
    assert answer["num_frames"] == 10
    result = openkeye("ask", demo, question, "--total-tokens", "-5")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "total_tokens" in result.stderr
