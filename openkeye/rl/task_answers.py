"""Answers to a task's examples as data for `openkeye train`: what a teacher has said, learnt word by word.

    openkeye evaluate task frameforge_counting tier=long --samples 4 --answers counting.jsonl
    options = {"task": "frameforge_counting", "options": "tier=long"}
    SourceConfig("openkeye.rl.task_answers:TaskAnswers", "counting.jsonl", options)

Pictures and videos stand in no file: examples are read again from their numbers.
"""

import json
from pathlib import Path
from typing import Any

from openkeye.common.checks import InputError
from openkeye.data.sample import Sample
from openkeye.data.sources.files import LineIndex, existing_file, read_json_text
from openkeye.tasks.registry import open_task


class TaskAnswers:
    """A `Source` of single answers (`openkeye evaluate task --answers`)."""

    def __init__(self, path: str | Path, *, task: str = "", options: str = "", min_outcome: float = 0.0) -> None:
        """
        Args:
            task: its name.
            options: of the task, as on a command line, with spaces between them.
            min_outcome: answers with less are not learnt; such a sample is refused, and the next one is read.

        Raises:
            InputError: no such file, task or option.
        """
        self._lines = LineIndex(existing_file(path, "a file of `openkeye evaluate task --answers`"))
        self._task = open_task(task, dict(_option(word) for word in options.split()))
        self._kept = [index for index in range(len(self._lines)) if self._record(index)["outcome"] >= min_outcome]
        if not self._kept:
            raise InputError(f"{path}: no answer has an outcome of {min_outcome:g} or more; lower min_outcome")

    @property
    def num_samples(self) -> int:
        return len(self._kept)

    def read(self, index: int) -> Sample:
        """See `Source.read`."""
        record = self._record(self._kept[index])
        example = self._task.read(record["number"])
        if example.environment is not None:
            raise InputError(f"{record['where']}: {example.task} is played in episodes, which are more than one answer")
        said = {"role": "assistant", "content": record["answer"]}
        return Sample(record["where"], [*example.messages, said], tools=example.tools, task=example.task)

    def _record(self, index: int) -> dict[str, Any]:
        where = self._lines.where(index)
        record = read_json_text(self._lines.read(index), where)
        if not isinstance(record, dict) or not isinstance(record.get("answer"), str) or type(record.get("number")) is not int:
            raise InputError(f"{where}: expected an answer and the number of its example")
        return record | {"where": where, "outcome": float(record.get("rewards", {}).get("outcome", 0.0))}


def _option(word: str) -> tuple[str, Any]:
    name, equals, value = word.partition("=")
    if not equals:
        raise InputError(f"{word!r} is no option; give option=value")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
