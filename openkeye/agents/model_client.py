"""`ModelClient`: messages in, the next message out. The engine in this process fulfils it, and any HTTP API does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Message = Mapping[str, Any]
# in OpenAI's form (`openkeye.inputs.messages`): role, content, for an assistant also reasoning_content and tool_calls


@dataclass(frozen=True)
class ModelReply:
    """One message of a model, taken apart."""

    text: str
    # what it says outside of reasoning and tool calls
    reasoning: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    # {"id": ..., "name": ..., "arguments": {...}}
    finish_reason: str = "stop"
    # "stop", "length" or "tool_calls"
    malformed: tuple[str, ...] = ()
    # pieces that look like tool calls and cannot be read as such
    details: Mapping[str, Any] = field(default_factory=dict)
    # what the client knows besides, such as token ids

    def message(self) -> dict[str, Any]:
        """The assistant's message to append to the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call["id"],
                    "type": "function",
                    "function": {"name": call["name"], "arguments": dict(call["arguments"])},
                }
                for call in self.tool_calls
            ]
        return message


class ModelClient(Protocol):
    """A model by name."""

    @property
    def name(self) -> str: ...

    async def reply(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> ModelReply:
        """The next message of the conversation.

        Raises:
            InputError: the conversation does not fit the model.
            OSError: the model cannot be reached.
        """
        ...
