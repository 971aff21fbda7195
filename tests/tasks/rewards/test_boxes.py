"""Boxes: reading, matching in any order, duplicates, the gate; and edits between pictures."""

import itertools
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openkeye.common.checks import InputError
from openkeye.tasks.rewards.boxes import box_iou, drop_duplicates, match, read_boxes
from openkeye.tasks.rewards.differences import DifferenceWeights, score_edits
from openkeye.tasks.rewards.grounding import GroundingRules, score_boxes

RULES = GroundingRules()
A, B, C = (0.0, 0.0, 100.0, 100.0), (200.0, 200.0, 300.0, 400.0), (500.0, 500.0, 900.0, 900.0)


@st.composite
def box(draw):
    x, y = draw(st.integers(0, 990)), draw(st.integers(0, 990))
    return float(x), float(y), float(draw(st.integers(x + 1, 1000))), float(draw(st.integers(y + 1, 1000)))


boxes = st.lists(box(), max_size=6)


@given(boxes, boxes, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_of_boxes_does_not_matter(predicted, gold, chance):
    predicted, _ = drop_duplicates(predicted, RULES.duplicate_iou)
    value = score_boxes(predicted, gold, RULES)
    chance.shuffle(predicted)
    gold = random.Random(1).sample(gold, len(gold))
    again = score_boxes(predicted, gold, RULES)
    assert again.reward == pytest.approx(value.reward) and again.mean_iou == pytest.approx(value.mean_iou)


@given(boxes, boxes)
@settings(deadline=None)
def test_the_matching_is_the_best_of_all(predicted, gold):
    predicted, gold = predicted[:4], gold[:4]
    table = box_iou(predicted, gold)
    assert table.min(initial=0.0) >= 0.0 and table.max(initial=0.0) <= 1.0
    if len(predicted) > len(gold):
        table = table.T
    rows, columns = table.shape
    best = max(
        sum(table[row, column] for row, column in enumerate(way)) for way in itertools.permutations(range(columns), rows)
    )
    assert match(table).sum() == pytest.approx(best)


@given(boxes)
@settings(deadline=None)
def test_the_truth_earns_everything_and_no_more_boxes_than_there_are(gold):
    gold, _ = drop_duplicates(gold, RULES.duplicate_iou)
    assert score_boxes(gold, gold, RULES).reward == pytest.approx(1.0)
    if gold:
        assert score_boxes([*gold, gold[0]], gold, RULES).reward == pytest.approx(0.9)
        assert score_boxes(gold[1:], gold, RULES).reward < 0.5


def test_the_gate():
    def shifted(off):
        return (0.0, off, 100.0, 100.0 + off)

    near, far = score_boxes([A, shifted(30.0)][1:], [A], RULES), score_boxes([shifted(40.0)], [A], RULES)
    assert near.mean_iou == pytest.approx(70 / 130) and near.reward == pytest.approx(0.5 + 0.5 * 70 / 130)
    assert far.mean_iou == pytest.approx(60 / 140) and far.reward == pytest.approx(0.5 * 60 / 140)
    # One good box does not carry a bad one over the gate.
    assert score_boxes([B, shifted(40.0)], [B, A], RULES).reward < 0.5
    assert score_boxes([A, B, C], [A, B], RULES).reward == pytest.approx(0.5 * 2 / 3)
    assert score_boxes([A, B, C], [A, B], GroundingRules(count_penalty=0.3)).reward == pytest.approx(0.5 * 2 / 3 - 0.1)


def test_what_is_outside_of_the_picture_or_empty_matches_nothing():
    outside = (-5.0, 0.0, 100.0, 100.0)
    assert score_boxes([outside], [A], RULES).reward == 0.0
    assert score_boxes([A, outside], [A], RULES).mean_iou == pytest.approx(0.5)
    assert score_boxes([], [], RULES).reward == 1.0 and score_boxes([A], [], RULES).reward == 0.0
    assert score_boxes(None, [], RULES).reward == 0.0 and score_boxes([A] * 300, [A], RULES).reward == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[0, 0, 100, 100]", [A]),
        ("[[0, 0, 100, 100], [200, 200, 300, 400]]", [A, B]),
        ('[{"label": "cup", "bbox_2d": [0, 0, 100, 100]}]', [A]),
        ('{"boxes": [{"box": [0, 0, 100, 100]}, {"box": [200, 200, 300, 400]}]}', [A, B]),
        ('```json\n[{"bbox": [0, 0, 100, 100]}]\n```', [A]),
        ("The cup is at [0, 0, 100, 100] and at (200, 200, 300, 400).", [A, B]),
        ("[]", []),
        ("None.", []),
        ("No differences", []),
        ("It is there.", None),
        ("", None),
        ("[1, 2, 3]", None),
        ("[[1, 2, 3]]", None),
        ('{"bbox": "x"}', None),
        ("[1e999, 0, 1, 1]", None),
        ("[NaN, 0, 1, 1]", None),
    ],
)
def test_boxes_are_read(text, expected):
    assert read_boxes(text) == expected


def test_edits_are_scored_as_the_report_says():
    weights = DifferenceWeights(0.4, 0.6, 0.1)
    half = (0.0, 0.0, 100.0, 50.0)
    # u = 1 and 0.5: F_soft = 2 * 1.5 / (2 + 3), the sum over the larger number 1.5 / 3.
    value = score_edits([B, half], [A, B, C], weights, 0.9)
    assert value == pytest.approx(0.4 * 3 / 5 + 0.6 * 1.5 / 3)
    assert score_edits([B, half, B, B], [A, B, C], weights, 0.9) == pytest.approx(value - 0.2)
    assert score_edits([], [A], weights, 0.9) == 0.0
    # Pictures that show the same: only saying so is right, and silence is not saying so.
    assert score_edits([], [], weights, 0.9) == 1.0
    assert score_edits([A], [], weights, 0.9) == 0.0 and score_edits(None, [], weights, 0.9) == 0.0
    with pytest.raises(InputError, match="add up to 1"):
        DifferenceWeights(0.5, 0.6, 0.1)


def test_written_boxes_are_read_again():
    rng = np.random.default_rng(0)
    for _ in range(50):
        corners = np.sort(rng.integers(0, 1001, (3, 2, 2)), axis=1)
        wanted = [tuple(float(value) for value in corner.reshape(-1)) for corner in corners]
        assert read_boxes(json.dumps([list(box) for box in wanted])) == wanted
