"""Rewards by name, for tasks that are described in data."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from openkeye.common.checks import InputError
from openkeye.common.fields import unknown
from openkeye.tasks.arithmetic_rules import RuleArithmeticJudge
from openkeye.tasks.context import ContextReward
from openkeye.tasks.judges import CaptionJudge, OutcomeJudge, Panel, ProcessJudge, SpatialJudge
from openkeye.tasks.rewards.caption import CaptionReward, RuleCaptionJudge
from openkeye.tasks.rewards.cognition import SelfCognitionReward
from openkeye.tasks.rewards.counting import CountingReward
from openkeye.tasks.rewards.differences import DifferencePerceptionReward, DifferenceStructureReward
from openkeye.tasks.rewards.format import FormatReward, ToolJsonReward
from openkeye.tasks.rewards.grounding import GroundingReward
from openkeye.tasks.rewards.length import OverlongPenalty
from openkeye.tasks.rewards.maths import MathsReward
from openkeye.tasks.rewards.ocr import OcrReward
from openkeye.tasks.rewards.repetition import RepetitionPenalty
from openkeye.tasks.rewards.reward import Reward
from openkeye.tasks.rewards.spatial import RuleSpatialJudge, SpatialReward
from openkeye.tasks.rewards.temporal import TemporalIouReward
from openkeye.tasks.rewards.words import ChoiceReward, WordsReward

REWARDS: dict[str, Callable[..., Reward]] = {
    "format": FormatReward,
    "tool_json": ToolJsonReward,
    "maths": MathsReward,
    "words": WordsReward,
    "choice": ChoiceReward,
    "temporal_iou": TemporalIouReward,
    "grounding": GroundingReward,
    "counting": CountingReward,
    "ocr": OcrReward,
    "self_cognition": SelfCognitionReward,
    "difference_perception": DifferencePerceptionReward,
    "difference_structure": DifferenceStructureReward,
    "overlong": OverlongPenalty,
    "repetition": RepetitionPenalty,
    "caption_rules": lambda: CaptionReward(RuleCaptionJudge()),
    "spatial_rules": lambda: SpatialReward(RuleSpatialJudge()),
    "context_rules": lambda: ContextReward(MathsReward(), RuleArithmeticJudge()),
}
JUDGED: dict[str, Callable[[Panel], Reward]] = {
    "caption": lambda panel: CaptionReward(CaptionJudge(panel)),
    "spatial": lambda panel: SpatialReward(SpatialJudge(panel)),
    "context": lambda panel: ContextReward(MathsReward(judge=OutcomeJudge(panel)), ProcessJudge(panel)),
    "maths_judged": lambda panel: MathsReward(judge=OutcomeJudge(panel)),
}


def make_reward(name: str, options: Mapping[str, Any], panel: Panel | None = None) -> Reward:
    """A reward by its name in REWARDS or JUDGED, with its settings by name.

    Args:
        panel: the judge of those in JUDGED.

    Raises:
        InputError: no such reward or setting, a value that it refuses, or a judged one without a judge.
    """
    if name in JUDGED:
        if panel is None:
            raise InputError(
                f"reward {name!r} asks a judge and none is given; name a judge, or take {name}_rules where it fits"
            )
        if options:
            raise InputError(f"reward {name!r} takes no options, got {', '.join(options)}")
        return JUDGED[name](panel)
    if name not in REWARDS:
        raise unknown("reward", name, (*REWARDS, *JUDGED))
    make = REWARDS[name]
    fields: dict[str, Any] = {one.name: one for one in dataclasses.fields(make)} if dataclasses.is_dataclass(make) else {}
    known = [key for key in fields if key not in ("name", "judge")]
    for key in options:
        if key not in known:
            raise unknown(f"option of reward {name!r}", key, known)
    try:
        return make(**{key: _record(fields[key].default, value) for key, value in options.items()})
    except TypeError as error:
        raise InputError(f"reward {name!r}: {error}; its options are {', '.join(known) or 'none'}") from error


def _record(default: Any, value: Any) -> Any:
    """A table in the place of a record becomes that record with some fields changed."""
    if dataclasses.is_dataclass(default) and not isinstance(default, type) and isinstance(value, Mapping):
        return dataclasses.replace(default, **value)
    return value
