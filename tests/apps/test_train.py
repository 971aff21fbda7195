"""`openkeye train` as a user meets it: a folder becomes a model, runs stop and go on, wrong words get one line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from openkeye.apps.commands import main
from openkeye.apps.recipe_files import open_recipe, settings_of
from openkeye.common.checks import InputError
from openkeye.frameforge.writer import film, make_clip
from openkeye.train.config import RunConfig

ROOT = Path(__file__).parents[2]
QUESTION, ANSWER = "What is the video about?", "Red dog."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five clips of 4 seconds, one question about each; the answer is none that the bundled model gives."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(5):
        clip = make_clip(5, number, seconds=(4.0, 4.0))
        film(clip, folder / f"clip{number}.mp4")
    lines = [{"video": f"clip{number}.mp4", "question": QUESTION, "answer": ANSWER} for number in range(5)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def command(folder, out_dir, *words):
    """Arguments of a small fine-tune in this process."""
    fixed = [f"data={folder}", f"out_dir={out_dir}", "num_workers=0", "log_every=5", "--lines-every", "0.001"]
    return ["train", "finetune", *fixed, *words]


def test_a_folder_becomes_a_model_that_answers_as_it_was_taught(folder, tmp_path, capsys):
    out_dir = tmp_path / "mine"
    held_out = json.loads((folder / "questions.jsonl").read_text().splitlines()[0])["video"]
    assert main(command(folder, out_dir, "min_steps=35", "num_epochs=1", "rate=4e-3")) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(out_dir)
    assert "held out, before: 0% of 1 answers exact" in said.err and "held out, after:  100% of 1 answers exact" in said.err
    assert "step 35 of 35  finetune  loss" in said.err and " left\n" in said.err
    before, after = (json.loads((tmp_path / "mine-run" / f"{name}.json").read_text()) for name in ("before", "after"))
    assert after["loss"] < 0.2 < 3 < before["loss"]
    assert (tmp_path / "mine-run" / "curves.png").stat().st_size > 20_000
    assert list((tmp_path / "mine-run" / "tensorboard").glob("events.out.tfevents.*"))
    # The finished model is a checkpoint like any other.
    assert main(["ask", str(folder / held_out), QUESTION, "--model", str(out_dir)]) == 0
    assert capsys.readouterr().out.strip() == ANSWER
    assert main(["ask", str(folder / held_out), QUESTION]) == 0
    assert capsys.readouterr().out.strip() != ANSWER
    # Once finished, the same command only says so again.
    assert main(command(folder, out_dir, "min_steps=35", "num_epochs=1", "rate=4e-3")) == 0
    assert "step 5 of" not in capsys.readouterr().err


def test_a_run_out_of_time_goes_on_with_the_same_command(folder, tmp_path, capsys):
    words = command(folder, tmp_path / "mine", "min_steps=3", "num_epochs=0", "held_out_share=0", "log_every=1")
    assert main([*words, "--stop-after-seconds", "0.001"]) == 3
    said = capsys.readouterr()
    assert said.out == "" and "step 1 is saved" in said.err and not (tmp_path / "mine").exists()
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "going on from step 1 of 3" in said and "step 1 of 3  finetune" not in said and "step 3 of 3  finetune" in said


def test_ctrl_c_saves(folder, tmp_path):
    words = command(folder, tmp_path / "mine", "min_steps=500", "held_out_share=0", "log_every=1")
    process = subprocess.Popen(
        [sys.executable, "-m", "openkeye.apps.commands", *words],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A test runner in the background may have been told to ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("step 2 of 500"):
            os.kill(process.pid, signal.SIGINT)
            break
    lines += process.stderr.readlines()
    assert process.wait(60) == 130 and process.stdout.read() == ""
    assert "is saved in" in "".join(lines) and "Traceback" not in "".join(lines)
    assert (tmp_path / "mine-run" / "checkpoints").is_dir() and not (tmp_path / "mine").exists()


def test_every_stage_runs_on_a_cpu(folder, tmp_path, capsys):
    words = [
        "train",
        "smoke",
        f"data={folder}",
        f"out_dir={tmp_path / 'small'}",
        "num_steps=1",
        "context=512",
        "has_tensorboard=no",
    ]
    assert main(words) == 0
    records = [json.loads(line) for line in (tmp_path / "small-run" / "log.jsonl").read_text().splitlines()]
    names = ["stage-0", "stage-1", "stage-2", "stage-3", "warm-up", "adaptation", "sft"]
    assert [record["stage"] for record in records] == names and [record["step"] for record in records] == list(range(1, 8))
    assert set(records[4]) >= {"indexer_kl", "indexer_recall", "rate/indexer"} and "answer_loss" in records[5]
    assert not (tmp_path / "small-run" / "tensorboard").exists()
    assert main(["info", str(tmp_path / "small")]) == 0


def test_settings_are_printed_and_read_back(folder, capsys):
    words = command(folder, "unused")[2:-2]
    assert main(["train", "finetune", *words, "stages.finetune.rate=3e-4", "--settings", "seed=4"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "stages.finetune.rate=0.0003" in printed and "seed=4" in printed and "stages.finetune.attention=sparse" in printed
    assert not Path("unused").exists()


def test_list_names_every_packaged_recipe(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 0
    names = [line.split()[0] for line in lines]
    assert names == ["adapt_text", "finetune", "smoke", "stages", "stages:warm_up", "stages:adaptation", "stages:sft"]
    assert all(len(line.split()) > 5 for line in lines)


RECIPE = """
from collections.abc import Mapping
from openkeye.data.config import Share, SourceConfig
from openkeye.train.config import RunConfig, StageConfig

