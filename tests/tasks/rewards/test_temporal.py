"""Temporal IoU over unions of intervals, held against a plain twin and its own laws."""

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openkeye.frameforge.scoring import temporal_iou as plain_temporal_iou
from openkeye.tasks.rewards.temporal import TemporalIouReward, length_seconds, temporal_iou, union
from openkeye.tasks.task import Example, Response

seconds = st.floats(0, 100, allow_nan=False).map(lambda value: round(value, 1))
intervals = st.lists(st.tuples(seconds, seconds).map(lambda pair: (min(pair), max(pair))), max_size=8)


@given(intervals, intervals)
def test_it_agrees_with_its_plain_twin(first, second):
    assert temporal_iou(first, second) == pytest.approx(plain_temporal_iou(first, second), abs=1e-9)


@given(intervals, intervals)
def test_its_laws(first, second):
    value = temporal_iou(first, second)
    assert 0.0 <= value <= 1.0 and value == pytest.approx(temporal_iou(second, first))
    assert temporal_iou(first, first) == pytest.approx(float(length_seconds(first) > 0))
    # Saying the same seconds again, or in pieces, changes nothing.
    assert temporal_iou([*first, *first], second) == pytest.approx(value)
    pieces = [half for a, b in first for half in ((a, (a + b) / 2), ((a + b) / 2, b))]
    assert temporal_iou(pieces, second) == pytest.approx(value)


@given(intervals)
def test_a_union_is_in_order_and_apart(parts):
    merged = union(parts)
    assert all(a[1] < b[0] for a, b in pairwise(merged)) and all(a < b for a, b in merged)
    assert union(merged) == merged


@pytest.mark.parametrize(
    ("text", "iou"),
    [
        ("From 10.0 to 20.0 seconds.", 0.5),
        ("From 10.0 to 20.0 and from 60.0 to 70.0 seconds.", 1.0),
        ("[[00:10, 00:20], [1:00, 1:10]]", 1.0),
        ("<think>from 0 to 3</think><answer>[[0:00:10, 0:00:20], [01:00, 01:10]]</answer>", 1.0),
        ("From 10.0 to 20.0 and from 70.0 to 60.0 seconds.", 0.0),
        ("<think>from 10 to 20", 0.0),
        ("", 0.0),
        ("From 20.0 to 20.0 seconds.", 0.0),
        ("from 0 to 999999999999999999999", 0.0),
    ],
)
def test_answers(text, iou):
    example = Example("tvg", 0, "video", ({"role": "user", "content": "?"},), facts={"intervals": [[10, 20], [60, 70]]})
    numbers = asyncio.run(TemporalIouReward()(example, Response(text)))
    assert numbers["temporal_iou"] == pytest.approx(iou)
    assert numbers["temporal_iou>=0.5"] == float(iou >= 0.5) and numbers["temporal_iou>=0.7"] == float(iou >= 0.7)
