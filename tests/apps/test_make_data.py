"""`openkeye make-data` as a person runs it: both kinds of captioners, resuming, Ctrl-C, kill -9, damaged files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from openkeye.apps import make_data
from openkeye.apps.commands import main
from openkeye.data.makers.clue_choice import read_choice
from openkeye.data.makers.ocr_perturbations import PERTURBATIONS
from openkeye.data.makers.ocr_templates import TEMPLATES
from openkeye.data.makers.temporal_grounding import FORMS
from openkeye.inputs.messages import split_messages
from tests.apps.server_process import DEMO, MODEL, ROOT, ServerProcess, serving
from tests.data.makers.media import film_clip, write_background, write_cutouts

KEY = "sk-makers"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two FrameForge clips."""
    folder = tmp_path_factory.mktemp("videos")
    film_clip(folder / "a.mp4", 0, 8.0)
    film_clip(folder / "b.mp4", 1, 6.0)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"{KEY}\n")
    with serving("--api-key-file", keys) as running:
        yield running


def make(*options: object) -> int:
    return main(["make-data", *map(str, options)])


def lines(out: Path) -> list[dict]:
    """The samples, each of which the chat format takes and whose media are there."""
    records = [json.loads(line) for line in (out / "data.jsonl").read_text().splitlines()]
    for record in records:
        _, media = split_messages(record["messages"])
        assert media and all((out / part.content).is_file() for part in media)
        assert record["messages"][-1]["role"] == "assistant" and record["messages"][-1]["content"].strip()
    return records


