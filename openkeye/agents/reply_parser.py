"""From a model's text to a `ModelReply`: what it says, what it thinks, which tools it calls, what of that cannot be read."""

import json
from typing import Any

from openkeye.agents.model_client import ModelReply
from openkeye.inputs.answer_parser import CALL, AnswerParser


def parse_reply(text: str, finish_reason: str = "stop", first_call: int = 0) -> ModelReply:
    """A whole answer taken apart, as the server takes it apart.

    Calls are named call_0, call_1, ... from `first_call` on, so that the same text gives the same reply. What looks like a call
    and is none (no JSON, no name, arguments that are no object, a call that is never closed) is in `malformed`.

    Args:
        text: without the token that ends the turn.
        finish_reason: "stop" or "length"; "stop" becomes "tool_calls" where a tool is called.
    """
    parser = AnswerParser()
    said, thought, malformed = [], [], []
    calls: list[dict[str, Any]] = []
    for piece in [*parser.feed(text), *parser.finish()]:
        if piece.kind == "reasoning":
            thought.append(piece.text)
        elif piece.kind == "tool_call":
            arguments = _arguments(piece.text)
            if arguments is None:
                malformed.append(f"{piece.name}: {piece.text}")
            else:
                calls.append({"id": f"call_{first_call + len(calls)}", "name": piece.name, "arguments": arguments})
        else:
            # Text begins so only where a call could not be read.
            if piece.text.startswith(CALL):
                malformed.append(piece.text)
            said.append(piece.text)
    reason = "tool_calls" if calls and finish_reason == "stop" else finish_reason
    return ModelReply("".join(said), "".join(thought), tuple(calls), reason, tuple(malformed))


def _arguments(text: str) -> dict[str, Any] | None:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return arguments if isinstance(arguments, dict) else None
