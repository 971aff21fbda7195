"""The one error that users see as a single line: what came, what was expected, the mend."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Wrong input from outside (a file, an option, a checkpoint). The command line prints it as one line, exit status 2."""


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Failures to write (full disk, no permission, a file in the way) as one line about the folder.

    Raises:
        InputError: the system refused to write.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); free some space or give another folder") from error


def check_least(where: str, name: str, value: int, least: int) -> None:
    """InputError where a count is below its least."""
    if value < least:
        raise InputError(f"{where}: {name} is {value}; give at least {least}")


def check_number(where: str, name: str, value: float) -> None:
    """InputError unless a number is finite and not negative."""
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"{where}: {name} is {value}; give a number from 0 on")


def check_one_of(where: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """InputError unless a word is one of the choices."""
    if value not in choices:
        raise InputError(f"{where}: {name} is {value!r}; choose one of {', '.join(choices)}")
