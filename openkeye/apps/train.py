"""`openkeye train RECIPE [field=value ...]`: runs any recipe, resumes where it stopped, and tells what it learnt."""

import argparse
from typing import TYPE_CHECKING, Any

from openkeye.apps.run_arguments import INTERRUPTED, NOT_FINISHED, add_run_arguments, check_run_arguments, draw
from openkeye.common.checks import InputError
from openkeye.common.launch import num_ranks, rank

if TYPE_CHECKING:
    from pathlib import Path

    from openkeye.train.config import RunConfig
    from openkeye.train.reporter import Reporter

SUMMARY = "train or fine-tune a model by a recipe; the same command goes on where it stopped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "stages.0.context=8192, stages.*.rate=1e-5", _recipes)


def _recipes() -> list[tuple[str, str]]:
    from openkeye.apps.recipe_files import list_recipes

    return list_recipes()


def run(arguments: argparse.Namespace) -> int:
    """Train; returns 0 finished, 2 wrong input, 3 out of time, 130 interrupted. Of several ranks the first one speaks."""
    from openkeye.apps.recipe_files import open_recipe, settings_of
    from openkeye.common.fields import describe
    from openkeye.train.config import RunConfig

    check_run_arguments(arguments)
    try:
        config = settings_of(open_recipe(arguments.recipe), arguments.words, RunConfig)
    except InputError:
        if rank():
            # All ranks read the same words, and one line is enough.
            return 2
        raise
    if arguments.settings:
        if rank() == 0:
            print("\n".join(describe(config)))
        return 0
    return _train(config, arguments)


def _train(config: "RunConfig", arguments: argparse.Namespace) -> int:
    import math
    from pathlib import Path

    from openkeye.apps.train_progress import TrainProgress
    from openkeye.train.loop import Trainer
    from openkeye.train.reporter import SilentReporter

    stop_after = math.inf if arguments.stop_after_seconds is None else arguments.stop_after_seconds
    if rank():
        return 0 if Trainer(config, SilentReporter()).run(stop_after) else NOT_FINISHED
    run_dir = Path(config.run_dir)
    with TrainProgress(config, arguments.lines_every) as progress:
        # First of all, since it knows whether run_dir is this run's.
        trainer = Trainer(config, progress)
        before = _evaluate(config, config.model_dir, run_dir / "before.json", progress)
        is_finished = trainer.run(stop_after)
        draw(run_dir, progress.say)
        if not is_finished:
            return INTERRUPTED if trainer.interrupts.is_asked else NOT_FINISHED
        after = _evaluate(config, config.out_dir, run_dir / "after.json", progress)
        if before is not None and after is not None:
            progress.say(f"held out, before: {before.text()}")
            progress.say(f"held out, after:  {after.text()}")
    print(config.out_dir)
    return 0


def _evaluate(config: "RunConfig", model_dir: str, kept: "Path", reporter: "Reporter") -> Any:
    """Scores on the held-out sources, kept in a file so that a resumed run does not ask again; None where there are none."""
    from openkeye.apps.held_out import Scores, score_sources

    if not config.evaluates:
        return None
    if kept.is_file():
        return Scores.load(kept)
    if num_ranks() > 1:
        reporter.say(
            "held-out answers are scored by one process alone; after the run, `openkeye train` without torchrun adds them"
        )
        return None
    scores = score_sources(config, model_dir, reporter.say)
    if scores is not None:
        scores.save(kept)
    return scores
