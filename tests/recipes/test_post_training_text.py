"""The recipes of post-training: two small steps of each, their scripts in pieces, and the table of their scores."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from openkeye.apps.commands import main
from openkeye.apps.curves import read_log
from openkeye.apps.recipe_files import open_recipe, settings_of
from openkeye.common.checks import InputError
from openkeye.rl.run_config import PostTrainingConfig
from openkeye.tasks.mistake_reports import holds_answer
from openkeye.tasks.registry import open_task
from openkeye.tasks.task import Response
from openkeye.train.config import RunConfig
from recipes.post_training.retries import retry_chats
from recipes.post_training.table import estimate, table

HERE = Path(__file__).parents[2] / "recipes" / "post_training"
FEW = ("group_size=2", "groups_per_step=1", "max_tokens=4", "num_steps=1", "evaluate_every=0")


def settings(recipe, *words, kind=PostTrainingConfig):
    return settings_of(open_recipe(str(HERE / recipe), kind), words, kind)


def test_sft_mixes_references_with_what_was_learnt_before():
    config = settings("text_sft.py", "data.a=a.jsonl", "data.b=b.jsonl", "old_weight=0.2", "num_steps=7", kind=RunConfig)
    weights = {share.source: share.weight for share in config.stages[0].mixture}
    assert weights == {"a": 0.5, "b": 0.5, "pictures": 0.1, "short": 0.1} and config.num_steps == 7
    assert config.stages[0].packs_per_step * config.stages[0].context == 32_768
    assert "short" not in settings("text_sft.py", "data.a=a", "old_weight=0", kind=RunConfig).sources
    weighted = settings("text_sft.py", "data.a=a", "data.b=b", "weights.b=0.25", "old_weight=0", kind=RunConfig)
    assert [share.weight for share in weighted.stages[0].mixture] == pytest.approx([0.8, 0.2])
    with pytest.raises(InputError, match="weights names c"):
        settings("text_sft.py", "data.a=a", "weights.c=1", kind=RunConfig)
    with pytest.raises(InputError, match="data is empty"):
        open_recipe(str(HERE / "text_sft.py"))({})


def test_retries_ask_with_a_report_that_does_not_hold_the_answer():
    task = open_task("arithmetic", {"seed": 5})
    chats = list(retry_chats(40, ["seed=5"]))
    questions = {task.read(number).facts["question"]: task.read(number) for number in range(40)}
    assert len(chats) > 20
    for chat in chats:
        asked, answered = chat["messages"]
        question, report = asked["content"].split("\n", 1)
        example = questions[question]
        assert "answer is wrong" in report and not holds_answer(report, example)
        assert asyncio.run(task.score(example, Response(answered["content"])))["context"] == 1.0


def test_arms_differ_in_what_they_learn_by():
    outcome, context = (settings("context_rl.py", f"reward={name}", "recovers=true") for name in ("outcome", "context"))
    assert outcome.recovery["reward"] == "outcome" and context.recovery["reward"] == "context"
    assert not settings("context_rl.py").recovery
    assert outcome.algorithm == {"reward_weights": "", "reward_weights.outcome": 1.0}
    with pytest.raises(InputError, match="reward is 'guess'"):
        settings("context_rl.py", "reward=guess")


def test_agents_are_asked_in_worlds_that_they_have_not_learnt_in():
    config = settings("agent_rl.py", "levels=1,3")
    assert {task.options["level"] for task in config.tasks.values()} == {1, 3}
    assert {task.options["split"] for task in config.tasks.values()} == {"train"}
    assert {task.options["split"] for task in config.evaluation_tasks.values()} == {"held_out"}


@pytest.mark.parametrize("recipe", ["context_rl", "agent_rl"])
def test_a_step_of_each_on_a_cpu(recipe, tmp_path):
    words = [f"run_dir={tmp_path}/run", f"out_dir={tmp_path}/model", *FEW]
    assert main(["rl", f"{HERE}/{recipe}.py:smoke", *words]) == 0
    (record,) = read_log(tmp_path / "run")
    assert record["mismatch/mean_abs"] < 1e-5 and (tmp_path / "model" / "config.json").is_file()
    # Nobody solved it, so every complete group was asked again.
    assert bool(record["groups/asked_again"]) == (recipe == "context_rl")


def test_scripts_are_whole_and_stop_where_their_time_is_up(tmp_path):
    for script in ("context_rl.sh", "agent_rl.sh", "pieces.sh"):
        assert subprocess.run(["bash", "-n", HERE / script], check=False).returncode == 0
    environment = os.environ | {
        "RUN": str(tmp_path),
        "PIECE": "0",
        "PYTHON": sys.executable,
        "NUM_REFERENCES": "3",
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
    }
    ended = subprocess.run(["bash", HERE / "context_rl.sh"], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 3, ended.stderr
    lines = (tmp_path / "arithmetic.jsonl").read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[0])["task"] == "arithmetic"


def test_runs_side_by_side_all_end_and_the_worst_status_counts(tmp_path):
    script = f"""source {HERE}/pieces.sh
    one() {{ sleep 0.$1; touch {tmp_path}/$1; if [ "$1" = 2 ]; then exit 3; fi; }}
    side_by_side one 3 2 1 4 5
    touch {tmp_path}/behind"""
    ended = subprocess.run(["bash", "-c", script], env=os.environ | {"JOBS": "2"}, check=False)
    assert ended.returncode == 3 and sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize(("least", "status"), [("0.2", 0), ("0.4", 1)])
def test_a_start_is_good_enough_by_the_mean_of_its_reports(tmp_path, least, status):
    for name, mean in (("a", 0.2), ("b", 0.4)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"rewards": {"outcome": {"mean": mean}}}))
    script = f"source {HERE}/pieces.sh; reaches {tmp_path} {least}"
    ended = subprocess.run(["bash", "-c", script], env=os.environ | {"PYTHON": sys.executable}, check=False)
    assert ended.returncode == status


def test_intervals_are_students(tmp_path):
    # s = 1, n = 3: t(0.975, 2) = 4.3027.
    three = estimate([1.0, 2.0, 3.0])
    assert three.mean == 2.0 and three.half_width == pytest.approx(4.30265 / 3**0.5, abs=1e-4)
    for name, mean in (("a-seed0", 0.5), ("a-seed1", 0.7), ("b-seed0", 0.1)):
        folder = tmp_path / name / "run"
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text("".join(f'{{"step": {n}, "seconds_per_step": 30}}\n' for n in (1, 2)))
        report = {"rewards": {"outcome": {"mean": mean, "interval": [0, 1]}, "process": {"mean": 0.0, "interval": [0, 0]}}}
        (tmp_path / name / "held_out.json").write_text(json.dumps(report))
    head, first, second = table(sorted(tmp_path.iterdir()), ["outcome"])
    assert head == ["run", "held_out/outcome", "minutes"]
    assert first == ["a", "0.600 +- 1.271 (2)", "1.000 +- 0.000 (2)"] and second == ["b", "0.100 (1)", "1.000 (1)"]
    with pytest.raises(InputError, match="no run has judge"):
        table([tmp_path / "a-seed0"], ["judge"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no reports"):
        table([tmp_path / "empty"])
