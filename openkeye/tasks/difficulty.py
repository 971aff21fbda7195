"""How hard a task's examples are for a model: pass rate by length, by number of events, by kind."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openkeye.common.checks import InputError
from openkeye.tasks.task import Example, Response, Task

Answer = Callable[[Example], Awaitable[Response]]


@dataclass(frozen=True)
class Difficulty:
    """One example, asked some times."""

    name: str
    # `Example.name`
    number: int
    outcomes: tuple[float, ...]
    # one of each answer, 0 to 1
    facts: Mapping[str, Any]
    # what the example knows about itself: "duration_seconds", "num_events", "kind", ...

    @property
    def accuracy(self) -> float:
        """Mean outcome."""
        return float(np.mean(self.outcomes))


@dataclass(frozen=True)
class DifficultyRow:
    """Examples that are alike in one way."""

    value: str
    # `60-300` or the fact itself
    num_examples: int
    accuracy: float
    # mean outcome of all answers
    pass_rate: float
    # share of answers with an outcome of at least the threshold
    solvable: float
    # share of examples with at least one such answer
    mixed: float
    # share of examples with answers of unlike outcomes: those that groups learn from


async def measure_difficulty(
    task: Task, numbers: Iterable[int], answer: Answer, num_samples: int, max_concurrent: int = 64
) -> list[Difficulty]:
    """Ask `num_samples` times about each example; at most `max_concurrent` answers are under way at once.

    Raises:
        InputError: less than one sample or one answer at once.
    """
    if num_samples < 1 or max_concurrent < 1:
        raise InputError(f"num_samples {num_samples}, max_concurrent {max_concurrent}; give at least 1 of each")
    room = asyncio.Semaphore(max_concurrent)

    async def ask(example: Example) -> float:
        async with room:
            response = await answer(example)
        return float((await task.score(example, response))["outcome"])

    async def measure(number: int) -> Difficulty:
        example = task.read(number)
        outcomes = await asyncio.gather(*(ask(example) for _ in range(num_samples)))
        return Difficulty(example.name, number, tuple(outcomes), example.facts)

    return list(await asyncio.gather(*(measure(number) for number in numbers)))


def difficulty_by(
    measured: Sequence[Difficulty], fact: str, edges: Sequence[float] = (), threshold: float = 1.0
) -> list[DifficultyRow]:
    """Rows by a fact of the examples: by its value, or, with `edges`, by where a number falls between them; in that order.

    Args:
        threshold: outcome from which an answer passes: 1 for exact answers, less for overlaps.

    Raises:
        InputError: an example lacks the fact, or edges that do not ascend.
    """
    if list(edges) != sorted(set(edges)):
        raise InputError(f"edges are {list(edges)}; give them ascending")
    groups: dict[tuple[float, str], list[Difficulty]] = {}
    for one in measured:
        if fact not in one.facts:
            raise InputError(f"{one.name}: knows no {fact!r}; its facts are {', '.join(one.facts)}")
        groups.setdefault(_place(one.facts[fact], edges), []).append(one)
    return [_row(key[1], groups[key], threshold) for key in sorted(groups)]


def numbers_between(measured: Sequence[Difficulty], lowest: float, highest: float) -> list[int]:
    """Numbers of the examples whose accuracy lies between two bounds, both excluded: neither hopeless nor solved."""
    return [one.number for one in measured if lowest < one.accuracy < highest]


def _place(value: Any, edges: Sequence[float]) -> tuple[float, str]:
    if not edges:
        is_number = isinstance(value, int | float)
        return (float(value), f"{value:g}") if is_number else (0.0, str(value))
    place = int(np.searchsorted(edges, value, side="right"))
    low, high = ("" if n < 0 or n >= len(edges) else f"{edges[n]:g}" for n in (place - 1, place))
    return float(place), f"{low}-{high}"


def _row(value: str, group: Sequence[Difficulty], threshold: float) -> DifficultyRow:
    passes = [[outcome >= threshold for outcome in one.outcomes] for one in group]
    return DifficultyRow(
        value,
        len(group),
        float(np.mean([outcome for one in group for outcome in one.outcomes])),
        float(np.mean([is_right for one in passes for is_right in one])),
        float(np.mean([any(one) for one in passes])),
        float(np.mean([len(set(one.outcomes)) > 1 for one in group])),
    )
