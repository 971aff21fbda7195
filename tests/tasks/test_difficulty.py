"""The difficulty meter, on a real task with an answerer whose skill is known."""

import asyncio

import pytest

from openkeye.common.checks import InputError
from openkeye.tasks.difficulty import difficulty_by, measure_difficulty, numbers_between
from openkeye.tasks.frameforge import FrameForgeOptions, FrameForgeTask
from openkeye.tasks.task import Response

TASK = FrameForgeTask("two_moments", FrameForgeOptions(seconds=(30.0, 300.0)))


def measured(num_examples=40, num_samples=4, max_concurrent=8):
    """Right about short clips always, about longer ones half of the time, about the longest never."""
    asked, under_way, most = {}, 0, 0

    async def answer(example):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1
        count = asked[example.name] = asked.get(example.name, 0) + 1
        seconds = example.facts["duration_seconds"]
        is_right = seconds < 100 or (seconds < 200 and count % 2 == 0)
        return Response(example.facts["reference"] if is_right else "Nothing.")

    result = asyncio.run(measure_difficulty(TASK, range(num_examples), answer, num_samples, max_concurrent))
    assert most <= max_concurrent and all(count == num_samples for count in asked.values())
    return result


def test_pass_rate_by_length():
    rows = difficulty_by(measured(), "duration_seconds", (100.0, 200.0))
    assert [row.value for row in rows] == ["-100", "100-200", "200-"]
    assert [row.pass_rate for row in rows] == [1.0, 0.5, 0.0] == [row.accuracy for row in rows]
    assert [row.mixed for row in rows] == [0.0, 1.0, 0.0] and [row.solvable for row in rows] == [1.0, 1.0, 0.0]
    assert sum(row.num_examples for row in rows) == 40


def test_rows_by_events_and_kind_hold_every_example():
    found = measured()
    by_events = difficulty_by(found, "num_events")
    assert [float(row.value) for row in by_events] == sorted({float(one.facts["num_events"]) for one in found})
    by_kind = difficulty_by(found, "kind")
    assert {row.value for row in by_kind} == {one.facts["kind"] for one in found}
    assert sum(row.num_examples for row in by_kind) == sum(row.num_examples for row in by_events) == len(found)


def test_the_filter_keeps_what_is_neither_hopeless_nor_solved():
    found = measured()
    kept = numbers_between(found, 0.0, 1.0)
    assert kept == [one.number for one in found if 100 <= one.facts["duration_seconds"] < 200] and kept


def test_nonsense_is_told():
    found = measured(2, 1)
    with pytest.raises(InputError, match="knows no 'weight'"):
        difficulty_by(found, "weight")
    with pytest.raises(InputError, match="give them ascending"):
        difficulty_by(found, "num_events", (3.0, 1.0))
    with pytest.raises(InputError, match="at least 1 of each"):
        asyncio.run(measure_difficulty(TASK, range(1), None, 0))
