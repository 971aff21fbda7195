"""Tasks by name."""

import dataclasses
from collections.abc import Callable, Mapping
from importlib import import_module
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from openkeye.common.checks import InputError
from openkeye.common.fields import expected, unknown
from openkeye.tasks.judges import Panel
from openkeye.tasks.mistake_reports import MistakeReporter, RuleArithmeticReporter
from openkeye.tasks.task import Task

TASKS: dict[str, tuple[str, str, str]] = {
    "arithmetic": ("openkeye.tasks.arithmetic", "ArithmeticTask", "ArithmeticOptions"),
    "grounding": ("openkeye.tasks.pictures", "PictureTask", "PictureTaskOptions"),
    "counting": ("openkeye.tasks.pictures", "PictureTask", "PictureTaskOptions"),
    "ocr": ("openkeye.tasks.pictures", "PictureTask", "PictureTaskOptions"),
    "spatial": ("openkeye.tasks.pictures", "PictureTask", "PictureTaskOptions"),
    **{
        f"frameforge_{kind}": ("openkeye.tasks.frameforge", "FrameForgeTask", "FrameForgeOptions")
        for kind in (
            "timestamp_localisation",
            "counting",
            "before_after",
            "co_occurrence",
            "reading",
            "motion",
            "two_moments",
        )
    },
    "difference_perception": ("openkeye.tasks.differences", "open_difference_task", "DifferenceOptions"),
    "difference_structure": ("openkeye.tasks.differences", "open_difference_task", "DifferenceOptions"),
    "self_cognition": ("openkeye.tasks.self_cognition", "SelfCognitionTask", "SelfCognitionOptions"),
    "api_calls": ("openkeye.tasks.api_calls", "ApiCalls", "ApiCalls"),
    "code": ("openkeye.tasks.code_problems", "open_code_task", "CodeOptions"),
    "repositories": ("openkeye.tasks.repositories", "RepositoryTask", "RepositoryTask"),
    "search_world": ("openkeye.tasks.search", "WorldSearchTask", "WorldSearchTask"),
    "search_corpus": ("openkeye.tasks.search", "open_corpus_task", "CorpusOptions"),
    "json_lines": ("openkeye.tasks.json_lines", "JsonLinesTask", "JsonLinesOptions"),
}
# name: module, class or function that makes it, record of its options (a class may be its own); imported when it is opened
TAKES_KIND = ("openkeye.tasks.pictures", "openkeye.tasks.frameforge", "openkeye.tasks.differences")
# modules whose class has several names, and is told which
TAKES_PANEL = ("json_lines",)
REPORTERS: dict[str, Callable[[], MistakeReporter]] = {"arithmetic": RuleArithmeticReporter}


def open_task(name: str, options: Mapping[str, Any] | None = None, panel: Panel | None = None) -> Task:
    """A task by its name, with its options by theirs.

    Args:
        panel: the judge of tasks whose rewards ask one.

    Raises:
        InputError: no such task or option, or a value that makes no sense.
    """
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    module_name, class_name, record_name = TASKS[name]
    module = import_module(module_name)
    settings = settings_of(getattr(module, record_name), options or {}, f"task {name!r}")
    if class_name == record_name:
        return settings
    make: Callable[..., Task] = getattr(module, class_name)
    if module_name in TAKES_KIND:
        return make(name, settings)
    return make(settings, panel) if name in TAKES_PANEL else make(settings)


def open_reporter(name: str) -> MistakeReporter:
    """Who tells of mistakes in a task's answers, without the answer (Context-RL).

    Raises:
        InputError: nobody does.
    """
    if name not in REPORTERS:
        raise InputError(
            f"nobody tells of mistakes in task {name!r}; choose from {', '.join(REPORTERS)}, or ask no group again"
        )
    return REPORTERS[name]()


def settings_of(record: type, options: Mapping[str, Any], what: str) -> Any:
    """A frozen record out of plain values by name; lists become tuples, tables become records.

    Raises:
        InputError: an unknown name, a value of another type, a missing one, or one that the record refuses.
    """
    hints = get_type_hints(record)
    # Others than plain values are given by programs, never by name.
    fields = {one.name: one for one in dataclasses.fields(record) if _is_plain(hints[one.name])}
    given = {}
    for key, value in options.items():
        if key not in fields:
            raise unknown(f"option of {what}", key, fields)
        wanted = hints[key]
        if dataclasses.is_dataclass(wanted) and isinstance(wanted, type) and isinstance(value, Mapping):
            given[key] = settings_of(wanted, value, f"{what}, {key}")
            continue
        if isinstance(value, list):
            value = tuple(value)
        if dataclasses.is_dataclass(wanted) and not isinstance(value, wanted):  # type: ignore[arg-type]
            raise InputError(f"{what}: option {key} is {value!r}; give a table of its options")
        if wanted in (int, float, str, bool) and not _is_of(value, wanted):
            raise InputError(f"{what}: option {key} is {value!r}; give {expected(wanted)}")
        if get_origin(wanted) is tuple:
            one = get_args(wanted)[0]
            if not isinstance(value, tuple) or (one in (int, float, str) and not all(_is_of(item, one) for item in value)):
                raise InputError(f"{what}: option {key} is {value!r}; give a list such as [...] of {one.__name__} values")
        given[key] = value
    missing = [
        one.name
        for one in fields.values()
        if one.name not in given and one.default is one.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{what}: option {missing[0]} is missing; give it")
    return record(**given)


def _is_of(value: object, wanted: type) -> bool:
    accepted = (int, float) if wanted is float else wanted
    return isinstance(value, accepted) and (wanted is bool or not isinstance(value, bool))


def _is_plain(wanted: Any) -> bool:
    """Whether it can be written in settings: numbers, texts, switches, lists, tables and records of these."""
    if dataclasses.is_dataclass(wanted) or wanted in (int, float, str, bool):
        return True
    origin = get_origin(wanted)
    if origin in (Union, UnionType):
        return all(one is type(None) or _is_plain(one) for one in get_args(wanted))
    return origin is not None and issubclass(origin, (tuple, list, Mapping))
