"""Tasks by name."""

import dataclasses
from collections.abc import Callable, Mapping
from importlib import import_module
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from openkeye.common.checks import InputError
from openkeye.common.fields import expected, unknown
from openkeye.tasks.judges import Panel
from openkeye.tasks.task import Task

TASKS: dict[str, tuple[str, str, str]] = {
    "arithmetic": ("openkeye.tasks.arithmetic", "ArithmeticTask", "ArithmeticOptions"),
    "grounding": ("openkeye.tasks.pictures", "PictureTask", "PictureTaskOptions"),
    "counting": ("openkeye.tasks.pictures", "PictureTask", "PictureTaskOptions"),
    "ocr": ("openkeye.tasks.pictures", "PictureTask", "PictureTaskOptions"),
    "spatial": ("openkeye.tasks.pictures", "PictureTask", "PictureTaskOptions"),
    "frameforge_timestamp_localisation": ("openkeye.tasks.frameforge", "FrameForgeTask", "FrameForgeOptions"),
    "frameforge_counting": ("openkeye.tasks.frameforge", "FrameForgeTask", "FrameForgeOptions"),
    "frameforge_before_after": ("openkeye.tasks.frameforge", "FrameForgeTask", "FrameForgeOptions"),
    "frameforge_co_occurrence": ("openkeye.tasks.frameforge", "FrameForgeTask", "FrameForgeOptions"),
    "frameforge_reading": ("openkeye.tasks.frameforge", "FrameForgeTask", "FrameForgeOptions"),
    "frameforge_motion": ("openkeye.tasks.frameforge", "FrameForgeTask", "FrameForgeOptions"),
    "frameforge_two_moments": ("openkeye.tasks.frameforge", "FrameForgeTask", "FrameForgeOptions"),
    "self_cognition": ("openkeye.tasks.self_cognition", "SelfCognitionTask", "SelfCognitionOptions"),
    "api_calls": ("openkeye.tasks.api_calls", "ApiCalls", "ApiCalls"),
    "code": ("openkeye.tasks.code_problems", "open_code_task", "CodeOptions"),
    "repositories": ("openkeye.tasks.repositories", "RepositoryTask", "RepositoryTask"),
    "search_world": ("openkeye.tasks.search", "WorldSearchTask", "WorldSearchTask"),
    "search_corpus": ("openkeye.tasks.search", "open_corpus_task", "CorpusOptions"),
    "json_lines": ("openkeye.tasks.json_lines", "JsonLinesTask", "JsonLinesOptions"),
}
# name: module, class or function that makes it, record of its options (a class may be its own); imported when it is opened
TAKES_KIND = ("grounding", "counting", "ocr", "spatial", *(name for name in TASKS if name.startswith("frameforge_")))
# several names of one class, which is told the name
TAKES_PANEL = ("json_lines",)


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
    if name in TAKES_KIND:
        return make(name, settings)
    return make(settings, panel) if name in TAKES_PANEL else make(settings)


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
        if wanted in (int, float, str, bool):
            accepted: Any = (int, float) if wanted is float else wanted
            if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
                raise InputError(f"{what}: option {key} is {value!r}; give {expected(wanted)}")
        given[key] = value
    missing = [
        one.name
        for one in fields.values()
        if one.name not in given and one.default is one.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{what}: option {missing[0]} is missing; give it")
    return record(**given)


def _is_plain(wanted: Any) -> bool:
    """Whether it can be written in settings: numbers, texts, switches, lists, tables and records of these."""
    if dataclasses.is_dataclass(wanted) or wanted in (int, float, str, bool):
        return True
    origin = get_origin(wanted)
    if origin in (Union, UnionType):
        return all(one is type(None) or _is_plain(one) for one in get_args(wanted))
    return origin is not None and issubclass(origin, (tuple, list, Mapping))
