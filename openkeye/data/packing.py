"""Which documents share a pack: full packs of like cost, and nobody waits for ever.

A pack costs what attention makes of its documents: one of 64K tokens is far dearer than 64 of 1K. Lanes of one step wait for
the dearest, so packs are filled up to a budget of cost first, and only then to the last token.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WEIGHTS_COST = 6.0e9
# FLOP of a token in the products with 3.0e9 active weights, forward
PAIR_COST = 4 * 32 * 128 * 48 / WEIGHTS_COST
# of a query and a key that it sees: two products, 32 heads of 128, 48 layers
INDEX_PAIR_COST = 2 * 4 * 128 * 48 / WEIGHTS_COST
# of a query and a key that the indexer scores: one product, 4 heads of 128, 48 layers


@dataclass(frozen=True)
class DocumentCost:
    """Work of a document of L tokens, in units of one token's products with the weights; a model of 30B, 3B active.

    Dense `L + b L^2`; with a top k `L + 2 b sum over t = 1..L of min(t, k) + c L^2 / 2` (b: half a pair, for half of all pairs
    are causal; c: a scored pair). Other shapes have other shares of attention; costs only balance packs.
    """

    top_k: int | None = None
    # None: dense
    pair: float = PAIR_COST
    index_pair: float = INDEX_PAIR_COST

    def __call__(self, num_tokens: int) -> float:
        """Rises with the number of tokens."""
        if self.top_k is None:
            return num_tokens + self.pair / 2 * num_tokens**2
        rising = min(num_tokens, self.top_k)
        num_pairs = rising * (rising + 1) / 2 + (num_tokens - rising) * self.top_k
        return num_tokens + self.pair * num_pairs + self.index_pair * num_tokens**2 / 2


def fill_pack(lengths: Sequence[int], capacity: int, cost: Callable[[int], float] | None = None) -> list[int]:
    """The documents of the next pack out of those that wait.

    The oldest is always among them. The rest is best fit: again and again the longest that fits, as long as the pack costs no
    more than a full pack of average documents does; then the shortest. At the end no waiting document fits any more.

    Args:
        lengths: tokens of each waiting document, the oldest first.
        capacity: the most tokens of a pack.
        cost: of a document by its tokens, rising with them; None: tokens are all that counts.

    Returns:
        Numbers of documents, rising.

    Raises:
        ValueError: nothing waits, or a document is longer than a pack.
    """
    if not lengths or max(lengths) > capacity:
        raise ValueError(f"a pack of {capacity} tokens needs documents of at most that length, got {list(lengths)[:20]}")
    costs = [0.0 if cost is None else cost(length) for length in lengths]
    room = capacity - lengths[0]
    budget = sum(costs) / sum(lengths) * capacity - costs[0]
    order = sorted(range(1, len(lengths)), key=lambda number: (lengths[number], -number))
    sorted_lengths = [lengths[number] for number in order]
    sorted_costs = [costs[number] for number in order]
    chosen = [0]
    while num_fitting := bisect_right(sorted_lengths, room):
        num_cheap = bisect_right(sorted_costs, budget)
        # (of equal ones the last is the oldest)
        place = min(num_fitting, num_cheap or bisect_right(sorted_lengths, sorted_lengths[0])) - 1
        chosen.append(order.pop(place))
        room -= sorted_lengths.pop(place)
        budget -= sorted_costs.pop(place)
    return sorted(chosen)


def best_fit(lengths: Sequence[int], capacity: int, cost: Callable[[int], float] | None = None) -> list[list[int]]:
    """All documents in packs, each by `fill_pack` from those that are left.

    Never more packs than 1.7 times the fewest possible: first fit, given the documents pack by pack, makes these very packs
    (a document of a later pack fits no earlier one), and that is its bound (Dosa and Sgall, 2013).

    Returns:
        Packs in order, each with the numbers of its documents, rising.
    """
    waiting = list(range(len(lengths)))
    packs = []
    while waiting:
        chosen = fill_pack([lengths[number] for number in waiting], capacity, cost)
        packs.append([waiting[place] for place in chosen])
        taken = set(chosen)
        waiting = [number for place, number in enumerate(waiting) if place not in taken]
    return packs
