"""Answers in the shape of the OpenAI API, whole and in chunks."""

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from openkeye import __version__
from openkeye.engine.events import FinishEvent, TokenEvent
from openkeye.inputs.answer_parser import Piece

LOWEST_LOGPROB = -9999.0
# what the API writes for impossible tokens: JSON knows no infinity

FINGERPRINT = f"openkeye-{__version__}"

DecodeToken = Callable[[int], str]


@dataclass
class ChatResponse:
    """Names of one answer, and how its parts are written."""

    model: str
    decode_token: DecodeToken
    response_id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    num_calls: int = 0
    # tool calls so far

    def whole(self, pieces: list[Piece], tokens: list[TokenEvent] | None, finish: FinishEvent) -> dict[str, Any]:
        """The body of an answer that is not streamed. `tokens`: where logprobs were asked for."""
        said = "".join(piece.text for piece in pieces if piece.kind == "content")
        thought = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
        calls = [self._call(piece) for piece in pieces if piece.kind == "tool_call"]
        message: dict[str, Any] = {"role": "assistant", "content": said if said or not calls else None, "refusal": None}
        if thought:
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = [{key: value for key, value in call.items() if key != "index"} for call in calls]
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None if tokens is None else self._logprobs(tokens),
            "finish_reason": self._finish_reason(finish),
        }
        return self._head("chat.completion") | {"choices": [choice], "usage": usage(finish)} | details(finish)

    def role_chunk(self) -> dict[str, Any]:
        """The first chunk: who speaks."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece_chunks(self, pieces: list[Piece], tokens: list[TokenEvent] | None) -> list[dict[str, Any]]:
        """Chunks of new pieces; the logprobs of the tokens that brought them stand in the first."""
        chunks = [self._chunk(self._delta(piece)) for piece in pieces]
        if tokens:
            chunks = chunks or [self._chunk({"content": ""})]
            chunks[0]["choices"][0]["logprobs"] = self._logprobs(tokens)
        return chunks

    def finish_chunk(self, finish: FinishEvent) -> dict[str, Any]:
        """The last chunk of the choice."""
        return self._chunk({}, self._finish_reason(finish)) | details(finish)

    def usage_chunk(self, finish: FinishEvent) -> dict[str, Any]:
        """The chunk behind it, where `stream_options.include_usage` asks for it."""
        return self._head("chat.completion.chunk") | {"choices": [], "usage": usage(finish)}

    def _head(self, kind: str) -> dict[str, Any]:
        names = {"id": self.response_id, "object": kind, "created": self.created, "model": self.model}
        return names | {"system_fingerprint": FINGERPRINT}

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        if piece.kind == "tool_call":
            return {"tool_calls": [self._call(piece)]}
        return {"content" if piece.kind == "content" else "reasoning_content": piece.text}

    def _call(self, piece: Piece) -> dict[str, Any]:
        self.num_calls += 1
        function = {"name": piece.name, "arguments": piece.text}
        return {"index": self.num_calls - 1, "id": piece.call_id, "type": "function", "function": function}

    def _finish_reason(self, finish: FinishEvent) -> str:
        if finish.finish_reason == "stop" and self.num_calls:
            return "tool_calls"
        # The API has no word for a deadline; `openkeye.finish_reason` says it.
        return "stop" if finish.finish_reason == "stop" else "length"

    def _logprobs(self, tokens: list[TokenEvent]) -> dict[str, Any]:
        return {"content": [self._token_logprobs(token) for token in tokens], "refusal": None}

    def _token_logprobs(self, token: TokenEvent) -> dict[str, Any]:
        assert token.logprob is not None
        top = [self._logprob(token_id, logprob) for token_id, logprob in token.top_logprobs]
        return self._logprob(token.token_id, token.logprob) | {"top_logprobs": top}

    def _logprob(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self.decode_token(token_id)
        # A token may be part of a character; which bytes it has, its text does not say then.
        num_bytes = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": num_bytes}


def usage(finish: FinishEvent) -> dict[str, Any]:
    """Counts of tokens."""
    return {
        "prompt_tokens": finish.num_prompt_tokens,
        "completion_tokens": finish.num_output_tokens,
        "total_tokens": finish.num_prompt_tokens + finish.num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": finish.num_cached_tokens},
    }


def details(finish: FinishEvent) -> dict[str, Any]:
    """What only we tell: times in the answer as intervals, frames looked at, notes about the video, evidence if asked for."""
    answer = finish.answer.to_dict()
    names = ("intervals_seconds", "num_frames", "frame_spacing_seconds", "stage_seconds", "notes")
    ours = {"openkeye": {name: answer[name] for name in names} | {"finish_reason": finish.finish_reason}}
    return ours if answer["evidence"] is None else ours | {"evidence": answer["evidence"]}
