"""Recorded exchanges with a model: a stand-in for tests that says what was said once, and never anything else."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openkeye.agents.model_client import Message, ModelClient, ModelReply
from openkeye.common.checks import InputError


def conversation_key(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
    """A name for what was asked: equal for equal conversations; pictures count by their pixels."""
    text = json.dumps([list(messages), list(tools)], sort_keys=True, ensure_ascii=False, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """What JSON cannot hold: other mappings and sequences, and pictures by their contents."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    pixels = np.ascontiguousarray(value)
    if pixels.dtype == object:
        raise InputError(f"{type(value).__name__} in a conversation: neither plain nor a picture, so it cannot be recorded")
    return [str(pixels.dtype), list(pixels.shape), hashlib.sha256(pixels.tobytes()).hexdigest()]


class RecordedModel:
    """See `ModelClient`: answers from a file of `RecordingModel`. A conversation asked for the nth time gets its nth reply."""

    def __init__(self, path: str | Path, name: str = "") -> None:
        """name: default, the recorded model's.

        Raises:
            InputError: no such file, or a line that is no exchange.
        """
        self._path = Path(path)
        self._replies: dict[str, list[ModelReply]] = defaultdict(list)
        self._num_asked: dict[str, int] = defaultdict(int)
        try:
            lines = self._path.read_text().splitlines()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); give a file of recorded exchanges") from error
        self._name = name
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                reply = record["reply"]
                self._replies[record["key"]].append(
                    ModelReply(**{**reply, "tool_calls": tuple(reply["tool_calls"]), "malformed": tuple(reply["malformed"])})
                )
                self._name = self._name or record["model"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}, line {number}: no recorded exchange ({error}); record it again") from error

    @property
    def name(self) -> str:
        return self._name

    async def reply(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> ModelReply:
        """The recorded reply; InputError where this was never asked, or not so often."""
        key = conversation_key(messages, tools)
        number = self._num_asked[key]
        known = self._replies.get(key, [])
        if number >= len(known):
            asked = str(messages[-1].get("content")) if messages else ""
            raise InputError(
                f"{self._path}: holds {len(known)} replies to {asked[:60]!r}, asked for number {number + 1}; record it again"
            )
        self._num_asked[key] += 1
        return known[number]


class RecordingModel:
    """A model whose exchanges are appended to a file, for `RecordedModel`."""

    def __init__(self, model: ModelClient, path: str | Path) -> None:
        self._model = model
        self._path = Path(path)

    @property
    def name(self) -> str:
        return self._model.name

    async def reply(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> ModelReply:
        """See `ModelClient.reply`."""
        reply = await self._model.reply(messages, tools)
        record = {
            "model": self.name,
            "key": conversation_key(messages, tools),
            "messages": [str(message.get("content"))[:2000] for message in messages],
            # (for people; the key alone counts)
            "reply": {
                "text": reply.text,
                "reasoning": reply.reasoning,
                "tool_calls": [dict(call) for call in reply.tool_calls],
                "finish_reason": reply.finish_reason,
                "malformed": list(reply.malformed),
            },
        }
        with self._path.open("a") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        return reply
