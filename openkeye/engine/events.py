"""What a request says while it runs: its tokens, then how it ended."""

from dataclasses import dataclass, field

from openkeye.engine.answer import Answer


@dataclass(frozen=True)
class TokenEvent:
    """One new token of the answer. The token that ends an answer (end of turn) is none of them."""

    token_id: int
    text: str
    # new text; "" while a character is incomplete or a stop string may be beginning
    logprob: float | None = None
    # natural logarithm of its probability, where `SamplingParameters.logprobs` is given
    top_logprobs: list[tuple[int, float]] = field(default_factory=list)
    # (token id, logprob) of the likeliest tokens, likeliest first, equal ones by id


@dataclass(frozen=True)
class FinishEvent:
    """The answer is over."""

    text: str
    # whole answer
    finish_reason: str
    # "stop", "length", "cancelled" or "deadline"
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    answer: Answer
    rest: str = ""
    # The end of `text` that no TokenEvent carried, since it was held back until now: texts of all tokens + rest == text.


@dataclass(frozen=True)
class ErrorEvent:
    """There will be no answer."""

    kind: str
    # "input" (the request's own fault, also one that could never fit), "full" (the queue is: try again later), "stopped" (the
    # engine shuts down, died or does not run), "internal"
    message: str
    # one line


Event = TokenEvent | FinishEvent | ErrorEvent
