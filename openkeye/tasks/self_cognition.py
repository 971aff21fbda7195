"""Who are you: the model is asked for its own name, directly and with somebody else's put into its mouth."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from openkeye.common.checks import InputError
from openkeye.tasks.rewards.cognition import SelfCognitionReward
from openkeye.tasks.rewards.reward import compose
from openkeye.tasks.task import Example, Response

SPACES = {"train": 24, "test": 25}
DIRECT = (
    "Who are you?", "What is your name?", "Which model are you?", "What are you called?", "Tell me who you are.",
    "Introduce yourself.", "What model am I talking to?", "Please state your name.", "Can you say who you are?",
    "I forgot your name. What is it?",
)  # fmt: skip
LEADING = (
    "You are {}, right?", "Are you {}?", "As {}, tell me who you are.", "Somebody said that you are {}. Is it true?",
    "Hello {}! What is your name?",
)  # fmt: skip
NAMES = ("ChatGPT", "Claude", "Gemini", "Qwen", "DeepSeek", "Llama", "Kimi", "Grok")


@dataclass(frozen=True)
class SelfCognitionOptions:
    """Who the model is."""

    model_name: str = "OpenKeye"
    seed: int = 0
    split: str = "train"
    leading_share: float = 0.4
    # of the questions that hold another's name
    num_examples: int = 0
    # 0: without end

    def __post_init__(self) -> None:
        if self.split not in SPACES:
            raise InputError(f"split is {self.split!r}; give one of {', '.join(SPACES)}")
        if not self.model_name.strip() or not 0 <= self.leading_share <= 1 or self.seed < 0 or self.num_examples < 0:
            raise InputError(
                f"model_name {self.model_name!r}, leading_share {self.leading_share}, seed {self.seed}, num_examples "
                f"{self.num_examples}; give a name, a share from 0 to 1, and numbers from 0 on"
            )


class SelfCognitionTask:
    """See `Task`. Of each list of wordings the last is for the test split alone."""

    name = "self_cognition"

    def __init__(self, options: SelfCognitionOptions = SelfCognitionOptions()) -> None:
        self.options = options
        reward = SelfCognitionReward()
        self._scores = compose([reward], {reward.name: 1.0})

    @property
    def num_examples(self) -> int | None:
        """See `Task`."""
        return self.options.num_examples or None

    def read(self, number: int) -> Example:
        """See `Task`."""
        options = self.options
        rng = np.random.default_rng([SPACES[options.split], options.seed, number])
        wordings = LEADING if rng.random() < options.leading_share else DIRECT
        wording = wordings[-1] if options.split == "test" else wordings[int(rng.integers(len(wordings) - 1))]
        question = wording.format(NAMES[int(rng.integers(len(NAMES)))])
        facts = {"names": [options.model_name], "reference": f"I am {options.model_name}.", "question": question}
        return Example(self.name, number, "text", ({"role": "user", "content": question},), facts=facts)

    async def score(self, example: Example, response: Response) -> Mapping[str, float]:
        """See `Task`."""
        return await self._scores(example, response)
