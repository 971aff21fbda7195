"""Short answers in words and letters of choices: the same or not."""

from collections.abc import Mapping
from dataclasses import dataclass

from openkeye.tasks.rewards.format import choice_letter
from openkeye.tasks.rewards.reading import answer_text, plain_words
from openkeye.tasks.rewards.reward import fact
from openkeye.tasks.task import Example, Response


@dataclass(frozen=True)
class WordsReward:
    """1 where the answer is `facts["answer"]` (or one of several), letter case, blanks and punctuation at the ends aside."""

    name: str = "words"

    async def __call__(self, example: Example, response: Response) -> Mapping[str, float]:
        truth = fact(example, "answer")
        right = {plain_words(str(one)) for one in (truth if isinstance(truth, list | tuple) else [truth])}
        return {self.name: float(plain_words(answer_text(response)) in right)}


@dataclass(frozen=True)
class ChoiceReward:
    """1 where the answer's letter is `facts["choice"]`."""

    name: str = "choice"

    async def __call__(self, example: Example, response: Response) -> Mapping[str, float]:
        return {self.name: float(choice_letter(answer_text(response)) == str(fact(example, "choice")).upper())}