def test_the_bundled_model_captions_segments(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = (
        "interleaved-segments",
        "--videos",
        videos,
        "--captioner",
        MODEL,
        "--segment-seconds",
        "4",
        "--out",
        tmp_path / "o",
    )
    assert make(*options, "--device", "cpu") == 0
    out, error = capsys.readouterr()
    assert out.strip() == str(tmp_path / "o" / "data.jsonl") and "2 samples made; 2 in all" in error
    assert [record["id"] for record in lines(tmp_path / "o")] == ["a.mp4/0", "b.mp4/0"]
    before = (tmp_path / "o" / "data.jsonl").read_bytes()
    assert make(*options) == 0
    assert "0 samples made; 2 in all; 2 of 2 jobs were done before" in capsys.readouterr().err
    assert (tmp_path / "o" / "data.jsonl").read_bytes() == before
    assert make(*options, "--seed", "1") == 2
    assert "seed 0 (now 1)" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_loaded_is_not_the_fault_of_a_video(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(ROOT / "openkeye" / "checkpoints" / MODEL, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    options = (
        "caption",
        "--videos",
        videos,
        "--captioner",
        tmp_path / "model",
        "--max-bad-share",
        "1",
        "--out",
        tmp_path / "o",
    )
    assert make(*options) == 2
    error = capsys.readouterr().err
    assert "skipped" not in error and "0 samples are kept" in error and len(error.strip().splitlines()) == 1


def test_a_caption_that_was_cut_is_skipped(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ("caption", "--videos", videos, "--captioner", MODEL, "--out", tmp_path / "o", "--max-bad-share", "1")
    assert make(*options, "--captioner-max-tokens", "1") == 0
    assert "skipped a.mp4: openkeye-tiny: cut after 1 tokens; raise --captioner-max-tokens" in capsys.readouterr().err
    assert (tmp_path / "o" / "data.jsonl").read_text() == ""


def test_the_bundled_model_captions_scenes(videos: Path, tmp_path: Path):
    assert make("scene-captions", "--videos", videos, "--captioner", MODEL, "--out", tmp_path, "--copy-media") == 0
    for record in lines(tmp_path):
        assert record["messages"][0]["content"][0]["video"].startswith("media/")
        assert "\nOverview: " in record["messages"][-1]["content"] and record["truth"]["scenes"]


def test_a_real_server_captions(server: ServerProcess, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_background(tmp_path / "pictures" / "wall.png")
    api = ("--captioner", f"{server.address}/v1", "--captioner-model", MODEL, "--workers", 2)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert make("caption", "--videos", videos, *api, "--captioner-fps", 2, "--out", tmp_path / "videos") == 0
    assert make("caption", "--pictures", tmp_path / "pictures", *api, "--out", tmp_path / "o") == 0
    assert len(lines(tmp_path / "videos")) == 2 and len(lines(tmp_path / "o")) == 1


def test_a_wrong_key_is_told_in_one_line(
    server: ServerProcess, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    api = ("--captioner", f"{server.address}/v1", "--captioner-model", MODEL)
    assert make("caption", "--videos", videos, *api, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert "OPENAI_API_KEY" in error and "0 samples are kept" in error and len(error.strip().splitlines()) == 1


def test_damaged_videos_are_named_and_skipped(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(videos, tmp_path / "videos")
    (tmp_path / "videos" / "c.mp4").write_bytes(DEMO.read_bytes()[:2000])
    options = ("interleaved-segments", "--videos", tmp_path / "videos", "--captioner", MODEL, "--out", tmp_path / "o")
    assert make(*options, "--max-bad-share", "0.2") == 2
    error = capsys.readouterr().err
    assert "1 of 3 jobs cannot be used" in error and "c.mp4" in error
    assert make(*options, "--max-bad-share", "0.4") == 0
    error = capsys.readouterr().err
    assert "skipped c.mp4" in error and "1 skipped" in error
    shutil.copy(DEMO, tmp_path / "videos" / "c.mp4")
    assert make(*options) == 0
    assert [record["id"] for record in lines(tmp_path / "o")] == ["a.mp4/0", "b.mp4/0", "c.mp4/0"]


def test_annotated_events_become_questions(videos: Path, tmp_path: Path):
    events = [[0.5, 2.0, "A dog barks."], [3.0, 4.0, "A cup falls."], [5.0, 5.9, "A door opens."]]
    records = [
        {
            "video": name,
            "duration": 6.0,
            "events": [{"start": a, "end": b, "text": f"{name[0]}: {text}"} for a, b, text in events],
        }
        for name in ("a.mp4", "b.mp4")
    ]
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, records)))
    options = ("--videos", videos, "--annotations", tmp_path / "events.jsonl")
    assert make("temporal-grounding", *options, "--forms", "highlight,summary", "--out", tmp_path / "grounding") == 0
    assert {record["task"] for record in lines(tmp_path / "grounding")} == {"highlight", "summary"}
    assert make("clue-choice", *options, "--options", "3", "--out", tmp_path / "choice") == 0
    made = lines(tmp_path / "choice")
    assert len(made) == 4 and all(read_choice(record["messages"][-1]["content"]) for record in made)


def test_pictures_are_pasted_and_rendered(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_background(tmp_path / "pictures" / "wall.png")
    write_cutouts(tmp_path / "cutouts")
    source = ("--pictures", tmp_path / "pictures", "--cutouts", tmp_path / "cutouts")
    assert make("instance-pasting", *source, "--num", 3, "--objects", "2..4", "--out", tmp_path / "paste") == 0
    assert {record["task"] for record in lines(tmp_path / "paste")} == {"counting", "grounding"}
    # More of them later: the first stay as they are.
    (tmp_path / "texts.txt").write_text("salt and pepper\n")
    options = (
        "rendered-ocr",
        "--templates",
        "sign",
        "--perturb",
        "blur",
        "--texts",
        tmp_path / "texts.txt",
        "--out",
        tmp_path / "ocr",
    )
    assert make(*options, "--num", 2) == 0
    before = lines(tmp_path / "ocr")
    assert make(*options, "--num", 5) == 0
    after = lines(tmp_path / "ocr")
    assert after[:2] == before and len(after) == 5
    assert {record["truth"]["text"].replace("\n", " ") for record in after} == {"salt and pepper"}
    assert make(*options, "--num", 0) == 2
    assert make("rendered-ocr", "--perturb", "none", "--num", 1, "--out", tmp_path / "clean") == 0
    assert "rain" not in capsys.readouterr().err


def test_workers_change_nothing(tmp_path: Path):
    options = ("rendered-ocr", "--num", 8, "--templates", "sign,chart", "--seed", 5)
    for workers in (1, 4):
        assert make(*options, "--workers", workers, "--out", tmp_path / str(workers)) == 0
    files = [path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*") if path.is_file()]
    assert len(files) == 10
    assert all((tmp_path / "1" / name).read_bytes() == (tmp_path / "4" / name).read_bytes() for name in files)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, number: int):
    command = [
        sys.executable,
        "-m",
        "openkeye.apps.commands",
        "make-data",
        "rendered-ocr",
        "--seed",
        "3",
        "--perturb-share",
        "1",
    ]
    whole = subprocess.run(
        [*command, "--num", "16", "--out", str(tmp_path / "whole")], cwd=ROOT, check=True, capture_output=True
    )
    assert whole.returncode == 0
    out = tmp_path / "cut"
    process = subprocess.Popen(
        [*command, "--num", "3000", "--out", str(out)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that a shell put into the background ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    journal = out / "journal.jsonl"
    end = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 4:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, number)
    _, error = process.communicate(timeout=30)
    if number == signal.SIGINT:
        assert process.returncode == 130 and "samples are kept; run the same command to go on" in error
        assert "Traceback" not in error
    num_done = len(journal.read_text().splitlines()) - 1
    assert 3 <= num_done < 16
    subprocess.run([*command, "--num", "16", "--out", str(out)], cwd=ROOT, check=True, capture_output=True)
    assert (out / "data.jsonl").read_bytes() == (tmp_path / "whole" / "data.jsonl").read_bytes()
    names = sorted(path.name for path in (out / "pictures").iterdir() if path.suffix == ".png")
    for name in (name for name in names if int(name[:6]) < 16):
        assert (out / "pictures" / name).read_bytes() == (tmp_path / "whole" / "pictures" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("caption", "--videos", "none", "--captioner", "nobody"), "nobody: no such model folder"),
        (("caption", "--videos", "none", "--captioner", "https://host/v1"), "--captioner-model"),
        (("caption", "--videos", "none", "--captioner", MODEL), "none: no such folder"),
        (("instance-pasting", "--pictures", "p", "--cutouts", "c", "--objects", "many"), "--objects is 'many'"),
        (("rendered-ocr", "--seed", "-1"), "--seed is -1"),
        (("rendered-ocr", "--perturb", "rain"), "'rain' is unknown"),
        (("temporal-grounding", "--videos", "v", "--annotations", "none.jsonl"), "none.jsonl: cannot be read"),
    ],
)
def test_options_that_make_no_sense_are_one_line(
    options: tuple[str, ...], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert make(*options, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert reason in error and len(error.strip().splitlines()) == 1


def test_help_names_every_recipe_and_its_options(capsys: pytest.CaptureFixture[str]):
    for words, expected in ((("--help",), "rendered-ocr"), (("caption", "--help"), "OPENAI_API_KEY")):
        with pytest.raises(SystemExit):
            make(*words)
        assert expected in capsys.readouterr().out


def test_help_names_what_the_recipes_know():
    # Written down a second time, so that the help needs no recipe's imports.
    assert ",".join(FORMS) == make_data.FORMS
    assert ",".join(TEMPLATES) == make_data.TEMPLATES
    assert ",".join(PERTURBATIONS) == make_data.PERTURBATIONS
