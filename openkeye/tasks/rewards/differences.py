"""Synthetic differences between two pictures (report, 5.2): boxes of what was edited, and lists of operations.

Letters: P predicted, G gold.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from openkeye.common.checks import InputError
from openkeye.tasks.rewards.boxes import MAX_BOXES, Box, box_iou, drop_duplicates, is_valid, match, read_boxes
from openkeye.tasks.rewards.operations import Operation, parse_operations, similarity
from openkeye.tasks.rewards.reading import answer_text
from openkeye.tasks.rewards.reward import fact
from openkeye.tasks.task import Example, Response


@dataclass(frozen=True)
class DifferenceWeights:
    """R = f_soft * F_soft + matched * (sum u / max(|pred|, |gold|)) - duplicate * N_dup. The weights are not published."""

    f_soft: float = 0.5
    matched: float = 0.5
    duplicate: float = 0.1

    def __post_init__(self) -> None:
        if min(self.f_soft, self.matched, self.duplicate) < 0 or abs(self.f_soft + self.matched - 1.0) > 1e-9:
            raise InputError(
                f"weights of a difference are {self.f_soft}, {self.matched} and {self.duplicate}; give numbers from 0 on of "
                "which the first two add up to 1"
            )


def difference_score(
    similarity_PG: np.ndarray, num_predicted: int, num_gold: int, num_duplicates: int, weights: DifferenceWeights
) -> float:
    """The formula, 0 at least; F_soft counts a match by its similarity: 2 * sum u / (|pred| + |gold|).

    Where nothing was edited, an empty answer is worth 1 and any other 0.
    """
    if not num_gold:
        return float(num_predicted + num_duplicates == 0)
    total = float(match(similarity_PG).sum())
    f_soft, share = 2 * total / (num_predicted + num_gold), total / max(num_predicted, num_gold)
    return max(0.0, weights.f_soft * f_soft + weights.matched * share - weights.duplicate * num_duplicates)


def score_edits(
    predicted: Sequence[Box] | None, gold: Sequence[Box], weights: DifferenceWeights, duplicate_iou: float
) -> float:
    """Boxes of edits; None (an answer that says nothing readable) is worth 0, also where nothing was edited."""
    if predicted is None or len(predicted) > MAX_BOXES:
        return 0.0
    kept, num_duplicates = drop_duplicates([box for box in predicted if is_valid(box)], duplicate_iou)
    num_predicted = len(kept) + sum(not is_valid(box) for box in predicted)
    return difference_score(box_iou(kept, gold), num_predicted, len(gold), num_duplicates, weights)


def score_operations(
    predicted: Sequence[Operation | None] | None, gold: Sequence[Operation], weights: DifferenceWeights, tolerance: float
) -> float:
    """Operations in canonical form, matched by rules; None among them is one that cannot be read and matches nothing."""
    if predicted is None or len(predicted) > MAX_BOXES:
        return 0.0
    counts = Counter(operation for operation in predicted if operation is not None)
    kept = list(counts)
    # What truth holds twice may be said twice.
    allowed = Counter(gold)
    copies = {one: max(1, allowed[one]) for one in kept}
    num_duplicates = sum(max(0, counts[one] - copies[one]) for one in kept)
    said = [one for one in kept for _ in range(min(counts[one], copies[one]))]
    num_predicted = len(said) + sum(operation is None for operation in predicted)
    table = np.array([[similarity(one, other, tolerance) for other in gold] for one in said]).reshape(len(said), len(gold))
    return difference_score(table, num_predicted, len(gold), num_duplicates, weights)


@dataclass(frozen=True)
class DifferencePerceptionReward:
    """Boxes of the edits, `facts["boxes"]`; empty where the pictures show the same."""

    weights: DifferenceWeights = DifferenceWeights()
    duplicate_iou: float = 0.9
    name: str = "difference_perception"

    async def __call__(self, example: Example, response: Response) -> Mapping[str, float]:
        gold = [(float(a), float(b), float(c), float(d)) for a, b, c, d in fact(example, "boxes")]
        return {self.name: score_edits(read_boxes(answer_text(response)), gold, self.weights, self.duplicate_iou)}


@dataclass(frozen=True)
class DifferenceStructureReward:
    """The edits as operations (`operations.py`), `facts["operations"]` of the domain `facts["domain"]`."""

    weights: DifferenceWeights = DifferenceWeights()
    tolerance: float = 1.0
    # distance of coordinates at which they count as different
    name: str = "difference_structure"

    async def __call__(self, example: Example, response: Response) -> Mapping[str, float]:
        domain = str(fact(example, "domain"))
        gold = parse_operations(str(fact(example, "operations")), domain)
        if gold is None or any(operation is None for operation in gold):
            raise InputError(
                f"{example.name}: its own operations cannot be read as {domain}: {fact(example, 'operations')!r:.80}"
            )
        known = [operation for operation in gold if operation is not None]
        predicted = parse_operations(answer_text(response), domain)
        return {self.name: score_operations(predicted, known, self.weights, self.tolerance)}
