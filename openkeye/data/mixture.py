"""Which sample comes next in a lane: a pure function of seed, stage, lane and what the lane has drawn so far.

Lanes are the packs of a step, numbered over all ranks. Each draws by itself and reads its own part of every source, so the
samples of a step are the same however many ranks share the lanes.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate

from openkeye.common.checks import InputError
from openkeye.data.config import Share

NUM_ROUNDS = 6
# of the Feistel network in `permuted`


@dataclass(frozen=True)
class Draw:
    """One sample of one source."""

    source: str
    index: int

    @property
    def name(self) -> str:
        return f"{self.source}, sample {self.index}"


class Mixture:
    """Draws sources by weight, and walks through each in a shuffled order, epoch after epoch."""

    def __init__(self, shares: Sequence[Share], sizes: Mapping[str, int | None], seed: int, stage: str, num_lanes: int) -> None:
        """
        Args:
            shares: weights count samples, not tokens.
            sizes: number of samples of every source; None without end.
            seed: of the run.
            stage: its name; another one draws and shuffles differently.
            num_lanes: of all ranks together.

        Raises:
            InputError: a share names no source, or twice the same; a source is empty; weights sum to zero.
        """
        self._shares = tuple(shares)
        self._sizes = dict(sizes)
        self._key = (seed, stage)
        self._num_lanes = num_lanes
        names = [share.source for share in shares]
        if unknown := [name for name in names if name not in sizes]:
            raise InputError(f"the mixture names {', '.join(unknown)}, but the sources are {', '.join(sizes) or 'none'}")
        if twice := {name for name in names if names.count(name) > 1}:
            raise InputError(f"the mixture names {', '.join(sorted(twice))} more than once: give each source one share")
        for when, progress in (("beginning", 0.0), ("end", 1.0)):
            # (weights are linear: between two positive sums is none of zero)
            if not sum(share.at(progress) for share in shares):
                raise InputError(
                    f"the mixture's weights sum to zero at the stage's {when}: give a source a weight above 0 there"
                )
        for share in shares:
            if sizes[share.source] == 0 and (share.at(0.0) or share.at(1.0)):
                raise InputError(f"source {share.source!r} has no samples: check its path, or leave it out of the mixture")

    def draw(self, lane: int, counts: Mapping[str, int], progress: float) -> Draw:
        """The next sample of a lane that has drawn so many of each source.

        Finite sources: the lanes together see every sample once in an epoch, in an order shuffled anew for each, and no two
        lanes the same one. Sources without end: lane 0 takes samples 0, N, 2N, ... of N lanes, lane 1 takes 1, N + 1, ...

        Args:
            lane: 0-based, of all ranks.
            counts: samples drawn so far by source; a missing one counts as 0.
            progress: through the stage, 0 to 1, for the weights.
        """
        source = self._source(lane, sum(counts.values()), progress)
        ordinal = counts.get(source, 0) * self._num_lanes + lane
        size = self._sizes[source]
        if size is None:
            return Draw(source, ordinal)
        epoch, place = divmod(ordinal, size)
        return Draw(source, permuted(place, size, keyed("order", *self._key, source, epoch)))

    def _source(self, lane: int, position: int, progress: float) -> str:
        weights = [(share.source, weight) for share in self._shares if (weight := share.at(progress)) > 0]
        sums = list(accumulate(weight for _, weight in weights))
        chance = (keyed("source", *self._key, lane, position) >> 11) / 2**53
        return weights[bisect_right(sums, chance * sums[-1], 0, len(sums) - 1)][0]


def keyed(*parts: int | str) -> int:
    """64 bits that look random, the same on every machine for the same parts."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permuted(place: int, size: int, key: int) -> int:
    """Where a shuffle of 0..size-1, named by its key, sends a place. No list of that size is made.

    A Feistel network permutes the next power of four; whoever lands outside walks on until inside, at most a few times.
    """
    assert 0 <= place < size
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = place >> half_bits, place & mask
        for number in range(NUM_ROUNDS):
            left, right = right, left ^ (keyed(key, number, right) & mask)
        place = left << half_bits | right
        if place < size:
            return place
