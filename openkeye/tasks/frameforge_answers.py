"""How answers about FrameForge's clips are scored: named rewards out of an example's facts and a response."""

import re
from collections.abc import Mapping
from typing import Any

from openkeye.frameforge.questions import Question
from openkeye.frameforge.scoring import score, temporal_iou
from openkeye.inputs.intervals import Interval, parse_intervals, parse_moment, read_intervals, widen_intervals
from openkeye.tasks.rewards.reading import answer_text
from openkeye.tasks.task import Response

MAX_CHARACTERS = 384
# of an answer's end that are looked at; the longest true one has half of it
NUMBER = r"\d{1,6}\.\d"
SPAN_FORM = rf"from {NUMBER} to {NUMBER}"
FORMS = {
    "intervals": re.compile(rf"F{SPAN_FORM[1:]}(?: and {SPAN_FORM}){{0,15}} seconds\."),
    "moment": re.compile(rf"At {NUMBER} seconds\."),
    "seconds": re.compile(rf"{NUMBER} seconds\."),
    "words": re.compile(r"(?:\d{1,3}|[A-Z][a-z]{0,12}(?: [a-z0-9]{1,12}){0,5})\."),
}
# how an answer of each kind is worded
STATED_SECONDS = re.compile(r"(?<![\d.])(\d{1,6}(?:\.\d{1,3})?)(?![\d.]*\d)")
ROUNDING_SECONDS = 0.1
# of a difference of two stated times


def seen_truth(answer: str, frame_spacing_seconds: float, duration_seconds: float) -> list[Interval]:
    """What frames can tell of the true seconds: the reference answer's ends, each out by half of the sampling step."""
    return widen_intervals(parse_intervals(answer), frame_spacing_seconds, 0.0, duration_seconds)


def answer_rewards(facts: Mapping[str, Any], response: Response, format_weight: float) -> dict[str, float]:
    """Rewards by name.

    Localisation: "temporal_iou" with what the frames tell, so that the best answer is worth 1, and, logged only,
    "temporal_iou_continuous" with the true seconds, as evaluation scores. Every other task: "exact", 1 or 0; times and
    differences of times within one sampling step (`frameforge.scoring`). "format": 1 for an answer that ended of itself and is
    worded as its kind is. "total" adds the format with its weight.
    """
    said = answer_text(response)[-MAX_CHARACTERS:]
    spacing, duration = float(facts["frame_spacing_seconds"]), float(facts["duration_seconds"])
    rewards: dict[str, float] = {}
    if facts["task"] == "timestamp_localisation":
        predicted = widen_intervals(read_intervals(said) or [], spacing, 0.0, duration)
        outcome = rewards["temporal_iou"] = temporal_iou(predicted, seen_truth(facts["answer"], spacing, duration))
        rewards["temporal_iou_continuous"] = temporal_iou(predicted, [tuple(shown) for shown in facts["intervals"]])
    else:
        outcome = rewards["exact"] = _exact(facts, said, spacing, duration)
    form = FORMS[facts["form"]]
    rewards["format"] = float(response.finish_reason == "stop" and form.fullmatch(said) is not None)
    rewards["total"] = outcome + format_weight * rewards["format"]
    return rewards | {"outcome": outcome}


def _exact(facts: Mapping[str, Any], said: str, spacing: float, duration: float) -> float:
    if facts["form"] == "seconds":
        stated = STATED_SECONDS.findall(said)
        truth = float(facts["answer"].split()[0])
        return float(len(stated) == 1 and abs(float(stated[0]) - truth) <= spacing + ROUNDING_SECONDS)
    question = Question(
        facts["task"],
        facts["question"],
        facts["answer"],
        tuple((float(first), float(last)) for first, last in facts["intervals"]),
        facts["moment_seconds"],
    )
    return score(
        question, said, widen_intervals(read_intervals(said) or [], spacing, 0.0, duration), parse_moment(said), spacing
    )
