"""Scores and trivial baselines."""

import pytest

from openkeye.frameforge.questions import Question
from openkeye.frameforge.scoring import score, temporal_iou, trivial_score


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([(0, 4)], [(2, 6)], 2 / 6),
        ([(0, 1), (3, 4)], [(0, 4)], 0.5),
        ([(0, 2), (1, 3)], [(0, 3)], 1.0),
        ([(0, 1)], [(2, 3)], 0.0),
        ([], [(2, 3)], 0.0),
    ],
)
def test_iou_of_unions(first, second, expected):
    assert temporal_iou(first, second) == pytest.approx(expected)


def test_each_kind_of_answer_is_scored_by_its_rule():
    where = Question("timestamp_localisation", "", "", intervals=((2.0, 6.0),))
    assert score(where, "", [(0.0, 4.0)], None, 0.5) == pytest.approx(2 / 6)
    word = Question("reading", "", "Lion.")
    assert score(word, "lion", [], None, 0.5) == 1.0 and score(word, "Lions.", [], None, 0.5) == 0.0
    shown = Question("reading", "", "", intervals=((2.0, 6.0),))
    assert score(shown, "", [(1.6, 6.4)], None, 0.5) == 1.0
    assert score(shown, "", [(1.4, 6.0)], None, 0.5) == 0.0 and score(shown, "", [], None, 0.5) == 0.0
    turn = Question("motion", "", "", moment_seconds=3.0)
    assert score(turn, "", [], 3.7, 0.5) == 1.0 and score(turn, "", [], 3.8, 0.5) == 0.0
    assert score(turn, "", [], None, 0.5) == 0.0


def test_trivial_strategies():
    where = [Question("timestamp_localisation", "", "", intervals=((0.0, 5.0),))] * 2
    assert trivial_score("timestamp_localisation", where, [10.0, 20.0]) == pytest.approx((0.5 + 0.25) / 2)
    counts = [Question("counting", "", answer) for answer in ("1.", "2.", "2.")]
    assert trivial_score("counting", counts, [1.0] * 3) == pytest.approx(2 / 3)
    assert trivial_score("before_after", counts, [1.0] * 3) == 0.5
