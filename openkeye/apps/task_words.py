"""`NAME [option=value ...]`: a task as it is named on a command line."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from openkeye.common.checks import InputError

if TYPE_CHECKING:
    from openkeye.tasks.task import Task


def task_from(name: str, words: Sequence[str]) -> "Task":
    """The task with its options: numbers, true, false and lists as in JSON, everything else as text.

    Raises:
        InputError: no such task or option, or a word that is no option=value.
    """
    from openkeye.tasks.registry import open_task

    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"task {name!r}: {word!r} is no option; give option=value")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return open_task(name, options)
