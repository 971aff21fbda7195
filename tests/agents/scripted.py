"""A model that says what a function of the conversation makes up: for tests of loops and environments."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from openkeye.agents.model_client import Message, ModelReply


def call(tool: str, /, **arguments: Any) -> ModelReply:
    """A reply that calls one tool."""
    made = {"id": f"call-{tool}", "name": tool, "arguments": arguments}
    return ModelReply("", tool_calls=(made,), finish_reason="tool_calls")


def say(text: str) -> ModelReply:
    return ModelReply(text)


@dataclass
class Scripted:
    """Replies in their order, or made from the conversation so far."""

    replies: Sequence[ModelReply] | Callable[[Sequence[Message]], ModelReply]
    name: str = "scripted"
    seen_tools: list[str] = field(default_factory=list)
    num_replies: int = 0

    async def reply(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> ModelReply:
        self.seen_tools = [tool["function"]["name"] for tool in tools]
        self.num_replies += 1
        return self.replies(messages) if callable(self.replies) else self.replies[self.num_replies - 1]
