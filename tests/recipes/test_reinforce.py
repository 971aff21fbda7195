"""The packaged recipe of reinforcement learning: its words and what they make."""

import pytest

from openkeye.apps.commands import main
from openkeye.apps.recipe_files import open_recipe, settings_of
from openkeye.common.checks import InputError
from openkeye.rl.run_config import PostTrainingConfig


def settings(*words):
    return settings_of(open_recipe("reinforce", PostTrainingConfig), words, PostTrainingConfig)


def test_words_reach_the_task_the_algorithm_and_the_learner():
    config = settings("task=counting", "options.size=3", "options.kind=x", "rate=1e-4", "algorithm.objective=grpo", "max_age=2")
    assert config.tasks["counting"].options == {"size": 3, "kind": "x"} and config.tasks["counting"].reader == "counting"
    assert config.learner == {"rate": 1e-4} and config.algorithm == {"objective": "grpo"} and config.max_age == 2
    assert config.run_dir == "reinforced-run"


def test_the_model_that_it_begins_with_is_kept():
    with pytest.raises(InputError, match="give another folder"):
        settings("task=counting", "out_dir=openkeye-tiny")


def test_the_command_lists_it(capsys):
    with pytest.raises(SystemExit):
        main(["rl", "--list"])
    assert "reinforce" in capsys.readouterr().out
