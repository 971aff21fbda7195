"""The one error that users see as a single line: what came, what was expected, the mend."""

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
