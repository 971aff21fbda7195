"""The recipes of post-training over videos at a size for a CPU: what they promise, and every kind of run for a step."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from openkeye.apps.commands import main
from openkeye.common.checks import InputError
from openkeye.distill.config import DistillRun
from openkeye.distill.named_tasks import options_by_owner
from openkeye.distill.teachers import TeacherRoutes
from openkeye.inputs.processor import BUNDLED_DIR
from openkeye.model.weights import load_model
from openkeye.rl.policy_roles import open_tasks
from openkeye.rl.task_answers import TaskAnswers
from openkeye.tasks.registry import open_task
from recipes.post_training import mopd, mopd_table, teachers, video_rl
from recipes.post_training.domains import DOMAINS, KINDS, TAUGHT, task_of

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "post_training"


def test_clips_that_are_scored_are_never_learnt():
    config = video_rl.video_rl(seed=3)
    assert len(config.tasks) == len(config.evaluation_tasks) == 2 * len(KINDS)
    tasks = open_tasks(config)
    seen = {tasks[name].read(0).messages[0]["content"][0]["video"].key for name in config.tasks}
    unseen = {tasks[name].read(0).messages[0]["content"][0]["video"].key for name in config.evaluation_tasks}
    assert len(seen) == len(unseen) == 2 and not seen & unseen
    other = open_tasks(video_rl.video_rl(seed=4))
    again = {other[name].read(0).messages[0]["content"][0]["video"].key for name in config.evaluation_tasks}
    assert again == unseen, "all seeds are scored on the same clips"
    assert "vision" not in config.learner["trains"] and config.algorithm["objective"] == "gspo"
    with pytest.raises(InputError, match="did you mean story"):
        video_rl.video_rl(clips=("storey",))


def test_every_domain_has_a_teacher_and_a_route():
    run = mopd.mopd()
    routes = TeacherRoutes(run.distill.routes, run.distill.teachers)
    owners, _ = options_by_owner(run)
    for name in TAUGHT:
        example = open_task(DOMAINS[name].task, owners[DOMAINS[name].task]).read(0)
        assert routes.teacher_of(example.modality, example.task) == name
        taught = open_task(DOMAINS[name].task, task_of(name, "train", options={"seed": 0}).options).read(0)
        assert example.facts != taught.facts, "the student meets clips that no teacher has learnt from"
    without = mopd.mopd(leave_out="reading", is_scaled=False, penalty=0.0, support="student")
    assert "reading" not in without.distill.teachers and len(without.tasks) == len(TAUGHT) - 1
    assert without.distill.scaling.most_domain == 1.0 and not without.distill.scaling.categories
    assert teachers.mixed().num_steps == len(TAUGHT) * teachers.teachers("reading").num_steps
    with pytest.raises(InputError, match="at least 5"):
        mopd.mopd(domains=("reading", "counting"))
    with pytest.raises(InputError, match="belongs to nobody"):
        options_by_owner(DistillRun(**{**vars(run), "options": {"tier": "long"}}))


@pytest.mark.parametrize("recipe", ["video_rl.py:smoke", "teachers.py:smoke"])
def test_a_step_of_reinforcement_learning(recipe, tmp_path, capsys):
    words = ["rl", str(RECIPES / recipe), f"run_dir={tmp_path / 'run'}", f"out_dir={tmp_path / 'out'}"]
    assert main(words) == 0
    before, after = load_model(BUNDLED_DIR).state_dict(), load_model(tmp_path / "out").state_dict()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed and not any(name.startswith(("visual.", "mlp_AR.")) or "indexer" in name for name in changed)
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert record["step"] == 1 and record["reward/format"] >= 0 and record["num_rollouts"] >= 4


def test_two_steps_of_distillation_and_answers_as_data(tmp_path, capsys):
    for name in ("still_counting", "arithmetic"):
        shutil.copytree(BUNDLED_DIR, tmp_path / name)
    words = ["distill", str(RECIPES / "mopd.py:smoke"), f"folder={tmp_path}", f"run_dir={tmp_path / 'run'}"]
    assert main([*words, f"out_dir={tmp_path / 'out'}"]) == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2] and log[0]["num_samples"] == 4
    # The teachers are the student itself.
    assert log[0]["loss/ref_kl"] == pytest.approx(0.0, abs=1e-5)


def test_answers_are_learnt_with_their_own_questions(tmp_path):
    path = tmp_path / "said.jsonl"
    rows = [
        {"number": 4, "answer": "2.", "rewards": {"outcome": 1.0}},
        {"number": 9, "answer": "7.", "rewards": {"outcome": 0}},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = open_task("frameforge_counting", {"tier": "long", "seed": 2})
    every = TaskAnswers(path, task="frameforge_counting", options="tier=long seed=2")
    assert every.num_samples == 2 and every.read(1).messages[-1]["content"] == "7."
    question = every.read(0).messages[0]
    assert question["content"] == task.read(4).messages[0]["content"] and every.read(0).task == task.name
    right = TaskAnswers(path, task="frameforge_counting", options="tier=long", min_outcome=1.0)
    assert right.num_samples == 1 and right.read(0).messages[-1]["content"] == "2."
    with pytest.raises(InputError, match="is no option"):
        TaskAnswers(path, task="frameforge_counting", options="long")
    with pytest.raises(InputError, match="lower min_outcome"):
        TaskAnswers(path, task="frameforge_counting", min_outcome=2.0)


def test_the_table_tells_means_intervals_and_the_farthest_behind(tmp_path):
    def put(place: str, mean: float) -> None:
        path = tmp_path / "scores" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"rewards": {"outcome": {"mean": mean, "interval": [mean - 0.02, mean + 0.02]}}}))

    put("start/reading.json", 0.5)
    for seed, mean in enumerate((0.7, 0.8, 0.9)):
        put(f"teachers/seed{seed}/reading.json", mean)
        put(f"student/seed{seed}/reading.json", mean - 0.03)
    lines = mopd_table.table(mopd_table.read_scores(tmp_path))
    assert lines[2].startswith("| start | 0.500 ±0.020 |") and "-30.0 (reading)" in lines[2]
    # 4.303 * 0.1 / sqrt(3)
    assert lines[3] == "| teachers | 0.800 ±0.248 | 0.800 |  |"
    assert lines[4].endswith("| 0.770 | -3.0 (reading) |")


def test_the_script_goes_on_in_pieces(tmp_path):
    """All parts of one seed, with commands that only write what a real one leaves behind."""
    fake = tmp_path / "fake.py"
    fake.write_text(
        "import json, sys\n"
        "from pathlib import Path\n"
        "words = dict(word.split('=', 1) for word in sys.argv[1:] if '=' in word)\n"
        "out = Path(words['out_dir'])\n"
        "if '--stop-after-seconds' in sys.argv and not out.with_name(out.name + '.begun').exists():\n"
        "    out.parent.mkdir(parents=True, exist_ok=True)\n"
        "    out.with_name(out.name + '.begun').touch()\n"
        "    sys.exit(3)\n"
        "out.mkdir(parents=True, exist_ok=True)\n"
        "(out / 'config.json').write_text(json.dumps(words))\n"
    )
    environment = os.environ | {
        "RUN": str(tmp_path / "run"), "SEEDS": "0", "DOMAINS": "reading counting", "PYTHON": sys.executable, "PIECE": "600",
        "PARTS": "teachers student mixed sequential estimators leave_out switches",
        "OPENKEYE": f"{sys.executable} {fake}", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    num_stops = 0
    while True:
        done = subprocess.run(["bash", str(RECIPES / "mopd.sh")], cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode == 0:
            break
        num_stops += 1
        assert done.returncode == 3 and num_stops < 40, done.stderr
    made = {str(path.parent.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("config.json")}
    assert made == {
        f"seed0/{name}" for name in (
            "teachers/reading", "teachers/counting", "student", "mixed", "sequential/reading", "sequential/counting",
            "keye_literal", "sampled", "full", "without_reading", "without_counting", "no_overlap", "no_scaling", "no_penalty",
        )
    }  # fmt: skip
    assert num_stops == len(made), "each run is stopped once and goes on once"
    settings = json.loads((tmp_path / "run" / "seed0" / "sequential" / "counting" / "config.json").read_text())
    assert settings["model_dir"].endswith("seed0/sequential/reading")
    costs = (tmp_path / "run" / "costs.tsv").read_text().splitlines()
    assert len(costs) == 2 * len(made)
