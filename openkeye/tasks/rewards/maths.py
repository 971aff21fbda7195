"""Outcome in mathematics: symbolic equality by math-verify, in a process of its own with a hard time limit."""

import asyncio
import atexit
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Protocol

from openkeye.tasks.rewards.format import is_well_formed
from openkeye.tasks.rewards.limited_worker import LimitedWorker
from openkeye.tasks.rewards.reading import answer_text, plain_words, whole_text
from openkeye.tasks.rewards.reward import fact
from openkeye.tasks.task import Example, Response

LIMIT_SECONDS = 5.0
LIMIT_BYTES = 4 << 30
MAX_ANSWER = 4096
# characters that are compared: an answer's end
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
FUNCTIONS = (
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "log", "exp", "sqrt", "max", "min",
    "mod", "gcd", "lcm",
)  # fmt: skip
PLAIN_NUMBER = re.compile(r"[-+]?\d{1,30}(?:\.\d{1,30}|/\d{1,30})?$")


@dataclass(frozen=True)
class Comparison:
    """What came of comparing two answers."""

    is_right: bool
    is_read: bool
    # both could be read as mathematics, in time: an algebra system takes words for products of letters


@lru_cache(maxsize=1)
def maths_worker() -> LimitedWorker:
    """This process' own worker, started by its first use."""
    worker = LimitedWorker("openkeye.tasks.rewards.maths_worker", LIMIT_SECONDS, LIMIT_BYTES)
    atexit.register(worker.close)
    return worker


def compare(gold: str, answer: str, worker: LimitedWorker | None = None) -> Comparison:
    """Whether an answer equals the gold one.

    Equal texts and plain numbers need no algebra; everything else goes to the worker. What hangs or kills it is wrong.
    """
    gold, answer = gold[:MAX_ANSWER], answer[-MAX_ANSWER:]
    if not answer.strip():
        return Comparison(False, False)
    first, second = _plain_number(gold), _plain_number(answer)
    if first is not None and second is not None:
        return Comparison(first == second, True)
    if plain_words(gold) == plain_words(answer):
        return Comparison(True, True)
    reply = (worker or maths_worker()).call({"gold": gold, "answer": answer})
    if reply is None:
        return Comparison(False, False)
    are_read = reply["is_gold_read"] and reply["is_answer_read"] and not _has_words(gold) and not _has_words(answer)
    return Comparison(reply["is_right"], are_read)


def _has_words(text: str) -> bool:
    """Whether a text holds words that are neither LaTeX commands nor functions."""
    return any(word.lower() not in FUNCTIONS for word in WORD.findall(text))


def _plain_number(text: str) -> Fraction | None:
    """The exact value of `12`, `-3.5`, `1/2`, a full stop behind it aside."""
    text = text.strip().rstrip(".")
    if not PLAIN_NUMBER.match(text) or re.search(r"/0+$", text):
        return None
    return Fraction(text)


class OutcomeJudge(Protocol):
    """Says whether an answer means the same as the truth, where rules cannot tell (`judges.OutcomeJudge`)."""

    async def judge(self, question: str, truth: str, answer: str) -> float: ...


@dataclass(frozen=True)
class MathsReward:
    """1 where the answer equals `facts["answer"]`, and is well formed; a judge is asked only where algebra cannot read both."""

    needs_format: bool = True
    # (report, 5.5: the outcome is conditional on well-formed think and answer tags)
    judge: OutcomeJudge | None = None
    name: str = "maths"

    async def __call__(self, example: Example, response: Response) -> Mapping[str, float]:
        truth, said = str(fact(example, "answer")), answer_text(response)
        if self.needs_format and not is_well_formed(whole_text(response)):
            return {self.name: 0.0}
        result = await asyncio.to_thread(compare, truth, said)
        if not result.is_right and not result.is_read and said and self.judge is not None:
            question = "\n".join(str(message.get("content", "")) for message in example.messages if message["role"] == "user")
            return {self.name: await self.judge.judge(question, truth, said)}
        return {self.name: float(result.is_right)}
