"""Captions on seven axes (report, 5.6), by a judge: a model, or rules where captions are FrameForge's."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Protocol

from openkeye.common.checks import InputError
from openkeye.frameforge.catalogue import COLOUR_NAMES, SHAPES, SIZES, TEXTURES
from openkeye.inputs.intervals import parse_intervals
from openkeye.tasks.judges import AXES
from openkeye.tasks.rewards.reading import answer_text
from openkeye.tasks.rewards.reward import fact
from openkeye.tasks.task import Example, Response

SUBJECT = rf"(?:(?:{'|'.join((*SIZES, *TEXTURES))}) )?(?:{'|'.join(COLOUR_NAMES)}) (?:{'|'.join(SHAPES)}|digit \d)"
TOLD = re.compile(rf"\bthe ({SUBJECT})\b|\bthe (word [a-z]{{1,20}}|number \d{{1,6}})\b", re.IGNORECASE)
MOVES = re.compile(rf"\bthe ({SUBJECT}) moves (to the left|to the right|up|down)\b", re.IGNORECASE)


class AxesJudge(Protocol):
    """Marks a caption on seven axes (`judges.CaptionJudge` is a model's)."""

    async def judge(self, reference: str, caption: str, facts: Mapping[str, Any]) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class CaptionReward:
    """Weighted mean of the seven marks of an answer beside `facts["caption"]`."""

    judge: AxesJudge
    weights: Mapping[str, float] = field(default_factory=dict)
    # by axis; 1 where none is given
    name: str = "caption"

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights) - set(AXES))
        if unknown:
            raise InputError(f"caption: axis {unknown[0]!r} is unknown; choose from {', '.join(AXES)}")
        if sum(self._weight(axis) for axis in AXES) <= 0 or min(self._weight(axis) for axis in AXES) < 0:
            raise InputError(f"caption: weights {dict(self.weights)}; give numbers from 0 on, not all of them 0")

    async def __call__(self, example: Example, response: Response) -> Mapping[str, float]:
        said = answer_text(response)
        empty = dict.fromkeys(AXES, 0.0)
        marks = await self.judge.judge(str(fact(example, "caption")), said, example.facts) if said else empty
        total = sum(self._weight(axis) * marks[axis] for axis in AXES) / sum(self._weight(axis) for axis in AXES)
        return {self.name: total} | {f"{self.name}_{axis}": marks[axis] for axis in AXES}

    def _weight(self, axis: str) -> float:
        return self.weights.get(axis, 1.0)


@dataclass(frozen=True)
class _Told:
    """What a caption in FrameForge's words says."""

    subjects: Counter[str]
    texts: Counter[str]
    motions: Counter[str]
    starts: Mapping[str, float]
    # first second of each thing

    @property
    def items(self) -> Counter[str]:
        return self.subjects + self.texts + self.motions


@dataclass(frozen=True)
class RuleCaptionJudge:
    """Marks captions in FrameForge's words (`frameforge.timelines.caption`) by rules: no model is asked, and no other words are
    understood. Such captions tell no scene, so that axis is 1 for whatever says something."""

    name: str = "rules:frameforge-caption"

    async def judge(self, reference: str, caption: str, facts: Mapping[str, Any]) -> Mapping[str, float]:
        """Marks by axis."""
        truth, said = _told(reference), _told(caption)
        if not said.items:
            return dict.fromkeys(AXES, 0.0 if truth.items else 1.0)
        both = truth.items & said.items
        return {
            "subject": _share(truth.subjects, said.subjects),
            "action": _share(truth.motions, said.motions),
            "scene": 1.0,
            "on_screen_text": _share(truth.texts, said.texts),
            "temporal_order": _order(truth.starts, said.starts),
            "hallucination": both.total() / said.items.total(),
            "coverage": both.total() / truth.items.total() if truth.items else 1.0,
        }


def _told(caption: str) -> _Told:
    subjects: set[str] = set()
    texts: set[str] = set()
    motions: set[str] = set()
    starts: dict[str, float] = {}
    num_repeats = 0
    for sentence in re.split(r"\.(?!\d)", caption):
        moving = MOVES.search(sentence)
        if moving:
            motions.add(f"{moving[1]} {moving[2]}".lower())
            continue
        spans = parse_intervals(sentence)
        for found in TOLD.finditer(sentence):
            thing = (found[1] or found[2]).lower()
            num_repeats += thing in starts
            (subjects if found[1] else texts).add(thing)
            starts.setdefault(thing, spans[0][0] if spans else float("inf"))
    # Saying a thing again adds nothing to what is right, and counts among what is said.
    said = Counter(subjects)
    if num_repeats:
        said["(again)"] = num_repeats
    return _Told(said, Counter(texts), Counter(motions), starts)


def _share(truth: Counter[str], said: Counter[str]) -> float:
    """F1 of two sets; 1 where both are empty."""
    total = truth.total() + said.total()
    return 2 * (truth & said).total() / total if total else 1.0


def _order(truth: Mapping[str, float], said: Mapping[str, float]) -> float:
    """Share of the pairs of things in both that come in the same order; where no pair is in both, whether there was none."""
    pairs = [(a, b) for a, b in combinations(sorted(truth), 2) if truth[a] != truth[b]]
    both = [(a, b) for a, b in pairs if a in said and b in said]
    if not both:
        return float(not pairs)
    return sum((truth[a] < truth[b]) == (said[a] < said[b]) and said[a] != said[b] for a, b in both) / len(both)