def first(size: int, seed: int = 1, data: Mapping[str, tuple[str, ...]] | None = None, is_big: bool = False) -> RunConfig:
    stage = StageConfig(f"s{size}", size, 512, (Share("x"),))
    return RunConfig("openkeye-tiny", "r", "o", {"x": SourceConfig("folder", str(data))}, (stage,), seed=seed * 10 + is_big)

def second() -> RunConfig:
    return first(2)

def wrong():
    return 3
"""


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "my_run.py"
    path.write_text(RECIPE)
    config = settings_of(
        open_recipe(f"{path}:first"), ["size=7", "seed=2", "is_big=yes", "stages.s7.context=99", "clip=2"], RunConfig
    )
    assert config.stages[0].num_steps == 7 and config.seed == 21 and config.stages[0].context == 99 and config.clip == 2.0
    assert open_recipe(f"{path}:second")().stages[0].num_steps == 2
    path.write_text(RECIPE + "\n\ndef my_run(size: int = 4) -> RunConfig:\n    return first(size)\n")
    assert settings_of(open_recipe(str(path)), [], RunConfig).stages[0].num_steps == 4
    with pytest.raises(InputError, match="returned a int; return an openkeye"):
        settings_of(open_recipe(f"{path}:wrong"), [], RunConfig)


def test_arguments_that_are_mappings(tmp_path):
    path = tmp_path / "mapped.py"
    path.write_text(RECIPE.replace(" | None = None", "").replace("seed: int = 1, data", "data").replace("seed * 10", "5 "))
    config = settings_of(open_recipe(f"{path}:first"), ["size=1", "data.a=x,y", "data.b=z"], RunConfig)
    assert config.sources["x"].path == str({"a": ("x", "y"), "b": ("z",)})
    with pytest.raises(InputError, match=r"needs data; give data\.NAME=VALUE"):
        settings_of(open_recipe(f"{path}:first"), ["size=1"], RunConfig)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["finetun"], "recipe 'finetun' is unknown; did you mean finetune?"),
        (["finetune"], "recipe finetune needs data; give data=VALUE (arguments: data, model_dir"),
        (["finetune", "dat=x"], "argument or field 'dat' is unknown; did you mean data?"),
        (["finetune", "data"], "'data': expected name=value"),
        (["finetune", "data=nowhere"], "nowhere: no such folder"),
        (["finetune", "data=docs"], "no questions were found among"),
        (["finetune", "data=CLIPS", "num_epochs=many"], "num_epochs=many: expected a number"),
        (["finetune", "data=CLIPS", "trains=wheels"], "trains names wheels"),
        (["finetune", "data=CLIPS", "stages.0.context=99999"], "99999 exceeds the model's 32768 positions"),
        (["finetune", "data=CLIPS", "--stop-after-seconds", "0"], "--stop-after-seconds is 0"),
        (["stages:warm", "seed=1"], "function 'warm' is unknown; did you mean warm_up?"),
        (["nowhere.py"], "nowhere.py: no such file"),
    ],
)
def test_wrong_words_get_one_line(words, said, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = [word.replace("CLIPS", str(folder)) for word in words]
    if words[0] == "finetune" and "data=" in " ".join(words):
        words += [f"out_dir={tmp_path / 'out'}"]
    assert main(["train", *words]) == 2
    printed = capsys.readouterr()
    assert (
        printed.out == ""
        and printed.err.count("\n") == 1
        and printed.err.startswith("openkeye train: ")
        and said in printed.err
    )


def test_a_broken_file_is_told_with_its_line(tmp_path, capsys):
    (tmp_path / "bad.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "worse.py").write_text("import no_such_package_of_mine\n")
    assert main(["train", str(tmp_path / "bad.py")]) == 2 and main(["train", str(tmp_path / "worse.py")]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "bad.py:2: " in told[0] and "No module named 'no_such_package_of_mine'" in told[1]


def test_unknown_options_are_still_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "finetune", "--fast", "data=x"])
    assert stopped.value.code == 2 and "unrecognized arguments: --fast" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["info", "openkeye-tiny", "more"])


def test_two_ranks_speak_once(folder, tmp_path):
    words = command(folder, tmp_path / "mine", "min_steps=2", "num_epochs=0", "log_every=1")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launch, "-m", "openkeye.apps.commands", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(tmp_path / "mine") and result.stderr.count("step 2 of 2") == 1
    assert "held-out answers are scored by one process alone" in result.stderr
