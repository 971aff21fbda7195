"""What `openkeye train` and `openkeye rl` have in common: their arguments, exit statuses, and the curves behind a run."""

import argparse
from typing import TYPE_CHECKING, Any

from openkeye.common.checks import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

INTERRUPTED = 130
NOT_FINISHED = 3
# exit status of a run that --stop-after-seconds ended, so that a shell's loop can repeat it


def add_run_arguments(
    parser: argparse.ArgumentParser, example: str, list_recipes: "Callable[[], Sequence[tuple[str, str]]]"
) -> None:
    """example: words that are worth knowing, for the help."""
    parser.add_argument("recipe", help="a packaged recipe (--list), NAME:FUNCTION of it, or your FILE.py[:FUNCTION]")
    parser.add_argument(
        "words", nargs="*", metavar="field=value", help=f"arguments of the recipe, then settings by path: {example}"
    )
    parser.add_argument("--settings", action="store_true", help="print every setting with its value instead of training")
    parser.add_argument("--list", action=_ListRecipes, recipes=list_recipes, help="print the packaged recipes")
    parser.add_argument(
        "--stop-after-seconds",
        type=float,
        default=None,
        metavar="S",
        help=f"save and stop after so long, exit status {NOT_FINISHED} where steps are left",
    )
    parser.add_argument("--lines-every", type=float, default=10.0, metavar="S", help="seconds between lines without a terminal")


class _ListRecipes(argparse.Action):
    """Like --help: needs no recipe."""

    def __init__(
        self,
        option_strings: "Sequence[str]",
        dest: str,
        recipes: "Callable[[], Sequence[tuple[str, str]]]",
        help: str | None = None,
    ) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)
        self._recipes = recipes

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        for name, summary in self._recipes():
            print(f"{name:24}{summary}")
        parser.exit()


def check_run_arguments(arguments: argparse.Namespace) -> None:
    """
    Raises:
        InputError: a number of seconds that is none.
    """
    if arguments.stop_after_seconds is not None and not arguments.stop_after_seconds > 0:
        raise InputError(f"--stop-after-seconds is {arguments.stop_after_seconds:g}; give a number above 0")
    if not arguments.lines_every > 0:
        raise InputError(f"--lines-every is {arguments.lines_every:g}; give a number of seconds above 0")


def draw(run_dir: "Path", say: "Callable[[str], None]") -> None:
    """The run's curves, where they can be drawn."""
    from openkeye.apps.curves import can_draw, draw_curves

    if not can_draw():
        say('no curves were drawn: matplotlib is not installed (pip install "openkeye[train]")')
        return
    path = draw_curves(run_dir)
    if path is not None:
        say(f"curves: {path}")
