"""`openkeye distill RECIPE [field=value ...]`: one student learns from many teachers by a recipe; resumes where it stopped."""

import argparse
from typing import TYPE_CHECKING, Any

from openkeye.apps.run_arguments import INTERRUPTED, NOT_FINISHED, add_run_arguments, check_run_arguments, draw
from openkeye.common.checks import InputError

if TYPE_CHECKING:
    from openkeye.distill.config import DistillRun

SUMMARY = "distil many teachers into one student by a recipe, on the student's own answers; goes on where it stopped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "distill.estimator.name=sampled, distill.teachers.maths=runs/maths, num_steps=200", _recipes)


def _recipes() -> list[tuple[str, str]]:
    from openkeye.apps.recipe_files import list_recipes
    from openkeye.distill.config import DistillRun

    return list_recipes(DistillRun)


def run(arguments: argparse.Namespace) -> int:
    """Distil; returns 0 finished, 2 wrong input, 3 out of time, 130 interrupted."""
    from openkeye.apps.recipe_files import open_recipe, settings_of
    from openkeye.common.fields import describe
    from openkeye.distill.config import DistillRun

    check_run_arguments(arguments)
    settings = settings_of(open_recipe(arguments.recipe, DistillRun), arguments.words, DistillRun)
    if arguments.settings:
        print("\n".join(describe(settings)))
        return 0
    return _run(settings, arguments)


def _run(settings: "DistillRun", arguments: argparse.Namespace) -> int:
    import asyncio
    import math
    import time
    from pathlib import Path

    from openkeye.apps.train_progress import TrainProgress
    from openkeye.distill.loop import distill
    from openkeye.train.interrupts import Interrupts

    began = time.monotonic()
    stop_after = math.inf if arguments.stop_after_seconds is None else arguments.stop_after_seconds
    with TrainProgress(settings, arguments.lines_every) as progress, Interrupts() as interrupts:
        parts = _function(settings.opens)(settings)
        first = parts.learner.version
        if first:
            progress.say(f"going on from step {first} of {settings.num_steps}")
        progress.stage("distillation", settings.num_steps)
        is_finished = asyncio.run(
            distill(settings, parts, progress.step, lambda: interrupts.is_asked or time.monotonic() - began > stop_after)
        )
        draw(Path(settings.run_dir), progress.say)
        if not is_finished:
            why = "interrupted" if interrupts.is_asked else "out of time"
            progress.say(f"{why}: step {parts.learner.version} is saved; start the same run again to go on from it")
            return INTERRUPTED if interrupts.is_asked else NOT_FINISHED
    print(settings.out_dir)
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
        raise InputError(f"opens={place}: {error}; give MODULE:FUNCTION that makes the parts") from error
