"""`openkeye distill` as a user meets it, over networks of two layers: runs stop and go on, wrong words get one line."""

import json

import pytest

from openkeye.apps.commands import main
from openkeye.model.weights import load_model
from tests.distill.toy_distillation import write_toys

RECIPE = '''
from pathlib import Path

from openkeye.distill.config import DistillRun
from tests.distill.toy_distillation import toy_run


def mine(folder: str, num_steps: int = 3) -> DistillRun:
    """Two toys teach a third."""
    place = Path(folder)
    folders = {name: str(place / name) for name in ("student", "maths", "code")}
    return toy_run(place, folders, num_steps=num_steps, rollouts_per_step=6)
'''


@pytest.fixture
def words(tmp_path):
    write_toys(tmp_path)
    (tmp_path / "mine.py").write_text(RECIPE)
    return ["distill", str(tmp_path / "mine.py"), f"folder={tmp_path}", "--lines-every", "0.001"]


def test_a_recipe_runs_and_is_told_of(words, tmp_path, capsys):
    assert main([*words, "distill.estimator.name=full", "distill.scaling.most_domain=2", "tasks.maths=3"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "out")
    assert "step 3 of 3" in said.err and "nats from its teachers" in said.err
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2, 3]
    assert {"overlap_ratio", "kl/maths", "teachers/num_loads", "loss/ref_kl", "step_seconds"} <= log[0].keys()
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["distill"]["estimator"]["name"] == "full"
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    assert (tmp_path / "run" / "curves.png").stat().st_size > 20_000
    assert load_model(tmp_path / "out").config == load_model(tmp_path / "student").config
    # Another run is not mixed into the same folder.
    assert main([*words, "seed=5"]) == 2
    told = capsys.readouterr().err
    assert "seed was 0 and is 5" in told and "distill.estimator.name was 'full' and is 'overlap_kl'" in told


def test_a_run_out_of_time_says_so(words, tmp_path, capsys):
    assert main([*words, "num_steps=500", "--stop-after-seconds", "0.3"]) == 3
    said = capsys.readouterr()
    assert said.out == "" and "out of time: step" in said.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["distill.estimator.name=reverse"], "overlap_kl"),
        (["distill.estimater.name=full"], "did you mean estimator?"),
        (["distill.routes.text/code=coder"], "route text/code: teacher 'coder' is unknown; did you mean code?"),
        (["distill.teachers.maths=nowhere"], "nowhere: no such model folder"),
        (["distill.scaling.categories.formats=1"], "did you mean format?"),
        (["opens=tests.distill.toy_distillation:nobody"], "opens=tests.distill.toy_distillation:nobody"),
        (["opens=nobody"], "MODULE:FUNCTION"),
        (["rollouts_per_step=0"], "rollouts_per_step is 0"),
        (["tasks.physics=1"], "task 'physics' is unknown"),
    ],
)
def test_wrong_words_get_one_line(words, capsys, changes, message):
    assert main([*words, *changes]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_settings_are_printed(words, capsys):
    assert main([*words, "--settings", "distill.repetition.penalty=0.25"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert {"distill.repetition.penalty=0.25", "distill.estimator.name=overlap_kl", "distill.routes.text/maths=maths"} <= set(
        printed
    )
