"""`openkeye rl RECIPE [field=value ...]`: runs a recipe of reinforcement learning or distillation, resumes where it stopped."""

import argparse
from typing import TYPE_CHECKING, Any

from openkeye.apps.run_arguments import INTERRUPTED, NOT_FINISHED, add_run_arguments, check_run_arguments, draw
from openkeye.common.checks import InputError

if TYPE_CHECKING:
    from openkeye.rl.run_config import PostTrainingConfig

SUMMARY = "reinforcement learning of a model by a recipe; the same command goes on where it stopped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "group_size=16, algorithm.objective=grpo, tasks.counting.weight=2", _recipes)


def _recipes() -> list[tuple[str, str]]:
    from openkeye.apps.recipe_files import list_recipes
    from openkeye.rl.run_config import PostTrainingConfig

    return list_recipes(PostTrainingConfig)


def run(arguments: argparse.Namespace) -> int:
    """Post-train; returns 0 finished, 2 wrong input, 3 out of time, 130 interrupted."""
    from openkeye.apps.recipe_files import open_recipe, settings_of
    from openkeye.common.fields import describe
    from openkeye.rl.run_config import PostTrainingConfig

    check_run_arguments(arguments)
    config = settings_of(open_recipe(arguments.recipe, PostTrainingConfig), arguments.words, PostTrainingConfig)
    if arguments.settings:
        print("\n".join(describe(config)))
        return 0
    return _run(config, arguments)


def _run(config: "PostTrainingConfig", arguments: argparse.Namespace) -> int:
    import math
    from pathlib import Path

    from openkeye.apps.train_progress import TrainProgress
    from openkeye.rl.loop import Orchestrator

    stop_after = math.inf if arguments.stop_after_seconds is None else arguments.stop_after_seconds
    with TrainProgress(config, arguments.lines_every) as progress:
        orchestrator = Orchestrator(config, _function(config.opens), progress)
        is_finished = orchestrator.run(stop_after)
        draw(Path(config.run_dir), progress.say)
    if not is_finished:
        return INTERRUPTED if orchestrator.is_interrupted else NOT_FINISHED
    print(config.out_dir)
    return 0


def _function(place: str) -> Any:
    """What MODULE:FUNCTION names.

    Raises:
        InputError: there is no such thing.
    """
    import importlib

    module, _, name = place.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"opens={place}: {error}; give MODULE:FUNCTION that makes the roles") from error
