"""The command line as a user meets it: real processes, real files."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "openkeye" / "media" / "demo.mp4"
QUESTION = "When is the red circle visible?"


def openkeye(*arguments: str | Path, text: str | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "openkeye.apps.commands", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, check=False)


def test_ask_answers_the_bundled_clip_truly():
    result = openkeye("ask", DEMO, QUESTION)
    assert result.returncode == 0 and result.stdout == "From 5.7 to 8.3 seconds.\n" and result.stderr == ""


def test_ask_json_tells_everything():
    answer = json.loads(openkeye("ask", DEMO, QUESTION, "--json").stdout)
    ((first, last),) = answer["intervals_seconds"]
    # The circle is there from 5.30 to 8.43 seconds.
    assert abs(first - 5.30) < 0.3 and abs(last - 8.43) < 0.3
    assert set(answer["stage_seconds"]) == {"decode_video", "encode_vision", "prefill", "generate"}
    assert answer["num_frames"] == 29 and answer["num_prompt_tokens"] > 600 and answer["finish_reason"] == "stop"


def test_ask_tells_what_the_answer_rests_on():
    said, told = openkeye("ask", DEMO, QUESTION, "--evidence").stdout.splitlines()
    seconds = [float(found) for found in re.findall(r"([\d.]+) s \(\d\.\d%\)", told)]
    assert said == "From 5.7 to 8.3 seconds." and told.startswith("Most attention: ") and len(seconds) == 3
    assert all(5.3 < moment < 9.2 for moment in seconds)
    answer = json.loads(openkeye("ask", DEMO, QUESTION, "--evidence", "--json").stdout)
    assert len(answer["evidence"][0]["moments"]) == answer["num_frames"]


def test_chat_answers_line_by_line():
    result = openkeye("chat", DEMO, text=f"{QUESTION}\n\nWhat word can be read at 6.1 seconds?\n")
    assert result.returncode == 0 and result.stdout == "From 5.7 to 8.3 seconds.\nDog.\n"


def test_a_part_of_the_video_keeps_its_own_times():
    answer = json.loads(openkeye("ask", DEMO, QUESTION, "--start", "4", "--end", "7", "--json").stdout)
    assert all(4.0 <= first <= last <= 7.0 for first, last in answer["intervals_seconds"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ask", "nope.mp4", "x?"), "nope.mp4: no such file"),
        (("ask", "README.md", "x?"), "README.md: not a readable video"),
        (("ask", DEMO, " "), "the question is empty"),
        (("ask", DEMO, "x?", "--start", "99"), "outside the video"),
        (("ask", DEMO, "x?", "--model", "/"), "config.json"),
        (("ask", DEMO, "x?", "--temperature", "-1"), "temperature"),
        (("ask", DEMO, "x?", "--device", "toaster"), "toaster"),
        (("ask", DEMO, "x?", "--prefill-chunk", "0"), "EngineConfig.prefill_chunk_tokens is 0; give at least 1"),
        (("ask", DEMO, "x?", "--cache-tokens", "1000"), "cache_tokens 1000 must be a multiple of page_size 64"),
        (("ask", DEMO, "x?", "--dense-up-to", "-1"), "--dense-up-to is -1; give a number of tokens from 0 on"),
        (("evaluate", "frameforge", "--data", "docs"), "clips.jsonl"),
        (("frameforge", "make", "--out", "README.md"), "README.md is a file"),
        (("frameforge", "make", "--out", "unused", "--seconds", "nine"), "give a range"),
    ],
)
def test_wrong_input_gets_one_line(arguments, said):
    result = openkeye(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert said in result.stderr and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


def test_evaluate_prints_scores_with_intervals_and_baselines(tmp_path):
    made = openkeye("frameforge", "make", "--out", tmp_path, "--num", "2", "--seed", "4", "--workers", "1", "--seconds", "8..9")
    assert made.returncode == 0 and made.stdout.strip() == str(tmp_path / "clips.jsonl")
    command = ("evaluate", "frameforge", "--data", tmp_path, "--num", "2", "--attention", "both", "--json")
    report = json.loads(openkeye(*command).stdout)
    assert set(report["timestamp_localisation"]) >= {"mean_tiou", "interval", "trivial"}
    for task in ("counting", "before_after", "co_occurrence", "reading", "motion"):
        low, high = report[task]["interval"]
        assert 0 <= low <= report[task]["accuracy"] <= high <= 1 and 0 <= report[task]["trivial"] <= 1
    assert report["settings"]["num_clips"] == 2 and -1 <= report["sparse_minus_dense"] <= 1
    assert "95% interval" in openkeye("evaluate", "frameforge", "--data", tmp_path, "--num", "1").stdout


@pytest.mark.parametrize("name", ["ask", "chat", "frames", "budget", "info", "check", "evaluate", "frameforge"])
def test_every_command_explains_itself(name):
    result = openkeye(name, "--help")
    assert result.returncode == 0 and "usage: openkeye" in result.stdout


@pytest.mark.parametrize("example", ["ask_a_video.py", "several_questions.py"])
def test_examples_run(example):
    result = subprocess.run(
        [sys.executable, ROOT / "examples" / example], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and "From 5.7 to 8.3 seconds." in result.stdout, result.stderr
    assert len((ROOT / "examples" / example).read_text().splitlines()) < 50


@pytest.mark.parametrize("wait_seconds", [3.0, 6.0])
def test_ctrl_c_ends_filming_with_one_line(tmp_path, wait_seconds):
    command = [sys.executable, "-m", "openkeye.apps.commands", "frameforge", "make", "--num", "400", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A test runner in the background may have been told to ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    time.sleep(wait_seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == "interrupted\n"
    assert not list(tmp_path.glob("*.part"))
