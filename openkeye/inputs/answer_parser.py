"""Splits a model's text, piece by piece as it streams, into what it says, what it thinks and which tools it calls.

`<think>...</think>` is reasoning, `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` is a call; all else is said.
"""

import json
import uuid
from dataclasses import dataclass
from typing import Any, Literal

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Piece:
    """New text of one kind, or one whole call."""

    kind: Literal["content", "reasoning", "tool_call"]
    text: str
    # of a call: its arguments as JSON
    name: str = ""
    call_id: str = ""


class AnswerParser:
    """Feed it text, send on what it returns, and take the rest from `finish`.

    Without tags the pieces add up to the text. Space between a tag and the words around it belongs to neither.
    """

    def __init__(self, takes_tool_calls: bool = True) -> None:
        self._takes_tool_calls = takes_tool_calls
        self._rest = ""
        # not yet sent: the beginning of a tag perhaps, or space that a tag may follow
        self._open = ""
        # the tag that is open
        self._is_after_tag = False

    def feed(self, text: str) -> list[Piece]:
        """What is certain after this much more text."""
        self._rest += text
        pieces: list[Piece] = []
        while True:
            found = [(place, tag) for tag in self._next_tags() if (place := self._rest.find(tag)) >= 0]
            if not found:
                break
            place, tag = min(found)
            before, self._rest = self._rest[:place], self._rest[place + len(tag) :]
            if self._open == CALL:
                pieces += self._call(before)
            else:
                pieces += self._said(before.rstrip())
            self._open = tag if tag in (THINK, CALL) else ""
            self._is_after_tag = True
        if self._open != CALL:
            certain = len(self._rest) - self._num_uncertain()
            pieces += self._said(self._rest[:certain])
            self._rest = self._rest[certain:]
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back, now that no more text comes. A call that was never closed is text."""
        if self._open == CALL:
            return [Piece("content", CALL + self._rest)]
        return self._said(self._rest)

    def _next_tags(self) -> list[str]:
        if self._open:
            return [END_THINK if self._open == THINK else END_CALL]
        return [THINK, CALL] if self._takes_tool_calls else [THINK]

    def _num_uncertain(self) -> int:
        """Characters at the end that a tag may begin with or swallow."""
        text, longest = self._rest, 0
        for tag in self._next_tags():
            longest = max(longest, *(size for size in range(len(tag)) if text.endswith(tag[:size])))
        words = text[: len(text) - longest]
        return longest + len(words) - len(words.rstrip())

    def _said(self, text: str) -> list[Piece]:
        if self._is_after_tag:
            text = text.lstrip()
            self._is_after_tag = not text
        return [Piece("reasoning" if self._open == THINK else "content", text)] if text else []

    def _call(self, text: str) -> list[Piece]:
        call = _parse_call(text)
        # Nothing that the model wrote is lost: what is no call stays readable.
        return [Piece("content", f"{CALL}{text}{END_CALL}") if call is None else call]


def _parse_call(text: str) -> Piece | None:
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError):
        # (the latter: brackets in brackets, some thousand deep)
        return None
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        return None
    arguments = content.get("arguments", {})
    # Some models write the arguments as text that holds JSON.
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return Piece("tool_call", text, content["name"], f"call_{uuid.uuid4().hex[:24]}")
