"""`Reward`: one or several named numbers for an answer; `compose` makes one task's score out of several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from openkeye.common.checks import InputError
from openkeye.tasks.task import Example, Response


class Reward(Protocol):
    """A frozen record: it can be pickled, and gives the same for the same arguments (and the same judge)."""

    @property
    def name(self) -> str:
        """Of its main number."""
        ...

    async def __call__(self, example: Example, response: Response) -> Mapping[str, float]:
        """Numbers by name; `name` is among them, from 0 to 1 (penalties from -1 to 0, the spatial judge's from -1 to 1).

        An answer that cannot be read gets the lowest, never an exception.

        Raises:
            InputError: the example lacks the truth that this reward compares with.
        """
        ...


@dataclass(frozen=True)
class Composed:
    """Several rewards of one task, and how "outcome" is made of them."""

    rewards: tuple[Reward, ...]
    weights: Mapping[str, float]
    # by name; 0 logs a reward only
    outcome: str
    # the reward that says whether the answer is right

    async def __call__(self, example: Example, response: Response) -> dict[str, float]:
        """Every reward's numbers; "total" is their weighted sum, "outcome" the right answer's share in 0..1."""
        numbers: dict[str, float] = {}
        for reward in self.rewards:
            numbers |= await reward(example, response)
        numbers["total"] = sum(weight * numbers[name] for name, weight in self.weights.items())
        numbers["outcome"] = min(1.0, max(0.0, numbers[self.outcome]))
        return numbers


def compose(rewards: Sequence[Reward], weights: Mapping[str, float], outcome: str | None = None) -> Composed:
    """Named rewards with weights; every name in `weights` is some reward's own name.

    Args:
        outcome: the reward that becomes "outcome"; default: the first.

    Raises:
        InputError: no reward, two of one name, a weight for none of them, or an outcome that is none of them.
    """
    names = [reward.name for reward in rewards]
    if not names:
        raise InputError("no reward to compose; give at least one")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"reward {twice[0]!r} is given twice; give each once")
    for name in (*weights, *([outcome] if outcome is not None else [])):
        if name not in names:
            raise InputError(f"{name!r} is none of the rewards; choose from {', '.join(names)}")
    for name in ("total", "outcome"):
        if name in names and name != names[0]:
            raise InputError(f"{name!r} is what rewards are composed to; rename that reward")
    return Composed(tuple(rewards), {name: float(weights.get(name, 0.0)) for name in names}, outcome or names[0])


def fact(example: Example, key: str) -> Any:
    """What an example knows; a missing one is the maker's fault and tells so.

    Raises:
        InputError: the example has no such fact.
    """
    if key not in example.facts:
        raise InputError(f"{example.name}: has no {key!r} to score with; give it among the example's facts")
    return example.facts[key]
