"""`openkeye tasks [NAME [option=value ...]]`: which tasks there are, what they ask, reference answers as training data."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from openkeye.common.checks import InputError, writing_to

if TYPE_CHECKING:
    from openkeye.tasks.task import Example, Task

SUMMARY = "list tasks, show their examples, write their reference answers for training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", nargs="?", metavar="NAME", help="a task; none lists them all")
    parser.add_argument("words", nargs="*", metavar="option=value", help="options of the task")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first example (default: 0)")
    parser.add_argument("--num", type=int, default=1, metavar="N", help="examples (default: 1)")
    parser.add_argument(
        "--references",
        default=None,
        metavar="FILE",
        help="write chats with the reference answers, JSON lines that `openkeye train` reads (reader chat_json_lines)",
    )


def run(arguments: argparse.Namespace) -> int:
    """List, show, or write."""
    from openkeye.apps.task_words import task_from
    from openkeye.tasks.registry import TASKS

    if arguments.task is None:
        print("\n".join(TASKS))
        return 0
    task = task_from(arguments.task, arguments.words)
    numbers = numbers_of(task, arguments.first, arguments.num)
    if arguments.references is None:
        for number in numbers:
            print(json.dumps(_shown(task.read(number)), indent=1, default=_as_text))
        return 0
    from pathlib import Path

    path = Path(arguments.references)
    # The first tells whether there are any; nothing is made where there are none.
    reference_chat(task.read(numbers[0]))
    with writing_to(path), path.open("w") as file:
        for number in numbers:
            file.write(json.dumps(reference_chat(task.read(number))) + "\n")
    print(path)
    return 0


def numbers_of(task: "Task", first: int, num: int) -> range:
    """Numbers of examples.

    Raises:
        InputError: none, or past the task's end.
    """
    if first < 0 or num < 1:
        raise InputError(f"{num} examples from number {first}; give --num of at least 1 and --first from 0 on")
    if task.num_examples is not None and first + num > task.num_examples:
        raise InputError(
            f"task {task.name!r} has {task.num_examples} examples, not {first + num}; give a smaller --num or --first"
        )
    return range(first, first + num)


def reference_chat(example: "Example") -> dict[str, Any]:
    """The conversation in which everything is done as the reference solution does it: messages, tools and the task's name.

    Raises:
        InputError: the task has no references, or they cannot be written as text.
    """
    from openkeye.agents.api_domains.environment import ApiEnvironment
    from openkeye.tasks.api_calls import reference_conversation

    if isinstance(example.environment, ApiEnvironment):
        messages, tools = reference_conversation(example)
        return {"messages": list(messages), "tools": list(tools), "task": example.task}
    reference = example.facts.get("reference")
    if not isinstance(reference, str):
        raise InputError(f"task {example.task!r} has no reference answers in words")
    if not all(isinstance(message.get("content"), str) for message in example.messages):
        raise InputError(f"task {example.task!r} asks about pictures or videos, which JSON lines cannot hold")
    return {"messages": [*example.messages, {"role": "assistant", "content": reference}], "task": example.task}


def _shown(example: "Example") -> dict[str, Any]:
    import asyncio

    messages, tools = example.messages, example.tools
    if example.environment is not None:
        opening = asyncio.run(example.environment.reset())
        messages, tools = opening.messages, opening.tools
    return {
        "name": example.name,
        "modality": example.modality,
        "messages": list(messages),
        "tools": list(tools),
        "facts": dict(example.facts),
    }


def _as_text(value: Any) -> str:
    """Pictures and videos by their type and size."""
    shape = getattr(getattr(value, "pixels", value), "shape", None)
    return f"<{type(value).__name__}{'' if shape is None else f' {tuple(shape)}'}>"
