"""The order of examples: exact, mixed by weight, every example once an epoch."""

from collections import Counter

import pytest

from openkeye.common.checks import InputError
from openkeye.rl.data_order import DataOrder

SIZES = {"sums": 7, "words": None, "none": 0}


def test_the_order_is_the_same_in_every_process_and_from_any_group():
    expected = [("sums", 3), ("sums", 6), ("sums", 1), ("words", 0), ("words", 1), ("sums", 5), ("sums", 2), ("sums", 4)]
    order = DataOrder({"sums": 2.0, "words": 1.0}, SIZES, seed=3)
    assert [order.example(group) for group in range(8)] == expected
    assert DataOrder({"words": 1.0, "sums": 2.0}, SIZES, seed=3).example(7) == expected[7]
    assert [DataOrder({"sums": 2.0, "words": 1.0}, SIZES, seed=4).example(group) for group in range(8)] != expected


def test_weights_count_groups_and_epochs_are_whole():
    order = DataOrder({"sums": 2.0, "words": 1.0}, SIZES, seed=0)
    drawn = [order.example(group) for group in range(3000)]
    counts = Counter(task for task, _ in drawn)
    assert abs(counts["sums"] - 2000) < 100
    sums = [number for task, number in drawn if task == "sums"]
    epochs = [sums[start : start + 7] for start in range(0, 70, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(map(tuple, epochs))) > 5
    words = [number for task, number in drawn if task == "words"]
    assert words == list(range(len(words)))


@pytest.mark.parametrize(
    ("weights", "message"),
    [({"sum": 1.0}, "sum, but the tasks are"), ({"sums": 0.0}, "sum to zero"), ({"none": 1.0}, "'none' holds no examples")],
)
def test_wrong_tasks_are_refused(weights, message):
    with pytest.raises(InputError, match=message):
        DataOrder(weights, SIZES, seed=0)
