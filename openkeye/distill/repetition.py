"""Where a response begins to repeat itself: the first token that says again what stands right before it.

Letters: T tokens.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from openkeye.common.checks import InputError

SENTENCE = re.compile(r"[^.!?\n]+[.!?\n]*")
GRANULARITIES = ("token", "ngram", "sentence")


@dataclass(frozen=True)
class RepetitionConfig:
    """What counts as repetition, at three granularities; 0 copies switch one off."""

    penalty: float = 0.5
    # taken off the advantage from the onset on (report, MOPD: lambda); 0: none
    num_token_copies: int = 16
    # of one token in a row
    num_ngram_copies: int = 4
    # of a block of tokens in a row
    least_ngram_tokens: int = 32
    # that such copies have to cover together, so that a short list is none
    longest_ngram: int = 512
    num_sentence_copies: int = 4
    # of a sentence anywhere
    least_sentence_characters: int = 20
    # of one that counts

    def __post_init__(self) -> None:
        """Raises InputError for numbers under which anything would be a repetition."""
        for name in ("num_token_copies", "num_ngram_copies", "num_sentence_copies"):
            if getattr(self, name) != 0 and getattr(self, name) < 2:
                raise InputError(f"repetition: {name} is {getattr(self, name)}; give 0, or at least 2")
        if self.longest_ngram < 2:
            raise InputError(f"repetition: longest_ngram is {self.longest_ngram}; give at least 2")
        if not 0 <= self.penalty < np.inf:
            raise InputError(f"repetition: penalty is {self.penalty}; give a number from 0 on")


@dataclass(frozen=True)
class Repetition:
    """Where it begins, and of what."""

    onset: int
    # the first token of the second copy
    granularity: str
    # of GRANULARITIES
    num_copies: int


def find_repetition(
    ids_T: np.ndarray, config: RepetitionConfig, text: str = "", spans: np.ndarray | None = None
) -> Repetition | None:
    """The earliest repetition of a response; None where there is none.

    Args:
        ids_T: its tokens.
        config: what counts.
        text: what they say, for sentences.
        spans: [T, 2] of characters (`token_categories.token_spans`).
    """
    found = [*_blocks(np.asarray(ids_T), config)]
    if spans is not None and config.num_sentence_copies:
        found += _sentences(text, spans, config)
    return min(found, key=lambda one: (one.onset, GRANULARITIES.index(one.granularity)), default=None)


def _blocks(ids_T: np.ndarray, config: RepetitionConfig) -> list[Repetition]:
    """Blocks of every length that stand several times in a row, the first of each length."""
    found = []
    if config.num_token_copies and (run := _first_run(ids_T, 1, config.num_token_copies)):
        found.append(Repetition(run[0] + 1, "token", run[1]))
    copies = config.num_ngram_copies
    if copies:
        for length in range(2, min(config.longest_ngram, len(ids_T) // copies) + 1):
            needed = max(copies, -(-config.least_ngram_tokens // length))
            run = _first_run(ids_T, length, needed)
            # Of one token alone it is the other granularity's affair.
            if run and (ids_T[run[0] : run[0] + length] != ids_T[run[0]]).any():
                found.append(Repetition(run[0] + length, "ngram", run[1]))
    return found


def _first_run(ids_T: np.ndarray, length: int, num_copies: int) -> tuple[int, int] | None:
    """(first token of the first copy, copies) of the first block of `length` tokens that stands `num_copies` times in a row."""
    is_again = np.concatenate([[False], ids_T[length:] == ids_T[:-length], [False]])
    edges = np.flatnonzero(is_again[1:] != is_again[:-1])
    starts, ends = edges[::2], edges[1::2]
    long = np.flatnonzero(ends - starts >= (num_copies - 1) * length)
    if not len(long):
        return None
    start, end = int(starts[long[0]]), int(ends[long[0]])
    return start, 1 + (end - start) // length


def _sentences(text: str, spans: np.ndarray, config: RepetitionConfig) -> list[Repetition]:
    """Sentences, but for case and space, that stand several times, not always in a row."""
    places: dict[str, list[int]] = defaultdict(list)
    for match in SENTENCE.finditer(text):
        plain = " ".join(match[0].lower().split())
        if len(plain) >= config.least_sentence_characters:
            places[plain].append(match.start() + len(match[0]) - len(match[0].lstrip()))
    often = [starts for starts in places.values() if len(starts) >= config.num_sentence_copies]
    # The first token that holds the beginning of the second copy.
    return [Repetition(int(np.searchsorted(spans[:, 1], starts[1], side="right")), "sentence", len(starts)) for starts in often]


def count_by_granularity(found: Sequence[Repetition | None]) -> dict[str, int]:
    """How many responses repeat themselves in which way first."""
    return {name: sum(one is not None and one.granularity == name for one in found) for name in GRANULARITIES}
