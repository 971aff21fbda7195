"""Counting: the exact number."""

from collections.abc import Mapping
from dataclasses import dataclass

from openkeye.tasks.rewards.reading import answer_text, read_numbers
from openkeye.tasks.rewards.reward import fact
from openkeye.tasks.task import Example, Response


def read_count(text: str) -> int | None:
    """The number that an answer gives; None where it gives none, several different ones, or no count."""
    values = set(read_numbers(text))
    if len(values) != 1 or not (value := values.pop()).is_integer() or value < 0:
        return None
    return int(value)


@dataclass(frozen=True)
class CountingReward:
    """1 where the answer's only number is `facts["count"]`."""

    name: str = "counting"

    async def __call__(self, example: Example, response: Response) -> Mapping[str, float]:
        return {self.name: float(read_count(answer_text(response)) == int(fact(example, "count")))}
