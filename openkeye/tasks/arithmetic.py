"""Generated arithmetic: questions in a few plain words whose reference solutions are lists of steps.

Half of the kinds ask for yes or no: such an answer can be guessed, so that a right answer says little about the reasoning.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openkeye.common.checks import InputError
from openkeye.frameforge.catalogue import COLOUR_NAMES, SHAPES
from openkeye.tasks.arithmetic_rules import RuleArithmeticJudge
from openkeye.tasks.context import ContextReward
from openkeye.tasks.rewards.format import FormatReward
from openkeye.tasks.rewards.maths import MathsReward
from openkeye.tasks.rewards.reading import ANSWER, END_ANSWER, END_THINK, THINK
from openkeye.tasks.rewards.reward import Reward, compose
from openkeye.tasks.task import Example, Response

SPACES = {"train": 20, "test": 21}
# first words of the seeds: no question of one is drawn from the other's numbers
REWARDS = ("outcome", "context")
GUESS = ("I see it",)
# a reasoning of no steps; none at all would not be well formed, and earn nothing


@dataclass(frozen=True)
class Sum:
    """A question with its solution."""

    text: str
    steps: tuple[str, ...]
    # `12 + 7 = 19`, the last of a comparison `19 > 16`
    answer: str


@dataclass(frozen=True)
class ArithmeticOptions:
    """What is asked and how it is scored."""

    seed: int = 0
    split: str = "train"
    kinds: tuple[str, ...] = ()
    # of KINDS; default: all
    max_number: int = 20
    # the largest number that a question names
    reward: str = "outcome"
    # of REWARDS: "context" is outcome x process, so that a right answer by a wrong road earns nothing
    format_weight: float = 0.1
    num_examples: int = 0
    # 0: without end
    unsound_share: float = 0.0
    # of the references: the right answer behind a wrong step, or behind a bare claim (half each)

    def __post_init__(self) -> None:
        if self.split not in SPACES:
            raise InputError(f"split is {self.split!r}; give one of {', '.join(SPACES)}")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown:
            raise InputError(f"kind {unknown[0]!r} is unknown; choose from {', '.join(KINDS)}")
        if self.reward not in REWARDS:
            raise InputError(f"reward is {self.reward!r}; give one of {', '.join(REWARDS)}")
        if self.seed < 0 or not 8 <= self.max_number <= 10_000 or self.format_weight < 0 or self.num_examples < 0:
            raise InputError(
                f"seed {self.seed}, max_number {self.max_number}, format_weight {self.format_weight}, num_examples "
                f"{self.num_examples}; give seeds, weights and numbers from 0 on, and a largest number of 8 to 10000"
            )
        if not 0 <= self.unsound_share <= 1:
            raise InputError(f"unsound_share is {self.unsound_share}; give a share of the references from 0 to 1")


class ArithmeticTask:
    """See `Task`. Rewards: "format", "maths" (the outcome) and, always logged, "process" and "context"."""

    def __init__(self, options: ArithmeticOptions = ArithmeticOptions()) -> None:
        self.options = options
        self._kinds = options.kinds or tuple(KINDS)
        outcome = MathsReward()
        main = "context" if options.reward == "context" else outcome.name
        rewards: list[Reward] = [outcome, ContextReward(outcome, RuleArithmeticJudge()), FormatReward()]
        self._scores = compose(rewards, {main: 1.0, "format": options.format_weight}, outcome=outcome.name)

    @property
    def name(self) -> str:
        return "arithmetic"

    @property
    def num_examples(self) -> int | None:
        """See `Task`."""
        return self.options.num_examples or None

    def read(self, number: int) -> Example:
        """See `Task`; kinds take turns."""
        rng = np.random.default_rng([SPACES[self.options.split], self.options.seed, number])
        kind = self._kinds[number % len(self._kinds)]
        question = KINDS[kind](rng, self.options.max_number)
        steps = question.steps
        if rng.random() < self.options.unsound_share:
            steps = _slipped(rng, steps) if rng.random() < 0.5 else GUESS
        facts: Mapping[str, Any] = {
            "answer": question.answer,
            "solution": "\n".join(question.steps),
            "question": question.text,
            "kind": kind,
            "reference": reference_text(steps, question.answer),
        }
        return Example(self.name, number, "text", ({"role": "user", "content": question.text},), facts=facts)

    async def score(self, example: Example, response: Response) -> Mapping[str, float]:
        """See `Task`."""
        return await self._scores(example, response)


def reference_text(steps: Sequence[str], answer: str) -> str:
    """A solution as a model should write it."""
    return f"{THINK}{' '.join(f'{step}.' for step in steps)}{END_THINK}{ANSWER}{answer}{END_ANSWER}"


def _slipped(rng: np.random.Generator, steps: Sequence[str]) -> tuple[str, ...]:
    """The steps with a wrong result in the first one; the others are as they were."""
    left, _, result = steps[0].partition(" = ")
    slip = int(rng.integers(1, 10)) * (1 if rng.random() < 0.5 else -1)
    value = int(result) + slip if int(result) + slip > 0 else int(result) - slip
    return (f"{left} = {value}", *steps[1:])


def _distinct(rng: np.random.Generator, count: int, low: int, high: int) -> list[int]:
    """Different numbers, so that a step says which of them it takes."""
    return (low + rng.choice(high - low + 1, count, replace=False)).tolist()


def _things(rng: np.random.Generator, count: int) -> list[str]:
    """`red circles`, all different."""
    picks = rng.choice(len(COLOUR_NAMES) * len(SHAPES), count, replace=False).tolist()
    plurals = ["crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES]
    return [f"{COLOUR_NAMES[pick // len(SHAPES)]} {plurals[pick % len(SHAPES)]}" for pick in picks]


def _total(rng: np.random.Generator, high: int) -> Sum:
    a, b, c = _distinct(rng, 3, 2, high)
    x, y, z = _things(rng, 3)
    text = f"There are {a} {x}, {b} {y} and {c} {z}. How many objects are there in total?"
    return Sum(text, (f"{a} + {b} = {a + b}", f"{a + b} + {c} = {a + b + c}"), str(a + b + c))


def _change(rng: np.random.Generator, high: int) -> Sum:
    small, middle, large = sorted(_distinct(rng, 3, 2, high))
    (x,) = _things(rng, 1)
    left = large - small
    text = f"There are {large} {x}. First {small} of the {x} go, then {middle} appear. How many {x} are there?"
    return Sum(text, (f"{large} - {small} = {left}", f"{left} + {middle} = {left + middle}"), str(left + middle))


def _groups(rng: np.random.Generator, high: int) -> Sum:
    count, each, others = _distinct(rng, 3, 2, max(6, high // 2))
    x, y = _things(rng, 2)
    text = f"There are {count} times {each} {x} and {others} {y}. How many objects are there in total?"
    return Sum(text, (f"{count} * {each} = {count * each}", f"{count * each} + {others} = {count * each + others}"),
               str(count * each + others))  # fmt: skip


def _two_sides(rng: np.random.Generator, high: int) -> tuple[str, tuple[str, ...], bool]:
    """(what is where, the steps, whether there are more on the left)."""
    while True:
        a, b, c, d = _distinct(rng, 4, 2, high)
        if a + b != c + d:
            break
    x, y, z, w = _things(rng, 4)
    text = f"On the left are {a} {x} and {b} {y}. On the right are {c} {z} and {d} {w}."
    steps = (f"{a} + {b} = {a + b}", f"{c} + {d} = {c + d}", _comparison(a + b, c + d))
    return text, steps, a + b > c + d


def _comparison(first: int, second: int) -> str:
    return f"{first} {'>' if first > second else '<'} {second}"


def _more(rng: np.random.Generator, high: int) -> Sum:
    text, steps, is_left = _two_sides(rng, high)
    side = ("left", "right")[int(rng.integers(2))]
    return Sum(f"{text} Are there more objects on the {side}?", steps, "Yes" if is_left == (side == "left") else "No")


def _side(rng: np.random.Generator, high: int) -> Sum:
    text, steps, is_left = _two_sides(rng, high)
    return Sum(f"{text} Where are more objects, on the left or on the right?", steps, "Left" if is_left else "Right")


def _enough(rng: np.random.Generator, high: int) -> Sum:
    count, each = _distinct(rng, 2, 2, max(6, high // 2))
    (x,) = _things(rng, 1)
    # As often more as less, and near enough that only the product tells.
    off = int(rng.integers(1, max(2, count * each // 3) + 1)) * (1 if rng.random() < 0.5 else -1)
    bound = count * each + off
    if bound in (count, each):
        bound += 1 if off > 0 else -1
    text = f"There are {count} times {each} {x}. Are there more than {bound} {x}?"
    steps = (f"{count} * {each} = {count * each}", _comparison(count * each, bound))
    return Sum(text, steps, "Yes" if count * each > bound else "No")


KINDS: dict[str, Callable[[np.random.Generator, int], Sum]] = {
    "total": _total,
    "more": _more,
    "change": _change,
    "side": _side,
    "groups": _groups,
    "enough": _enough,
}
GUESSABLE = ("more", "side", "enough")
# two possible answers
