"""`openkeye rl` as a user meets it, with stand-in roles: runs stop and go on, wrong words get one line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from openkeye.apps.commands import main
from openkeye.apps.curves import draw_curves
from tests.rl.stand_ins import config_of, result_of, run_here

ROOT = Path(__file__).parents[2]
RECIPE = '''
from pathlib import Path

from openkeye.rl.run_config import PostTrainingConfig
from tests.rl.stand_ins import config_of


def mine(folder: str, num_steps: int = 3) -> PostTrainingConfig:
    """Stand-ins."""
    return config_of(Path(folder), num_steps=num_steps)
'''


@pytest.fixture
def words(tmp_path):
    (tmp_path / "mine.py").write_text(RECIPE)
    return ["rl", str(tmp_path / "mine.py"), f"folder={tmp_path}", "--lines-every", "0.001"]


def test_a_recipe_runs_and_is_told_of(words, tmp_path, capsys):
    assert main([*words, "max_age=1", "tasks.words.weight=3"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "out")
    assert "step 3 of 3  post-training  loss 0.5  outcome 0." in said.err and "11 tokens a rollout" in said.err
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["max_age"] == 1 and settings["tasks"]["words"]["weight"] == 3
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    assert (tmp_path / "run" / "curves.png").stat().st_size > 20_000
    # Once finished, the same command only says so again.
    assert main([*words, "max_age=1", "tasks.words.weight=3"]) == 0
    assert "step 1 of" not in capsys.readouterr().err


def test_a_run_out_of_time_goes_on_with_the_same_command(words, tmp_path, capsys):
    assert main([*words, "--stop-after-seconds", "0.2"]) == 3
    said = capsys.readouterr()
    assert said.out == "" and "out of time: step" in said.err and not (tmp_path / "out").exists()
    assert main(words) == 0
    assert "going on from step" in capsys.readouterr().err
    unbroken = config_of(tmp_path / "unbroken", num_steps=3)
    run_here(unbroken)
    assert result_of(config_of(tmp_path)) == result_of(unbroken)


def test_ctrl_c_saves(words, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "openkeye.apps.commands", *words, "num_steps=500"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        # A test runner in the background may have been told to ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("step 3 of 500"):
            os.kill(process.pid, signal.SIGINT)
            break
    lines += process.stderr.readlines()
    assert process.wait(60) == 130 and process.stdout.read() == ""
    told = "".join(lines)
    assert "interrupted: step" in told and "Traceback" not in told
    saved = json.loads((tmp_path / "run" / "learner.json").read_text())
    assert saved["version"] >= 3 and f"step {saved['version']} is saved" in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["max_age=-1"], "max_age is -1; give at least 0"),
        (["takes=first"], "takes is 'first'; choose one of finished, opened"),
        (["group_sise=3"], "did you mean group_size?"),
        (["opens=tests.rl.stand_ins:nobody"], "opens=tests.rl.stand_ins:nobody"),
        (["opens=nobody:at_all"], "No module named 'nobody'"),
        (["tasks.sums.weight=0", "tasks.words.weight=0"], "nothing with a weight above 0"),
        (["evaluate_every=2"], "evaluation_tasks is empty"),
        (["oversampling=0.5"], "give a number from 1 on"),
        (["tasks.pictures.reader=pictures"], "names pictures, but the tasks are"),
    ],
)
def test_wrong_words_get_one_line(words, capsys, changes, message):
    assert main([*words, *changes]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_settings_are_printed_and_recipes_of_the_other_kind_refused(words, capsys):
    assert main([*words, "--settings", "seed=4", "learner.rate=1e-5"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert {"seed=4", "learner.rate=1e-05", "tasks.sums.weight=2.0", "takes=opened"} <= set(printed)
    with pytest.raises(SystemExit):
        main(["rl", "--list"])
    assert "finetune" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "--list"])
    assert "finetune" in capsys.readouterr().out
    assert main(["train", words[1], words[2]]) == 2
    assert "return an openkeye.train.config.RunConfig" in capsys.readouterr().err


def test_curves_show_rollouts(tmp_path):
    run_here(config_of(tmp_path, num_steps=2))
    from openkeye.apps.curves import _panels, read_log

    records = read_log(tmp_path / "run")
    shown = {title for title, lines, _ in _panels(records) if lines}
    assert {"reward of rollouts", "outcome by task", "entropy (nats)", "groups and rollouts", "seconds by phase"} <= shown
    assert draw_curves(tmp_path / "run").is_file()


def test_curves_of_many_tasks_name_as_many_as_there_is_room_for(tmp_path):
    record = {"step": 1, "stage": "post-training"} | {f"outcome/task {number}": number / 20 for number in range(14)}
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record | {"step": step}) + "\n" for step in (1, 2)))
    assert draw_curves(tmp_path).stat().st_size > 5_000


def test_a_start_that_was_refused_leaves_its_folder_to_other_settings(tmp_path, capsys):
    words = ["rl", "reinforce", "task=arithmetic", f"out_dir={tmp_path}/model", f"run_dir={tmp_path}/run", "num_steps=1"]
    assert main([*words, f"model_dir={tmp_path}/nowhere"]) == 2
    assert main([*words, f"model_dir={tmp_path}/elsewhere"]) == 2
    # The second is refused for its own fault, not for the settings of the first.
    assert "elsewhere: no such model folder" in capsys.readouterr().err
