"""Format: think and answer tags, and tool calls as JSON."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openkeye.tasks.rewards.reading import (
    ANSWER,
    END_ANSWER,
    END_THINK,
    MAX_CHARACTERS,
    THINK,
    read_json,
    whole_text,
)
from openkeye.tasks.task import Example, Response

CALL, END_CALL = "<tool_call>", "</tool_call>"
MAX_CALLS = 64


def is_well_formed(text: str, needs_think: bool = True, needs_answer: bool = True) -> bool:
    """Whether a text is `<think>...</think><answer>...</answer>`: each tag once, in order, nothing but blanks outside.

    Without `needs_answer` the answer is the rest and not empty; without `needs_think` the thinking may be missing.
    """
    if len(text) > MAX_CHARACTERS:
        text = text[: MAX_CHARACTERS // 2] + text[-MAX_CHARACTERS // 2 :]
    rest = text.strip()
    if needs_think or THINK in rest or END_THINK in rest:
        if rest.count(THINK) != 1 or rest.count(END_THINK) != 1 or not rest.startswith(THINK):
            return False
        thought, _, rest = rest[len(THINK) :].partition(END_THINK)
        if not thought.strip():
            return False
        rest = rest.strip()
    if needs_answer or ANSWER in rest or END_ANSWER in rest:
        if rest.count(ANSWER) != 1 or rest.count(END_ANSWER) != 1:
            return False
        if not (rest.startswith(ANSWER) and rest.endswith(END_ANSWER)):
            return False
        rest = rest[len(ANSWER) : -len(END_ANSWER)].strip()
    return bool(rest)


@dataclass(frozen=True)
class FormatReward:
    """1 for a well-formed answer that ended of itself, else 0."""

    needs_think: bool = True
    needs_answer: bool = True
    name: str = "format"

    async def __call__(self, example: Example, response: Response) -> Mapping[str, float]:
        fits = is_well_formed(whole_text(response), self.needs_think, self.needs_answer)
        return {self.name: float(fits and response.finish_reason == "stop")}


def tool_calls(text: str) -> list[Mapping[str, Any] | None]:
    """What stands between tool-call tags, up to MAX_CALLS: {"name", "arguments"}, None for what cannot be read as such."""
    pieces = text.split(CALL)[1 : MAX_CALLS + 1]
    return [_call(piece) for piece in pieces]


def _call(piece: str) -> Mapping[str, Any] | None:
    inner, tag, _ = piece.partition(END_CALL)
    call = read_json(inner) if tag and len(inner) <= MAX_CHARACTERS else None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not isinstance(call.get("arguments"), dict):
        return None
    return call


def fits_schema(call: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a call names one of the tools (JSON schemas in OpenAI's form) with its required arguments, of their types."""
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") != call["name"]:
            continue
        parameters = function.get("parameters", {})
        known = parameters.get("properties", {})
        arguments = call["arguments"]
        has_all = all(name in arguments for name in parameters.get("required", ()))
        return has_all and all(name in known and _is_of(value, known[name]) for name, value in arguments.items())
    return False


def _is_of(value: Any, schema: Mapping[str, Any]) -> bool:
    if "enum" in schema and value not in schema["enum"]:
        return False
    kind = schema.get("type")
    if kind == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    kinds: dict[Any, type] = {"string": str, "boolean": bool, "array": list, "object": dict}
    return kind not in kinds or isinstance(value, kinds[kind])


@dataclass(frozen=True)
class ToolJsonReward:
    """Share of the tool calls that are JSON with a name and arguments that fit the example's tools; 1 where none was tried."""

    name: str = "tool_json"

    async def __call__(self, example: Example, response: Response) -> Mapping[str, float]:
        calls = tool_calls(response.text)
        good = [call for call in calls if call is not None and (not example.tools or fits_schema(call, example.tools))]
        return {self.name: len(good) / len(calls) if calls else 1.0}


def choice_letter(text: str) -> str | None:
    """The letter of a multiple-choice answer: `B`, `(B)`, `B. the cat`, `Answer: B`; None where there is none."""
    match = re.match(r"\s{0,8}\(?([A-Z])(?:[).:,]|\s{0,8}(?:\n|$))", text) or re.search(
        r"(?:answer|option)(?: is)?:?\s{0,8}\(?([A-Z])\b", text[-MAX_CHARACTERS:], re.IGNORECASE
    )
    return match[1].upper() if match else None
