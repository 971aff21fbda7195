"""Packs: full, in the order of waiting, never far from the fewest possible, and of like cost."""

import random
import statistics
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openkeye.data.lane import LOOKAHEAD_PACKS
from openkeye.data.packing import DocumentCost, best_fit, fill_pack

COSTS = [None, DocumentCost(), DocumentCost(top_k=8, pair=0.5, index_pair=0.2)]
lengths_and_capacity = st.integers(1, 60).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), min_size=1, max_size=40), st.just(capacity))
)


def fewest_packs(lengths: list[int], capacity: int) -> int:
    """By trying everything."""
    best = len(lengths)

    def place(number: int, rooms: list[int]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if number == len(lengths):
            best = len(rooms)
            return
        for pack in range(len(rooms)):
            if rooms[pack] >= lengths[number] and rooms[pack] not in rooms[:pack]:
                place(number + 1, [room - lengths[number] * (pack == at) for at, room in enumerate(rooms)])
        place(number + 1, [*rooms, capacity - lengths[number]])

    place(0, [])
    return best


def test_brute_force_knows_the_optimum():
    assert fewest_packs([5, 5, 4, 4, 3, 3], 12) == 2
    assert fewest_packs([7, 7, 7], 12) == 3
    assert fewest_packs([6, 6, 6], 12) == 2


@given(lengths_and_capacity, st.sampled_from(COSTS))
@settings(max_examples=150, deadline=None)
def test_packs_hold_everything_once_and_no_more_than_they_can(case, cost):
    lengths, capacity = case
    packs = best_fit(lengths, capacity, cost)
    assert sorted(number for pack in packs for number in pack) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in pack) <= capacity for pack in packs)
    assert all(pack == sorted(pack) for pack in packs)


@given(lengths_and_capacity, st.sampled_from(COSTS))
@settings(max_examples=150, deadline=None)
def test_the_oldest_goes_first_and_nothing_that_fits_is_left(case, cost):
    lengths, capacity = case
    waiting = set(range(len(lengths)))
    for pack in best_fit(lengths, capacity, cost):
        assert min(waiting) in pack
        waiting -= set(pack)
        room = capacity - sum(lengths[number] for number in pack)
        assert all(lengths[number] > room for number in waiting)


@given(
    st.integers(2, 30).flatmap(lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=8), st.just(capacity))),
    st.sampled_from(COSTS),
)
@settings(max_examples=150, deadline=None)
def test_packs_are_at_most_1_7_times_the_fewest(case, cost):
    lengths, capacity = case
    assert len(best_fit(lengths, capacity, cost)) <= int(1.7 * fewest_packs(lengths, capacity))


def test_the_longest_that_fits_fills_and_of_equal_ones_the_oldest():
    assert fill_pack([4, 7, 3, 6, 3, 6], 10) == [0, 3]
    assert fill_pack([4, 7, 3, 5, 3], 10) == [0, 3]
    assert fill_pack([2, 3, 3, 3, 3], 8) == [0, 1, 2]


def test_above_the_budget_of_cost_the_shortest_fill():
    # By squares these 32 tokens cost 336, so 24 tokens are to cost 252, and the first alone costs 256.
    lengths = [16, 8, 2, 2, 2, 2]
    assert fill_pack(lengths, 24) == [0, 1]
    assert fill_pack(lengths, 24, cost=lambda length: float(length**2)) == [0, 2, 3, 4, 5]


def test_costs_are_the_sums_they_stand_for():
    dense, sparse = DocumentCost(pair=0.5), DocumentCost(top_k=5, pair=0.5, index_pair=0.25)
    for length in (1, 4, 5, 6, 40):
        assert dense(length) == length + 0.25 * length**2
        pairs = sum(min(seen, 5) for seen in range(1, length + 1))
        assert sparse(length) == length + 0.5 * pairs + 0.125 * length**2
    assert DocumentCost(2048)(131_072) < 0.4 * DocumentCost()(131_072)


def test_packs_by_cost_are_more_alike():
    capacity = 65_536
    cost = DocumentCost()
    draw = random.Random(3)
    lengths = [draw.choice((draw.randint(200, 2000), draw.randint(200, 2000), draw.randint(4000, 30_000))) for _ in range(2000)]

    def packs(by: DocumentCost | None) -> list[list[int]]:
        """As a lane makes them: some packs' worth of documents wait."""
        coming, waiting, packs = list(range(len(lengths))), [], []
        while coming:
            while coming and sum(lengths[number] for number in waiting) < LOOKAHEAD_PACKS * capacity:
                waiting.append(coming.pop(0))
            pack = [waiting[place] for place in fill_pack([lengths[number] for number in waiting], capacity, by)]
            waiting = [number for number in waiting if number not in pack]
            packs.append(pack)
        return packs[: -2 * LOOKAHEAD_PACKS]

    def spread(packs: list[list[int]]) -> float:
        costs = [sum(cost(lengths[number]) for number in pack) for pack in packs]
        return statistics.stdev(costs) / statistics.mean(costs)

    by_tokens, by_cost = packs(None), packs(cost)
    assert spread(by_cost) < 0.6 * spread(by_tokens)
    assert len(by_cost) <= 1.04 * len(by_tokens)


def test_many_short_documents_are_packed_in_no_time():
    begin = time.process_time()
    chosen = fill_pack([1 + number % 200 for number in range(6000)], 262_144, DocumentCost(2048))
    assert len(chosen) > 1500
    assert time.process_time() - begin < 1


@pytest.mark.parametrize("lengths", [[], [5, 11]])
def test_what_cannot_be_packed_is_refused(lengths):
    with pytest.raises(ValueError, match="a pack of 10 tokens"):
        fill_pack(lengths, 10)
