"""Answers behind exactly the prompts that answering would see: a conversation as runs of template tokens.

The mask comes from rendering and never from searching: the messages before an answer are rendered as answering renders
them, the messages with it once more, and what the second text adds to the first is what the model has to say. As long as a
turn's prompt begins with the tokens of the turns before, they share one run. Where it does not (a template that drops the
thinking of earlier turns, a tokenizer that reads across the seam), another run begins, so that no answer is learnt behind
tokens that answering would not see.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openkeye.common.checks import InputError
from openkeye.inputs.processor import Processor

Pieces = list[tuple[str, bool]]
# (text, is prose) as `inputs.template` renders


@dataclass
class TokenRun:
    """Template tokens, one placeholder for each medium, and which of them are learnt."""

    ids: list[int] = field(default_factory=list)
    is_learnt: list[bool] = field(default_factory=list)

    def append(self, ids: Sequence[int], is_learnt: bool) -> None:
        """Go on with these tokens."""
        self.ids += ids
        self.is_learnt += [is_learnt] * len(ids)


class TurnReader:
    """Renders turns with one checkpoint's template and one sample's tools."""

    def __init__(self, processor: Processor, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self.processor = processor
        self._options = {"tools": list(tools)} if tools else {}
        self._ends = tuple(processor.tokenizer.special_tokens)
        self._ids_of: dict[str, list[int]] = {}
        # parts of prompts: every turn's prompt holds all turns before it
        if tools:
            self._check_tools()

    def learnt_runs(self, messages: Sequence[Mapping[str, Any]], first: int = 0) -> list[TokenRun]:
        """Runs that together hold every learnt answer of messages[first:] once.

        messages: as `inputs.messages.split_messages` leaves them.

        Raises:
            InputError: an empty answer, or a template under which answers cannot be told from prompts.
        """
        runs: list[TokenRun] = []
        for number, message in enumerate(messages):
            if number < first or message["role"] != "assistant" or not message.get("learn", True):
                continue
            prompt, answer = self._turn(messages, number)
            if not runs or prompt[: len(runs[-1].ids)] != runs[-1].ids:
                runs.append(TokenRun())
            runs[-1].append(prompt[len(runs[-1].ids) :], False)
            runs[-1].append(answer, True)
        return runs

    def ids_alone(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Template ids of messages that nobody has answered or gone on from."""
        return self._encode(self._render(messages, False))

    def _encode(self, pieces: Pieces) -> list[int]:
        """Ids as `inputs.encode.lay_out` has them, of each part of a template's text once."""
        ids: list[int] = []
        for text, is_prose in pieces:
            if is_prose:
                ids += self.processor.encode_text(text)
                continue
            for part in self.processor.tokenizer.cut_template(text):
                if part not in self._ids_of:
                    self._ids_of[part] = self.processor.tokenizer.encode_template(part)
                ids += self._ids_of[part]
        return ids

    def _render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> Pieces:
        seen = [{key: value for key, value in message.items() if key != "learn"} for message in messages]
        return self.processor.template.render(seen, add_generation_prompt, **self._options)

    def _turn(self, messages: Sequence[Mapping[str, Any]], number: int) -> tuple[list[int], list[int]]:
        """(ids of the prompt, ids of the answer with its end token)."""
        before, message = list(messages[:number]), messages[number]
        if not _says_something(message):
            raise InputError(f"message {number}: an empty answer; write one, or mark it with learn: false")
        prompt = self._render(before, True)
        answer = _remainder(prompt, self._render([*before, self._spelled(before, message)], False))
        if answer is None:
            raise InputError(
                f"message {number}: the chat template does not write the answer behind its own generation prompt, so that it "
                "cannot be told what is to be learnt; use a template that repeats the prompt"
            )
        text, is_prose = answer[-1] if answer else ("", True)
        if is_prose or not text.rstrip().endswith(self._ends):
            raise InputError(
                f"message {number}: the chat template ends the answer without a special token, and the model would never "
                "learn to stop; use a template that writes one (<|im_end|>)"
            )
        # What follows the end token, a line break mostly, is never generated.
        answer[-1] = (text.rstrip(), is_prose)
        return self._encode(prompt), self._encode(answer)

    def _spelled(self, before: list[Mapping[str, Any]], message: Mapping[str, Any]) -> Mapping[str, Any]:
        """The message, with the reasoning and the calls that the template would leave out written into its content."""
        for name, spell in (("tool_calls", _with_calls), ("reasoning_content", _with_reasoning)):
            if not message.get(name):
                continue
            without = {key: value for key, value in message.items() if key != name}
            if self._render([*before, message], False) == self._render([*before, without], False):
                message = spell(without, message[name])
        return message

    def _check_tools(self) -> None:
        question = [{"role": "user", "content": "x"}]
        if self._render(question, True) == self.processor.template.render(question, True):
            raise InputError("the chat template of this model has no place for tools; leave them out or describe them in words")


