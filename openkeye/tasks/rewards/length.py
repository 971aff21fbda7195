"""Overlong answers: a soft penalty before the limit (DAPO, soft overlong punishment)."""

from collections.abc import Mapping
from dataclasses import dataclass

from openkeye.common.checks import InputError
from openkeye.tasks.task import Example, Response


def overlong_penalty(num_tokens: int, max_tokens: int, margin_tokens: int) -> float:
    """0 up to `max_tokens - margin_tokens`, then linear down to -1 at `max_tokens`, and -1 beyond."""
    over = num_tokens - (max_tokens - margin_tokens)
    return -min(1.0, max(0, over) / margin_tokens) if num_tokens <= max_tokens else -1.0


@dataclass(frozen=True)
class OverlongPenalty:
    """`overlong_penalty` of an answer's tokens; -1 for one that the limit cut."""

    max_tokens: int
    margin_tokens: int
    name: str = "overlong"

    def __post_init__(self) -> None:
        if not 0 < self.margin_tokens <= self.max_tokens:
            raise InputError(
                f"overlong: a margin of {self.margin_tokens} of {self.max_tokens} tokens; give 1 to {self.max_tokens}"
            )

    async def __call__(self, example: Example, response: Response) -> Mapping[str, float]:
        is_cut = response.finish_reason == "length"
        penalty = -1.0 if is_cut else overlong_penalty(response.num_tokens, self.max_tokens, self.margin_tokens)
        return {self.name: penalty}
