"""Temporal IoU over unions of intervals (report, 5.6), and recall at thresholds as temporal grounding is evaluated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from openkeye.inputs.intervals import Interval, read_intervals
from openkeye.tasks.rewards.reading import answer_text
from openkeye.tasks.rewards.reward import fact
from openkeye.tasks.task import Example, Response

THRESHOLDS = (0.3, 0.5, 0.7)


def union(intervals: Sequence[Interval]) -> list[Interval]:
    """The same seconds as intervals that neither meet nor overlap, in order; empty ones fall away."""
    merged: list[Interval] = []
    for first, last in sorted(interval for interval in intervals if interval[1] > interval[0]):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged


def length_seconds(intervals: Sequence[Interval]) -> float:
    """Seconds that a union covers."""
    return sum(last - first for first, last in union(intervals))


def temporal_iou(predicted: Sequence[Interval], truth: Sequence[Interval]) -> float:
    """Intersection over union of two unions of intervals; 0 where either is empty."""
    ours, theirs = union(predicted), union(truth)
    shared, one, other = 0.0, 0, 0
    while one < len(ours) and other < len(theirs):
        shared += max(0.0, min(ours[one][1], theirs[other][1]) - max(ours[one][0], theirs[other][0]))
        if ours[one][1] < theirs[other][1]:
            one += 1
        else:
            other += 1
    either = sum(last - first for first, last in (*ours, *theirs)) - shared
    return min(1.0, shared / either) if either > 0 else 0.0


@dataclass(frozen=True)
class TemporalIouReward:
    """IoU of the answer's spans with `facts["intervals"]` (seconds), and whether it reaches 0.3, 0.5 and 0.7."""

    name: str = "temporal_iou"
    frame_spacing_seconds: float = 0.0
    # ends of the answer are times of frames and move out by half of it (`inputs.intervals.widen_intervals`)

    async def __call__(self, example: Example, response: Response) -> Mapping[str, float]:
        truth = [(float(first), float(last)) for first, last in fact(example, "intervals")]
        half = self.frame_spacing_seconds / 2
        predicted = [(max(0.0, first - half), last + half) for first, last in read_intervals(answer_text(response)) or ()]
        iou = temporal_iou(predicted, truth)
        return {self.name: iou} | {f"{self.name}>={bound}": float(iou >= bound) for bound in THRESHOLDS}