def shared_length(runs: Sequence[TokenRun], others: Sequence[Sequence[int]] = ()) -> int:
    """How many first tokens all runs, and other ids, have in common; a run's next token is not learnt, since what stands there
    has nobody in its own branch to predict it."""
    first, *rest = (np.asarray(ids) for ids in (*(run.ids for run in runs), *others))
    length = len(first)
    for ids in rest:
        length = min(length, len(ids))
        different = np.flatnonzero(first[:length] != ids[:length])
        length = int(different[0]) if len(different) else length
    while any(length < len(run.ids) and run.is_learnt[length] for run in runs):
        length -= 1
    return length


def joined(trunk: Sequence[Mapping[str, Any]], branch: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], int]:
    """(the conversation of a trunk and a branch, number of the branch's first message in it)."""
    if not trunk[-1]["role"] == branch[0]["role"] == "user":
        return [*trunk, *branch], len(trunk)
    whole = {**trunk[-1], **branch[0], "content": _joined_content(trunk[-1]["content"], branch[0]["content"])}
    return [*trunk[:-1], whole, *branch[1:]], len(trunk) - 1


def _joined_content(first: str | list[dict[str, Any]], then: str) -> str | list[dict[str, Any]]:
    if isinstance(first, str):
        return first + then
    if first[-1]["type"] == "text":
        return [*first[:-1], {**first[-1], "text": first[-1]["text"] + then}]
    return [*first, {"type": "text", "text": then}]


def _says_something(message: Mapping[str, Any]) -> bool:
    content = message["content"]
    return bool(message.get("tool_calls")) or bool(content.strip() if isinstance(content, str) else content)


def _remainder(prompt: Pieces, full: Pieces) -> Pieces | None:
    """What `full` adds behind `prompt`; None where it does not begin with it."""
    if not prompt:
        return full
    *before, (last, is_prose) = prompt
    if len(full) < len(prompt) or full[: len(before)] != before:
        return None
    text, is_prose_there = full[len(before)]
    if is_prose_there != is_prose or not text.startswith(last) or (is_prose and text != last):
        return None
    rest = text[len(last) :]
    return ([(rest, is_prose)] if rest else []) + full[len(prompt) :]


def _with_reasoning(message: Mapping[str, Any], reasoning: str) -> dict[str, Any]:
    return _with_text(message, f"<think>\n{reasoning.strip()}\n</think>\n\n", "")


def _with_calls(message: Mapping[str, Any], calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    written = [
        json.dumps({name: call["function"][name] for name in ("name", "arguments")}, ensure_ascii=False) for call in calls
    ]
    text = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in written)
    return _with_text(message, "", f"\n{text}" if message["content"] else text)


def _with_text(message: Mapping[str, Any], before: str, behind: str) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": before + content + behind}
    parts = [{"type": "text", "text": text} for text in (before, behind)]
    return {**message, "content": [parts[0], *content, parts[1]]}
