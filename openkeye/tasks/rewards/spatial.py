"""Spatial answers: a judge's -1, 0 or 1 (report, 5.5)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from openkeye.tasks.rewards.reading import answer_text, plain_words
from openkeye.tasks.rewards.reward import fact
from openkeye.tasks.task import Example, Response


class MarkJudge(Protocol):
    """Marks an answer with -1, 0 or 1 (`judges.SpatialJudge` is a model's)."""

    async def judge(self, question: str, truth: str, answer: str) -> float: ...


@dataclass(frozen=True)
class SpatialReward:
    """The judge's mark for an answer beside `facts["answer"]`; an empty answer is -1."""

    judge: MarkJudge
    name: str = "spatial"

    async def __call__(self, example: Example, response: Response) -> Mapping[str, float]:
        truth, said = str(fact(example, "answer")), answer_text(response)
        question = "\n".join(_words(message.get("content")) for message in example.messages if message["role"] == "user")
        return {self.name: await self.judge.judge(question, truth, said) if said else -1.0}


def _words(content: object) -> str:
    """The text of a message, its pictures left out."""
    if isinstance(content, list | tuple):
        return " ".join(part["text"] for part in content if part.get("type") == "text")
    return str(content or "")


@dataclass(frozen=True)
class RuleSpatialJudge:
    """Marks answers that can only be a few words, such as `On the left.`: no model is asked.

    1 for the truth's words, -1 for those of another possible answer, 0 for anything else, which commits itself to nothing.
    """

    possible: tuple[tuple[str, ...], ...] = (("left", "right"), ("up", "down"), ("above", "below"), ("yes", "no"))
    # answers that contradict each other
    name: str = "rules:spatial-words"

    async def judge(self, question: str, truth: str, answer: str) -> float:
        """1 or -1 only for an answer that says one thing."""
        right, said = plain_words(truth), plain_words(answer)
        if said == right:
            return 1.0
        words, truth_words = set(said.split()), set(right.split())
        for group in self.possible:
            told, known = words & set(group), truth_words & set(group)
            if len(known) == 1 and len(told) == 1:
                return 1.0 if told == known and len(words) <= len(truth_words) + 4 else -1.0 if told != known else 0.0
        # Which of two things: the question names both, and the other one is wrong.
        named = said.removeprefix("the ")
        return (
            -1.0 if named and named in question.lower() and named not in right and right.removeprefix("the ") != named else 0.0
        )
