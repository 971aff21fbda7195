"""Repetition: where an answer begins to repeat itself, and how much of it does.

Letters: T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from openkeye.common.checks import InputError
from openkeye.tasks.rewards.reading import bounded, whole_text
from openkeye.tasks.task import Example, Response


@dataclass(frozen=True)
class Granularity:
    """Loops whose turn is of this many tokens."""

    min_period: int
    max_period: int
    num_repeats: int
    # whole turns behind the first one that make it a loop
    min_repeated: int
    # tokens that must be repeated besides: short turns, such as the digits of a number, come twice by right

    def __post_init__(self) -> None:
        if not 0 < self.min_period <= self.max_period or self.num_repeats < 1:
            raise InputError(
                f"loops of {self.min_period} to {self.max_period} tokens, {self.num_repeats} repeats; give 1 or more, ascending"
            )


GRANULARITIES = (
    Granularity(1, 4, 6, 16),  # tokens
    Granularity(5, 32, 3, 24),  # phrases
    Granularity(33, 128, 2, 80),  # sentences
    Granularity(129, 1024, 1, 258),  # passages
)


def loop_onset(ids_T: np.ndarray, granularity: Granularity) -> int | None:
    """The first token of the second turn of the earliest exact loop of this granularity; None where there is none."""
    onset: int | None = None
    for period in range(granularity.min_period, min(granularity.max_period, len(ids_T) - 1) + 1):
        needed = max(granularity.num_repeats * period, granularity.min_repeated)
        if len(ids_T) - period < needed:
            continue
        # Places that hold what stood a turn before; a run of enough of them is a loop.
        differs = np.flatnonzero(ids_T[period:] != ids_T[:-period])
        edges = np.concatenate([[-1], differs, [len(ids_T) - period]])
        runs = np.flatnonzero(np.diff(edges) - 1 >= needed)
        if len(runs):
            start = int(edges[runs[0]]) + 1 + period
            onset = start if onset is None else min(onset, start)
    return onset


def saturation_onset(ids_T: np.ndarray, n: int = 6, window: int = 256, share: float = 0.8) -> int | None:
    """Where almost every n-gram has been said before, though in no exact loop: the first repeated n-gram of the first `window`
    of which `share` are repeats; None where there is none."""
    if len(ids_T) < n + window:
        return None
    grams = np.lib.stride_tricks.sliding_window_view(ids_T, n)
    _, first, back = np.unique(grams, axis=0, return_index=True, return_inverse=True)
    is_repeat = first[back.reshape(-1)] < np.arange(len(grams))
    sums = np.concatenate([[0], np.cumsum(is_repeat)])
    full = np.flatnonzero(sums[window:] - sums[:-window] >= share * window)
    if not len(full):
        return None
    return int(full[0]) + int(np.argmax(is_repeat[full[0] :]))


def repetition_onset(ids: Sequence[int] | np.ndarray, granularities: Sequence[Granularity] = GRANULARITIES) -> int | None:
    """The token from which an answer repeats itself (report, 5.8: tau), the earliest of all granularities; None where it
    does not.

    Loops of tokens, phrases, sentences and passages are exact; a last pass finds text whose n-grams are nearly all repeats.
    The first turn of a loop is not repetition: the onset is where the second begins.
    """
    ids_T = np.asarray(ids).reshape(-1)
    found = [loop_onset(ids_T, granularity) for granularity in granularities] + [saturation_onset(ids_T)]
    return min((onset for onset in found if onset is not None), default=None)


def repeated_share(words: Sequence[object], n: int) -> float:
    """Share of the n-grams that were said before; 0 where there are too few words."""
    grams = list(zip(*(words[start:] for start in range(n)), strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class RepetitionPenalty:
    """0 while at most `allowed_share` of the answer's n-grams (of words) are repeats, then linear down to -1."""

    n: int = 4
    allowed_share: float = 0.2
    name: str = "repetition"

    def __post_init__(self) -> None:
        if self.n < 1 or not 0.0 <= self.allowed_share < 1.0:
            raise InputError(
                f"repetition: n is {self.n}, allowed_share {self.allowed_share}; give 1 or more, and a share from 0 to below 1"
            )

    async def __call__(self, example: Example, response: Response) -> Mapping[str, float]:
        share = repeated_share(bounded(whole_text(response)).split(), self.n)
        return {self.name: -max(0.0, share - self.allowed_share) / (1.0 - self.allowed_share)}
