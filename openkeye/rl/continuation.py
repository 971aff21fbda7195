"""What a chat template writes between the end of a model's turn and the beginning of its next one, as ids.

The model's own ids stay what they are: the conversation is rendered with a mark in the place of what it said, and the text
behind the mark's turn is taken.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from openkeye.agents.model_client import Message, ModelReply
from openkeye.common.checks import InputError
from openkeye.inputs.messages import split_messages
from openkeye.inputs.processor import Processor

MARK = "\ue002answer\ue002"
# Private-use characters, which no prose holds.


class Continuation:
    """Renders the seams of one conversation."""

    def __init__(self, processor: Processor, stop_ids: frozenset[int], tools: Sequence[Mapping[str, Any]] = ()) -> None:
        """stop_ids: the tokens that end a turn.

        Raises:
            InputError: tools, and a template that has no place for them.
        """
        self._processor = processor
        self._stop_ids = stop_ids
        self._options = {"tools": list(tools)} if tools else {}
        if tools:
            question = [{"role": "user", "content": "x"}]
            if processor.template.render(question, True, **self._options) == processor.template.render(question, True):
                raise InputError("the chat template of this model has no place for tools; describe them in the messages")

    def ids_behind(self, before: Sequence[Message], reply: ModelReply, observed: Sequence[Message]) -> list[int]:
        """Ids from behind the token that ended the model's turn up to where its next turn begins.

        Args:
            before: the conversation before the turn.
            reply: the turn, of which only the tool calls matter here: templates may look them up.
            observed: what follows it: results of tools, a user's next turn.

        Raises:
            InputError: pictures or videos behind the opening, or a template that writes no end behind an answer.
        """
        plain, media = split_messages(list(observed))
        if media:
            raise InputError("an observation holds a picture or a video; put all of them into the opening messages")
        opening, _ = split_messages([*before, {**reply.message(), "content": MARK}])
        pieces = self._processor.template.render([*opening, *plain], True, **self._options)
        return [
            token
            for text, is_prose in self._behind_mark(pieces)
            for token in (self._processor.encode_text(text) if is_prose else self._processor.tokenizer.encode_template(text))
        ]

    def _behind_mark(self, pieces: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
        """The pieces behind the first end token behind the mark."""
        is_marked = False
        for number, (text, is_prose) in enumerate(pieces):
            start = 0
            if not is_marked and MARK in text:
                is_marked, start = True, text.index(MARK) + len(MARK)
            if not is_marked or is_prose:
                continue
            ends = [place + len(end) for end in self._end_texts if (place := text.find(end, start)) >= 0]
            if ends:
                rest = text[min(ends) :]
                return [*([(rest, False)] if rest else []), *pieces[number + 1 :]]
        raise InputError(
            "the chat template writes no end token behind an answer, so that it cannot be told where a turn ends; use a "
            "template that writes one (<|im_end|>)"
        )

    @cached_property
    def _end_texts(self) -> list[str]:
        return [self._processor.decode([token], skip_special_tokens=False) for token in sorted(self._stop_ids)]
