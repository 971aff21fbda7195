"""Where repetition begins, at several granularities."""

import asyncio
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openkeye.tasks.rewards.length import OverlongPenalty, overlong_penalty
from openkeye.tasks.rewards.repetition import RepetitionPenalty, repetition_onset
from openkeye.tasks.task import Example, Response

RNG = np.random.default_rng(0)
FRESH = RNG.integers(0, 50_000, 4000)
EXAMPLE = Example("any", 0, "text", ({"role": "user", "content": "?"},))


@pytest.mark.parametrize(("period", "num_turns"), [(1, 30), (3, 12), (12, 5), (60, 4), (200, 4), (900, 3)])
@pytest.mark.parametrize("lead", [0, 150])
@pytest.mark.parametrize("tail", [0, 40])
def test_the_onset_is_where_the_second_turn_begins(period, num_turns, lead, tail):
    turn = FRESH[1000 : 1000 + period]
    ids = np.concatenate([FRESH[:lead], np.tile(turn, num_turns), FRESH[3000 : 3000 + tail]])
    assert repetition_onset(ids) == lead + period


def test_what_does_not_repeat_has_no_onset():
    assert repetition_onset(FRESH) is None and repetition_onset([]) is None and repetition_onset([5]) is None
    assert repetition_onset(np.concatenate([FRESH[:40], FRESH[:40], FRESH[40:80]])) is None
    # Spans in a caption's words: frames of words come again, times do not.
    words = [
        np.concatenate([[1, 2, 3], RNG.integers(10, 20, 4), [4, 5], RNG.integers(10, 20, 4), [6, 7, 8]]) for _ in range(20)
    ]
    assert repetition_onset(np.concatenate(words)) is None
    assert repetition_onset([7] * 15) is None and repetition_onset([7] * 40) == 1


def test_loops_that_are_not_exact_are_found_by_their_ngrams():
    sentences = [FRESH[start : start + 30] for start in range(0, 300, 30)]
    order = RNG.integers(0, len(sentences), 60)
    ids = np.concatenate([*sentences, *(sentences[number] for number in order)])
    onset = repetition_onset(ids)
    assert onset is not None and 290 <= onset <= 340


@given(st.lists(st.integers(0, 3), max_size=120), st.lists(st.integers(0, 3), min_size=1, max_size=12))
@settings(deadline=None, max_examples=60)
def test_a_loop_is_found_whatever_stands_before_it(lead, turn):
    """And never later than its second turn."""
    ids = lead + turn * (40 // len(turn) + 8)
    onset = repetition_onset(ids)
    assert onset is not None and 0 < onset <= len(lead) + len(turn)


def test_a_long_answer_is_looked_through_at_once():
    start = time.monotonic()
    assert repetition_onset(np.arange(65_536)) is None
    assert time.monotonic() - start < 5.0


def test_penalties():
    assert [overlong_penalty(n, 100, 20) for n in (0, 80, 90, 100, 101)] == [0.0, 0.0, -0.5, -1.0, -1.0]
    cut = asyncio.run(OverlongPenalty(100, 20)(EXAMPLE, Response("x", finish_reason="length", num_tokens=50)))
    assert cut == {"overlong": -1.0}
    once = asyncio.run(RepetitionPenalty()(EXAMPLE, Response(" ".join(map(str, range(100))))))
    again = asyncio.run(RepetitionPenalty()(EXAMPLE, Response("one and the same thing " * 50)))
    assert once["repetition"] == 0.0 and again["repetition"] < -0.9
