"""How answers are scored, and what strategies that never look at the video would score."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from openkeye.frameforge.questions import Question
from openkeye.frameforge.scene import Interval

MOMENT_TOLERANCE_SECONDS = 0.75
# half a sampling step for the frame, half for the moment between frames, and a quarter for rounding


def temporal_iou(first: Sequence[Interval], second: Sequence[Interval]) -> float:
    """Intersection over union of two unions of intervals; 0 where both are empty."""
    edges = sorted({edge for interval in (*first, *second) for edge in interval})
    both = either = 0.0
    for low, high in pairwise(edges):
        middle = (low + high) / 2
        in_first = any(a <= middle < b for a, b in first)
        in_second = any(a <= middle < b for a, b in second)
        both += (high - low) * (in_first and in_second)
        either += (high - low) * (in_first or in_second)
    return both / either if either else 0.0


def score(
    question: Question, text: str, intervals: Sequence[Interval], moment_seconds: float | None, frame_spacing_seconds: float
) -> float:
    """Score of one answer, 0 to 1.

    Localisation: temporal IoU with the true continuous intervals. "When is the word shown?": 1 where there are as many
    intervals as in truth and every end is within one sampling step. "When does it turn?": 1 within 0.75 s. Everything else:
    1 where the words are the same, letter case and the full stop aside.

    Args:
        text: the answer's words.
        intervals: the answer's spans in seconds, widened by half a sampling step.
        moment_seconds: the answer's `at ...` time.
        frame_spacing_seconds: the sampling step.
    """
    if question.kind == "moment":
        truth = question.moment_seconds
        assert truth is not None
        return float(moment_seconds is not None and abs(moment_seconds - truth) <= MOMENT_TOLERANCE_SECONDS)
    if question.kind == "words":
        return float(_plain(text) == _plain(question.answer))
    if question.task == "timestamp_localisation":
        return temporal_iou(list(intervals), question.intervals)
    if len(intervals) != len(question.intervals):
        return 0.0
    ends = zip(sorted(intervals), question.intervals, strict=True)
    return float(all(abs(a - b) <= frame_spacing_seconds for ours, truth in ends for a, b in zip(ours, truth, strict=True)))


def trivial_score(task: str, questions: Sequence[Question], durations_seconds: Sequence[float]) -> float:
    """What needs no eyes: the whole clip for localisation, a coin for before/after, the most frequent answer for the rest."""
    if task == "timestamp_localisation":
        pairs = zip(questions, durations_seconds, strict=True)
        return float(np.mean([temporal_iou([(0.0, seconds)], question.intervals) for question, seconds in pairs]))
    if task == "before_after":
        return 0.5
    answers = Counter(_plain(question.answer) if question.kind == "words" else None for question in questions)
    answers.pop(None, None)
    return answers.most_common(1)[0][1] / len(questions) if answers else 0.0


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()
