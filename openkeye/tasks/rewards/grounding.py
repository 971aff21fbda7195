"""Grounding: boxes of one picture (report, 5.5): deduplicated, matched, gated by the worst match."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from openkeye.common.checks import InputError
from openkeye.tasks.rewards.boxes import MAX_BOXES, Box, box_iou, drop_duplicates, is_valid, match, read_boxes
from openkeye.tasks.rewards.reading import answer_text
from openkeye.tasks.rewards.reward import fact
from openkeye.tasks.task import Example, Response


@dataclass(frozen=True)
class GroundingRules:
    """How boxes are scored. The report names the parts; the numbers are ours."""

    gate_iou: float = 0.5
    # the smallest IoU of a match that lets an answer into the high region
    low_region: float = 0.5
    # what an answer below the gate reaches at most
    duplicate_iou: float = 0.9
    duplicate_penalty: float = 0.1
    # for each
    count_penalty: float = 0.0
    # times the share of boxes too many or too few: unmatched boxes count as IoU 0 in the mean already

    def __post_init__(self) -> None:
        for name in ("gate_iou", "low_region", "duplicate_iou", "duplicate_penalty", "count_penalty"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{name} of grounding is {getattr(self, name)}; give a number from 0 to 1")


@dataclass(frozen=True)
class GroundingScore:
    """What an answer's boxes are worth."""

    reward: float
    mean_iou: float
    # over the larger number of boxes, predicted (without duplicates) or gold
    min_iou: float
    # of the gold boxes; 0 where one is unmatched
    num_duplicates: int
    count_error: int
    # predicted without duplicates, minus gold


def score_boxes(predicted: Sequence[Box] | None, gold: Sequence[Box], rules: GroundingRules) -> GroundingScore:
    """Score boxes against the true ones; the order of either does not matter (but for which duplicate stays).

    The mean IoU of the matching is the continuous part: up to `low_region` where some box is matched worse than `gate_iou`,
    missing or too many, from there to 1 otherwise. Boxes outside of the picture match nothing.
    """
    if predicted is None or len(predicted) > MAX_BOXES:
        return GroundingScore(0.0, 0.0, 0.0, 0, (len(predicted) if predicted else 0) - len(gold))
    kept, num_duplicates = drop_duplicates([box for box in predicted if is_valid(box)], rules.duplicate_iou)
    num_predicted = len(kept) + sum(not is_valid(box) for box in predicted)
    count_error = num_predicted - len(gold)
    if not gold:
        return GroundingScore(float(num_predicted == 0), float(num_predicted == 0), 0.0, num_duplicates, count_error)
    matched = match(box_iou(kept, gold))
    most = max(num_predicted, len(gold))
    mean = float(matched.sum()) / most
    worst = float(matched.min()) if len(matched) == len(gold) else 0.0
    is_high = worst >= rules.gate_iou and count_error == 0
    reward = rules.low_region + (1 - rules.low_region) * mean if is_high else rules.low_region * mean
    reward -= rules.duplicate_penalty * num_duplicates + rules.count_penalty * abs(count_error) / most
    return GroundingScore(max(0.0, reward), mean, worst, num_duplicates, count_error)


@dataclass(frozen=True)
class GroundingReward:
    """`score_boxes` of the answer's boxes with `facts["boxes"]`, and its parts."""

    rules: GroundingRules = GroundingRules()
    name: str = "grounding"

    async def __call__(self, example: Example, response: Response) -> Mapping[str, float]:
        gold = [(float(a), float(b), float(c), float(d)) for a, b, c, d in fact(example, "boxes")]
        score = score_boxes(read_boxes(answer_text(response)), gold, self.rules)
        return {
            self.name: score.reward,
            f"{self.name}_mean_iou": score.mean_iou,
            f"{self.name}_duplicates": float(score.num_duplicates),
            f"{self.name}_count_error": float(abs(score.count_error)),
        }
