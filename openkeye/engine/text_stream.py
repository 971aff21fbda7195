"""Tokens to text as they come: whole characters only, and nothing that a stop string may still turn out to begin."""

from collections.abc import Callable

INCOMPLETE = "\ufffd"
# what a decoder writes for the bytes of a character that is not all there


class TextStream:
    """The text of one answer. The pieces of `push` and `finish` together are the text, and no stop string is in it."""

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...] = ()) -> None:
        """decode: text of token ids; stop: see `SamplingParameters.stop`."""
        self.is_stopped = False
        # a stop string is complete: the text ended before it
        self._decode = decode
        self._stop = stop
        self._pieces: list[str] = []
        self._held = ""
        # whole characters that a stop string may begin with
        self._context: list[int] = []
        # The last tokens whose text is complete. A decoder may write a token differently at the beginning of a text.
        self._new: list[int] = []
        # tokens behind them
        self._num_taken = 0
        # characters of the text of both that were taken from it

    @property
    def text(self) -> str:
        """All pieces so far."""
        return "".join(self._pieces)

    def push(self, token: int) -> str:
        """Take one more token; returns the new text that is certain, which may be none."""
        assert not self.is_stopped
        self._new.append(token)
        decoded = self._decode(self._context + self._new)
        complete = decoded.rstrip(INCOMPLETE)
        taken, self._num_taken = complete[self._num_taken :], max(self._num_taken, len(complete))
        if taken and complete == decoded:
            self._context, self._new = self._new, []
            self._num_taken = len(self._decode(self._context))
        return self._release(taken, is_last=False)

    def finish(self) -> str:
        """The answer is over: what was held back, half a character included."""
        if self.is_stopped:
            return ""
        decoded = self._decode(self._context + self._new)
        taken, self._num_taken = decoded[self._num_taken :], len(decoded)
        return self._release(taken, is_last=True)

    def _release(self, taken: str, is_last: bool) -> str:
        """What of the held and the new text may be told; ends the text where a stop string is complete."""
        held = self._held + taken
        # The first to be complete counts, whatever the cuts between tokens; of two that end together the longer.
        ends = [(held.find(stop) + len(stop), held.find(stop)) for stop in self._stop if stop in held]
        if ends:
            self.is_stopped = True
            size = min(ends)[1]
        else:
            size = len(held) if is_last else len(held) - max((_overlap(held, stop) for stop in self._stop), default=0)
        piece, self._held = held[:size], held[size:]
        self._pieces.append(piece)
        return piece


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that are the beginning of a stop string, at most all but its last."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
