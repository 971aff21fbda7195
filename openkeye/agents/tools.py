"""`Tool`: what a model may call; arguments are checked, and what comes back is a message, also of a wrong call."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openkeye.agents.model_client import Message, ModelReply

MAX_RESULT_CHARACTERS = 8000


class ToolError(Exception):
    """A call that cannot be done, told to the model: what came, what was expected."""


@dataclass(frozen=True)
class Tool:
    """One function that a model may call."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    # JSON schema of an object
    call: Callable[..., Awaitable[str]]
    # with checked arguments by name; ToolError where it cannot be done

    def schema(self) -> dict[str, Any]:
        """In OpenAI's form, for the model."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class CallOutcome:
    """What became of one call."""

    name: str
    arguments: Mapping[str, Any]
    result: str
    # as the model sees it
    is_valid: bool
    # known, with arguments that fit, and done


def parameters(required: Mapping[str, Mapping[str, Any]], **optional: Mapping[str, Any]) -> dict[str, Any]:
    """JSON schema of an object with these properties and no others."""
    properties = {**required, **optional}
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def check_arguments(tool: Tool, arguments: Mapping[str, Any]) -> None:
    """ToolError for arguments that do not fit the tool's schema: which, and what was expected."""
    import jsonschema

    validator = jsonschema.validators.validator_for(dict(tool.parameters))(dict(tool.parameters))
    problems = []
    for error in sorted(validator.iter_errors(dict(arguments)), key=lambda error: [str(step) for step in error.absolute_path]):
        place = ".".join(str(step) for step in error.absolute_path)
        problems.append(f"{place}: {error.message}" if place else error.message)
    if problems:
        known = ", ".join(tool.parameters.get("properties", {})) or "no arguments"
        raise ToolError(f"{tool.name}: {'; '.join(problems[:3]):.500}; it takes {known}")


def cut(text: str, max_characters: int = MAX_RESULT_CHARACTERS) -> str:
    """A text that is too long loses its middle, with a notice of how much."""
    if len(text) <= max_characters:
        return text
    head = max_characters * 2 // 3
    tail = max_characters - head
    return f"{text[:head]}\n[... {len(text) - max_characters} characters cut ...]\n{text[len(text) - tail :]}"


async def call_tool(
    tools: Sequence[Tool], name: str, arguments: Mapping[str, Any], max_characters: int = MAX_RESULT_CHARACTERS
) -> CallOutcome:
    """Call one tool by name. A wrong call is an outcome that says so."""
    known = {tool.name: tool for tool in tools}
    try:
        if name not in known:
            raise ToolError(f"there is no tool {name!r:.80}; choose from {', '.join(known) or 'none'}")
        check_arguments(known[name], arguments)
        result = await known[name].call(**arguments)
    except ToolError as error:
        return CallOutcome(name, arguments, cut(f"error: {error}", max_characters), False)
    return CallOutcome(name, arguments, cut(result, max_characters), True)


async def answer_calls(
    tools: Sequence[Tool], reply: ModelReply, max_characters: int = MAX_RESULT_CHARACTERS
) -> tuple[tuple[Message, ...], tuple[CallOutcome, ...]]:
    """(tool messages for the calls of a reply in their order and for its unreadable pieces, what became of the calls)"""
    outcomes = [await call_tool(tools, call["name"], call["arguments"], max_characters) for call in reply.tool_calls]
    messages: list[Message] = [
        {"role": "tool", "tool_call_id": call["id"], "name": call["name"], "content": outcome.result}
        for call, outcome in zip(reply.tool_calls, outcomes, strict=True)
    ]
    for piece in reply.malformed:
        content = f"error: this is no tool call that can be read: {piece:.200}; write a name and arguments as one JSON object"
        messages.append({"role": "tool", "content": content})
    return tuple(messages), tuple(outcomes)
