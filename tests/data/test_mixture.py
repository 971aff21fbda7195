"""What a lane draws: shares by weight, every sample once in an epoch, the same on every machine."""

import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openkeye.common.checks import InputError
from openkeye.data.config import Share
from openkeye.data.mixture import Draw, Mixture, permuted


def drawn(mixture: Mixture, lane: int, num: int, progress: float = 0.0) -> list[Draw]:
    """The first draws of a lane."""
    counts: Counter[str] = Counter()
    draws = []
    for _ in range(num):
        draw = mixture.draw(lane, counts, progress)
        counts[draw.source] += 1
        draws.append(draw)
    return draws


@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
@settings(max_examples=40, deadline=None)
def test_a_shuffle_meets_every_place_once(size, key):
    assert sorted(permuted(place, size, key) for place in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [3, 5, 64])
def test_every_order_is_about_as_likely(size):
    num = 4000
    met = Counter((place, permuted(place, size, key)) for key in range(num) for place in (0, size - 1))
    expected = num / size
    assert len(met) == 2 * size
    assert max(abs(count - expected) for count in met.values()) < 5 * math.sqrt(expected)


def test_neighbours_do_not_stay_neighbours():
    order = [permuted(place, 1000, 7) for place in range(1000)]
    steps = [abs(a - b) for a, b in pairwise(order)]
    # (a random order's mean is a third of the size)
    assert 280 < sum(steps) / len(steps) < 390


def test_lanes_share_an_epoch_and_no_sample():
    mixture = Mixture([Share("a")], {"a": 12}, seed=1, stage="s", num_lanes=3)
    lanes = [[draw.index for draw in drawn(mixture, lane, 8)] for lane in range(3)]
    first = [index for lane in lanes for index in lane[:4]]
    second = [index for lane in lanes for index in lane[4:]]
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_lanes_that_draw_unequally_still_share_no_sample_in_an_epoch():
    mixture = Mixture([Share("a")], {"a": 50}, seed=1, stage="s", num_lanes=4)
    seen = set()
    for lane, num in enumerate((30, 3, 17, 25)):
        for count, draw in enumerate(drawn(mixture, lane, num)):
            entry = ((count * 4 + lane) // 50, draw.index)
            assert entry not in seen
            seen.add(entry)


def test_a_source_smaller_than_the_lanes_is_read_again():
    mixture = Mixture([Share("a")], {"a": 2}, seed=1, stage="s", num_lanes=5)
    indices = [draw.index for lane in range(5) for draw in drawn(mixture, lane, 4)]
    assert Counter(indices) == {0: 10, 1: 10}


def test_sources_without_end_go_on_in_order():
    mixture = Mixture([Share("a")], {"a": None}, seed=1, stage="s", num_lanes=3)
    assert [draw.index for draw in drawn(mixture, 1, 4)] == [1, 4, 7, 10]


def test_shares_follow_the_weights_as_they_change():
    mixture = Mixture([Share("a", 3, 0), Share("b", 1, 1), Share("c", 0, 3)], dict.fromkeys("abc"), 5, "s", 1)
    num = 4000
    for progress, weights in ((0.0, (3, 1, 0)), (0.5, (1.5, 1, 1.5)), (1.0, (0, 1, 3))):
        counts = Counter(draw.source for draw in drawn(mixture, 0, num, progress))
        for source, weight in zip("abc", weights, strict=True):
            share = weight / 4
            assert abs(counts[source] - num * share) <= 4 * math.sqrt(num * share * (1 - share)), (source, progress, counts)


def test_seed_stage_and_lane_each_change_the_draws():
    def draws(seed: int = 1, stage: str = "s", lane: int = 0) -> list[Draw]:
        mixture = Mixture([Share("a"), Share("b")], {"a": 1000, "b": 1000}, seed, stage, 2)
        return drawn(mixture, lane, 40)

    assert draws() == draws()
    others = [draws(seed=2), draws(stage="t"), draws(lane=1)]
    assert all([draw.source for draw in other] != [draw.source for draw in draws()] for other in others)
    assert all([draw.index for draw in other] != [draw.index for draw in draws()] for other in others)


def test_draws_are_the_same_on_every_machine():
    # A checkpoint of one machine goes on on another, so these may not change.
    mixture = Mixture([Share("a", 2), Share("b")], {"a": 10, "b": None}, seed=7, stage="vision", num_lanes=2)
    expected = [("a", 6), ("a", 1), ("a", 0), ("b", 1), ("a", 5), ("b", 3), ("a", 9), ("a", 0)]
    assert [(draw.source, draw.index) for draw in drawn(mixture, 1, 8)] == expected


@pytest.mark.parametrize(
    ("shares", "sizes", "words"),
    [
        ([Share("a"), Share("x")], {"a": 5, "b": 5}, "names x, but the sources are a, b"),
        ([Share("a"), Share("a")], {"a": 5}, "names a more than once"),
        ([], {"a": 5}, "sum to zero at the stage's beginning"),
        ([Share("a", 0, 1)], {"a": 5}, "sum to zero at the stage's beginning"),
        ([Share("a", 1, 0)], {"a": 5}, "sum to zero at the stage's end"),
        ([Share("a"), Share("b", 0, 1)], {"a": 5, "b": 0}, "'b' has no samples"),
    ],
)
def test_wrong_mixtures_are_refused(shares, sizes, words):
    with pytest.raises(InputError, match=words):
        Mixture(shares, sizes, 0, "s", 1)


def test_an_empty_source_of_no_weight_does_no_harm():
    mixture = Mixture([Share("a"), Share("b", 0)], {"a": 5, "b": 0}, 0, "s", 1)
    assert {draw.source for draw in drawn(mixture, 0, 50)} == {"a"}
