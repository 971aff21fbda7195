"""Which example a group asks: a pure function of the seed and the group's number."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from itertools import accumulate

from openkeye.common.checks import InputError
from openkeye.data.mixture import keyed, permuted


class DataOrder:
    """Tasks drawn by weight, mixed at every moment; each is walked through in an order that is shuffled anew for each epoch."""

    def __init__(self, weights: Mapping[str, float], sizes: Mapping[str, int | None], seed: int) -> None:
        """
        Args:
            weights: by task, counting groups; a weight of 0 leaves a task out.
            sizes: examples of every task, None for one without end.
            seed: of the run.

        Raises:
            InputError: a task that is not known or holds no examples.
        """
        if unknown := [name for name in weights if name not in sizes]:
            raise InputError(f"tasks names {', '.join(unknown)}, but the tasks are {', '.join(sizes) or 'none'}")
        self._names = sorted(name for name, weight in weights.items() if weight > 0)
        if not self._names:
            raise InputError("the weights of tasks sum to zero; give at least one task a weight above 0")
        if empty := [name for name in self._names if sizes[name] == 0]:
            raise InputError(f"task {empty[0]!r} holds no examples; check its options, or give it the weight 0")
        self._sums = list(accumulate(weights[name] for name in self._names))
        self._sizes, self._seed = sizes, seed
        self._drawn: list[tuple[str, int]] = []
        self._counts: Counter[str] = Counter()

    def example(self, group: int) -> tuple[str, int]:
        """(task, number of the example) of a group."""
        while len(self._drawn) <= group:
            name = self._task(len(self._drawn))
            self._drawn.append((name, self._counts[name]))
            self._counts[name] += 1
        name, ordinal = self._drawn[group]
        size = self._sizes[name]
        if size is None:
            return name, ordinal
        epoch, place = divmod(ordinal, size)
        return name, permuted(place, size, keyed("rollouts", self._seed, name, epoch))

    def _task(self, group: int) -> str:
        chance = (keyed("task", self._seed, group) >> 11) / 2**53
        return self._names[bisect_right(self._sums, chance * self._sums[-1], 0, len(self._sums) - 1)]
