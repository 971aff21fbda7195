"""What general RL is fed with (report, 5.3): cross-validated reference solutions, questions neither solved nor hopeless, and
none that an evaluation holds."""

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from openkeye.agents.model_client import ModelClient
from openkeye.common.checks import InputError
from openkeye.tasks.judges import Panel, majority, read_mark
from openkeye.tasks.task import Example, Response, Task

SOLUTION_PROMPT = (
    "Is this solution reliable: is every step true and justified, nothing left out that matters, and does it end with the "
    'reference answer?\nReply {"verdict": 1} for yes and {"verdict": 0} for no.'
)
WORD = re.compile(r"\w+")


class SolutionJudge(Protocol):
    """Says whether a right solution is reliable."""

    async def is_reliable(self, question: str, truth: str, solution: str) -> bool: ...


@dataclass(frozen=True)
class ModelSolutionJudge:
    """A panel's majority."""

    panel: Panel

    async def is_reliable(self, question: str, truth: str, solution: str) -> bool:
        """See `SolutionJudge`."""
        parts = [("QUESTION", question), ("REFERENCE", truth), ("SOLUTION", solution)]
        return majority(await self.panel.votes(SOLUTION_PROMPT, parts, read_mark((0, 1))), 0) == 1


@dataclass(frozen=True)
class CrossValidation:
    """What came of one question."""

    example: Example
    num_sampled: int
    num_right: int
    num_solvers_right: int
    # solvers with at least one right solution
    reliable: tuple[str, ...]
    # right solutions that the judge keeps

    @property
    def reference(self) -> Example | None:
        """The example with its reference solution: the shortest reliable one; None where there is none."""
        if not self.reliable:
            return None
        solution = min(self.reliable, key=len)
        return replace(self.example, facts={**self.example.facts, "solution": solution})


async def cross_validate(
    task: Task, example: Example, solvers: Sequence[ModelClient], judge: SolutionJudge, num_samples: int, min_solvers: int = 1
) -> CrossValidation:
    """Sample solutions of strong models, keep the right ones of which the judge says that they are reliable.

    Args:
        num_samples: of each solver.
        min_solvers: that must come to the right answer each; fewer, and the question's truth is in doubt: nothing is kept.
    """
    if not 1 <= min_solvers <= len(solvers) or num_samples < 1:
        raise InputError(f"{num_samples} samples, {min_solvers} of {len(solvers)} solvers; give at least 1 of each")
    asked = [(number, solver) for number, solver in enumerate(solvers) for _ in range(num_samples)]
    replies = await asyncio.gather(*(solver.reply(example.messages, example.tools) for _, solver in asked))
    right: list[str] = []
    solvers_right = set()
    for (number, _), reply in zip(asked, replies, strict=True):
        finish = "length" if reply.finish_reason == "length" else "stop"
        response = Response(reply.text, reply.reasoning, finish)
        if (await task.score(example, response))["outcome"] >= 1.0:
            right.append(f"{reply.reasoning}\n\n{reply.text}".strip())
            solvers_right.add(number)
    reliable = []
    if len(solvers_right) >= min_solvers:
        question, truth = str(example.facts.get("question", "")), str(example.facts.get("answer", ""))
        for solution in dict.fromkeys(right):
            if await judge.is_reliable(question, truth, solution):
                reliable.append(solution)
    return CrossValidation(example, len(replies), len(right), len(solvers_right), tuple(reliable))


@dataclass(frozen=True)
class AnswerCount:
    """How often a policy was right about an example."""

    name: str
    # `Example.name`
    num_right: float
    # outcomes added up: parts count as parts
    num_sampled: int

    @property
    def accuracy(self) -> float:
        return self.num_right / self.num_sampled


async def count_right(
    task: Task, numbers: Iterable[int], ask: Callable[[Example], Awaitable[Response]], num_samples: int
) -> list[AnswerCount]:
    """Ask a policy `num_samples` times about each example of a task."""
    counts = []
    for number in numbers:
        example = task.read(number)
        responses = await asyncio.gather(*(ask(example) for _ in range(num_samples)))
        scores = await asyncio.gather(*(task.score(example, response) for response in responses))
        counts.append(AnswerCount(example.name, sum(score["outcome"] for score in scores), num_samples))
    return counts


@dataclass(frozen=True)
class Filtered:
    """Names that stay, and why the others went."""

    kept: tuple[str, ...]
    dropped: Mapping[str, str]
    # name to reason

    @property
    def num_dropped(self) -> Mapping[str, int]:
        """By reason."""
        return Counter(self.dropped.values())


def filter_by_accuracy(counts: Sequence[AnswerCount], lowest: float = 0.0, highest: float = 1.0) -> Filtered:
    """Examples whose accuracy lies between two bounds, both excluded: by default, drop the hopeless and the solved.

    Raises:
        InputError: bounds that leave nothing, or an example that was never asked.
    """
    if not 0.0 <= lowest < highest <= 1.0:
        raise InputError(f"accuracies between {lowest} and {highest}; give two bounds from 0 to 1, the smaller first")
    kept, dropped = [], {}
    for count in counts:
        if count.num_sampled < 1:
            raise InputError(f"{count.name}: was never asked, so it has no accuracy; sample at least once")
        if count.accuracy <= lowest:
            dropped[count.name] = "hopeless"
        elif count.accuracy >= highest:
            dropped[count.name] = "solved"
        else:
            kept.append(count.name)
    return Filtered(tuple(kept), dropped)


class NgramIndex:
    """The n-grams of texts that training must not hold, such as an evaluation's questions."""

    def __init__(self, texts: Iterable[str], n: int = 13) -> None:
        if n < 1:
            raise InputError(f"n-grams of {n} words; give 1 or more")
        self.n = n
        self._grams = {gram for text in texts for gram in self._of(text)}

    def overlap(self, text: str) -> float:
        """Share of a text's n-grams that are among them; a text shorter than n words is one gram."""
        grams = self._of(text)
        return sum(gram in self._grams for gram in grams) / len(grams) if grams else 0.0

    def _of(self, text: str) -> list[tuple[str, ...]]:
        words = WORD.findall(text.casefold())
        if not words:
            return []
        return [tuple(words[start : start + self.n]) for start in range(max(1, len(words) - self.n + 1))]


def decontaminate(texts: Mapping[str, str], held_out: NgramIndex, max_overlap: float = 0.0) -> Filtered:
    """Drop what shares more than `max_overlap` of its n-grams with what is held out."""
    dropped = {name: "contaminated" for name, text in texts.items() if held_out.overlap(text) > max_overlap}
    return Filtered(tuple(name for name in texts if name not in dropped), dropped)
