"""The contract of environments: reset, step, score. Asynchronous, and everything they know can be pickled between two steps."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from openkeye.agents.model_client import Message, ModelReply


@dataclass(frozen=True)
class Opening:
    """What an episode begins with."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    # JSON schemas in OpenAI's form


@dataclass(frozen=True)
class Observation:
    """The world's answer to one message of the model."""

    messages: tuple[Message, ...] = ()
    # tool results, or a user's next turn; appended behind the model's message, never learnt
    is_done: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)
    # for logs


class Environment(Protocol):
    """One episode. Between calls it can be pickled and goes on elsewhere; what it started outside is gone after `close`."""

    async def reset(self) -> Opening:
        """Begin, or begin again, from the same first state."""
        ...

    async def step(self, reply: ModelReply) -> Observation:
        """Act on the model's message. A wrong call is an observation that says so, never an exception."""
        ...

    async def score(self) -> Mapping[str, float]:
        """Named rewards of the episode so far; "outcome" in 0..1 is among them."""
        ...

    async def close(self) -> None:
        """Let go of processes and files; may be called twice."""
        ...
