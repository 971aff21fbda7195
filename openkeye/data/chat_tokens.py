"""Documents written token by token: what `inputs.encode` makes of a chat, without rendering its template for every document.

Letters: L tokens of a document.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openkeye.common.checks import InputError
from openkeye.data.document import Document, Pictures
from openkeye.inputs.processor import Processor

MARKS = ("ONE", "TWO", "THREE", "FOUR", "FIVE")
# texts that stand for anybody's in a chat by which the template is learnt


class ChatTokens:
    """What a checkpoint's chat template writes around texts, pictures and answers, as token ids.

    Texts are encoded by themselves, which is what the tokenizer makes of the whole chat wherever a text touches special tokens
    or line ends, and neither begins nor ends with white space.
    """

    def __init__(self, processor: Processor) -> None:
        """Raises InputError for a template that writes no turns one after the other."""
        self.processor = processor
        one, two, three, four, five = MARKS
        image, video = "<|image_pad|>", "<|video_pad|>"
        texts = {mark: {"type": "text", "text": mark} for mark in MARKS}
        chat: list[dict[str, Any]] = [
            {"role": "user", "content": [texts[one], {"type": "image"}, texts[two], {"type": "video"}, texts[three]]},
            {"role": "assistant", "content": four},
            {"role": "user", "content": [texts[five]]},
        ]
        written = "".join(piece for piece, _ in processor.template.render(chat, True))
        pieces = []
        for mark in (one, image, two, video, three, four, five):
            piece, found, written = written.partition(mark)
            if not found:
                raise InputError(f"{processor.model_dir}: its chat template does not write {mark!r}; use a multimodal template")
            pieces.append(processor.tokenizer.encode_template(piece))
        closing = processor.tokenizer.encode_template(written)
        self.opening, self.image_start, self.image_end, self.video_start, self.video_end, self.to_answer, self.to_next = pieces
        if closing != self.to_answer or not self.to_next:
            raise InputError(f"{processor.model_dir}: its chat template closes a later turn otherwise than the first one")
        self.encode = lru_cache(maxsize=200_000)(processor.encode_text)
        self.encode_frame_text = lru_cache(maxsize=20_000)(processor.tokenizer.encode_template)

    @property
    def end_of_answer(self) -> int:
        """The token that ends an answer, which is learnt with it."""
        return self.to_next[0]


class DocumentWriter:
    """One document under way: call its methods in the order of the chat, then `finish`."""

    def __init__(self, tokens: ChatTokens) -> None:
        self.tokens = tokens
        self._ids: list[int] = list(tokens.opening)
        self._learnt: list[tuple[int, int]] = []
        # spans of tokens
        self._media: list[tuple[int, int, int]] = []
        # first token, rows, columns of merged cells of every picture
        self._pictures: list[Pictures] = []
        self._branches: list[int] = []

    def text(self, words: str) -> None:
        """A user's words."""
        self._ids += self.tokens.encode(words)

    def image(self, pictures: Pictures, rows: int, columns: int) -> None:
        """A still image of so many merged cells."""
        self._ids += self.tokens.image_start
        self._pads(self.tokens.processor.image_token_id, rows, columns)
        self._pictures.append(pictures)
        self._ids += self.tokens.image_end

    def video(self, pictures: Pictures, times_seconds: Iterable[float], rows: int, columns: int) -> None:
        """A video whose frames are shown at the given times, all of one size."""
        self._ids += self.tokens.video_start
        frame_text = self.tokens.processor.frame_text
        for seconds in times_seconds:
            self._ids += self.tokens.encode_frame_text(frame_text.format(seconds=float(seconds)))
            self._pads(self.tokens.processor.video_token_id, rows, columns)
        self._pictures.append(pictures)
        self._ids += self.tokens.video_end

    def _pads(self, token: int, rows: int, columns: int) -> None:
        self._media.append((len(self._ids), rows, columns))
        self._ids += [token] * (rows * columns)

    def branch(self, question: str, answer: str) -> None:
        """A question about the trunk with its answer, which is learnt up to and with the end of the turn."""
        self._branches.append(len(self._ids))
        self.text(question)
        self.answer(answer)

    def answer(self, words: str) -> None:
        """The assistant's words, which are learnt up to and with the end of the turn."""
        self._ids += self.tokens.to_answer
        start = len(self._ids)
        self._ids += [*self.tokens.encode(words), self.tokens.end_of_answer]
        self._learnt.append((start, len(self._ids)))

    def next_turn(self) -> None:
        """From an answer to the user's next message."""
        self._ids += self.tokens.to_next[1:]

    def finish(self, name: str, task: str) -> Document:
        """The document."""
        length = len(self._ids)
        is_learnt = torch.zeros(length, dtype=torch.bool)
        for start, end in self._learnt:
            is_learnt[start:end] = True
        positions, is_media = _positions(length, self._media, self._branches)
        return Document(
            name,
            torch.tensor(self._ids),
            positions,
            is_learnt,
            is_media,
            tuple(self._pictures),
            tuple(self._branches),
            task,
        )


def _positions(length: int, media: Sequence[tuple[int, int, int]], branches: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Positions [3, L] as `inputs.positions` gives them, every branch going on from the trunk's end; and the pads [L]."""
    step = np.ones(length, np.int64)
    offsets = np.zeros((3, length), np.int64)
    is_media = np.zeros(length, bool)
    for rows, columns in sorted({(rows, columns) for _, rows, columns in media}):
        firsts = np.array([first for first, *size in media if size == [rows, columns]])
        pads = firsts[:, None] + np.arange(rows * columns)
        is_media[pads] = True
        # All pads of a picture stand at its beginning, and the picture takes as much room as its longer side.
        step[pads] = 0
        step[pads[:, -1]] = max(rows, columns)
        offsets[1, pads] = np.arange(rows * columns) // columns
        offsets[2, pads] = np.arange(rows * columns) % columns
    begins = np.cumsum(step) - step
    trunk_end = branches[0] if branches else length
    next_position = int(step[:trunk_end].sum())
    for start, end in pairwise((*branches, length)):
        begins[start:end] = next_position + np.arange(end - start)
    return torch.from_numpy(begins + offsets), torch.from_numpy(is_media)
