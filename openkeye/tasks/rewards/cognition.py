"""Self-cognition: who the model says that it is."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from openkeye.tasks.rewards.reading import answer_text
from openkeye.tasks.rewards.reward import fact
from openkeye.tasks.task import Example, Response

OTHERS = (
    "chatgpt", "gpt", "openai", "claude", "anthropic", "gemini", "deepmind", "qwen", "tongyi", "alibaba", "deepseek", "llama",
    "mistral", "kimi", "moonshot", "doubao", "bytedance", "ernie", "baidu", "grok", "glm", "zhipu",
)  # fmt: skip
DENIALS = re.compile(r"\b(?:not|no|never|nor|isn't|am not|neither)\b[^.!?]{0,80}$")


def claims(text: str, name: str) -> bool:
    """Whether a text names somebody other than to deny it in the same sentence."""
    folded = text.casefold()
    for match in re.finditer(rf"(?<![a-z]){re.escape(name.casefold())}(?![a-z])", folded):
        if not DENIALS.search(folded[max(0, match.start() - 100) : match.start()]):
            return True
    return False


@dataclass(frozen=True)
class SelfCognitionReward:
    """1 where the answer claims every one of `facts["names"]` and nobody else's name."""

    name: str = "self_cognition"
    others: tuple[str, ...] = OTHERS

    async def __call__(self, example: Example, response: Response) -> Mapping[str, float]:
        said, own = answer_text(response), [str(one) for one in fact(example, "names")]
        foreign = [other for other in self.others if not any(other in one.casefold() for one in own)]
        is_own = all(claims(said, one) for one in own)
        return {self.name: float(is_own and not any(claims(said, other) for other in foreign))}
