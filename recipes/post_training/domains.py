"""What the video experiments ask: domains by name, each one task with the clips where supervised training leaves room."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from openkeye.common.checks import InputError
from openkeye.common.fields import unknown
from openkeye.rl.run_config import Option, TaskConfig

RATE = 5e-5
# of AdamW on openkeye-tiny: the 30B's 1e-6 goes with 1 / width squared
GPU_CACHE_TOKENS = 524_288
# of one engine: some forty clips of minutes, two GiB at openkeye-tiny's size
LONGEST_TOKENS = 20_480
# of a clip's frames: with their times and a question they fit the 32,768 that openkeye-tiny reads


def engine_settings() -> dict[str, Option]:
    """Of an engine that shares its GPU with other engines and the learner: by itself it would take all memory for its pages."""
    room: dict[str, Option] = {"cache_tokens": GPU_CACHE_TOKENS} if torch.cuda.is_available() else {}
    return {"prefill_chunk_tokens": 8192, "vision_cache_bytes": 1 << 30, **room}


@dataclass(frozen=True)
class Domain:
    """One task, which one teacher teaches."""

    task: str
    # of `openkeye tasks`
    modality: str = "video"
    options: Mapping[str, Option] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What a teacher is found by."""
        return f"{self.modality}/{self.task}"


CLIPS: dict[str, dict[str, Option]] = {
    "standard": {"tier": "standard"},
    # 8-30 s
    "long": {"tier": "long"},
    # 1-5 minutes
    "hour": {"tier": "hour", "total_tokens": LONGEST_TOKENS},
    # as many frames of it as openkeye-tiny has room for
    "story": {"tier": "standard", "scenes": "story"},
    # more events and distractors, 30-45 s
}
KINDS = {
    "localisation": "frameforge_timestamp_localisation",
    "counting": "frameforge_counting",
    "before_after": "frameforge_before_after",
    "co_occurrence": "frameforge_co_occurrence",
    "reading": "frameforge_reading",
    "motion": "frameforge_motion",
}
DOMAINS = {
    **{name: Domain(task, options=CLIPS["long"]) for name, task in KINDS.items()},
    "two_moments": Domain("frameforge_two_moments", options={}),
    "arithmetic": Domain("arithmetic", "text", {}),
    "api_calls": Domain("api_calls", "text", {}),
    "still_counting": Domain("counting", "image", {}),
    "ocr": Domain("ocr", "image", {}),
}
TAUGHT = ("localisation", "counting", "before_after", "co_occurrence", "reading", "two_moments")
# by default


def domain_of(name: str) -> Domain:
    """
    Raises:
        InputError: no such domain.
    """
    if name not in DOMAINS:
        raise unknown("domain", name, DOMAINS)
    return DOMAINS[name]


def task_of(
    name: str, split: str, weight: float = 1.0, options: Mapping[str, Option] | None = None, clips: str = ""
) -> TaskConfig:
    """A domain's task as a run of reinforcement learning takes it.

    Args:
        split: "train", or "test" for examples that no training sees.
        options: that replace some of the domain's.
        clips: of CLIPS, in place of the domain's own.

    Raises:
        InputError: no such domain or clips.
    """
    domain = domain_of(name)
    if clips and clips not in CLIPS:
        raise unknown("clips", clips, CLIPS)
    drawn: dict[str, Option] = {"split": "held_out" if (domain.task, split) == ("api_calls", "test") else split}
    if domain.modality == "video":
        drawn["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    return TaskConfig(domain.task, weight, {**(CLIPS[clips] if clips else domain.options), **drawn, **(options or {})})


def check_domains(names: Sequence[str], least: int = 1) -> tuple[str, ...]:
    """
    Raises:
        InputError: an unknown name, one that stands twice, or too few of them.
    """
    for name in names:
        domain_of(name)
    if len(set(names)) != len(names) or len(names) < least:
        raise InputError(f"domains are {', '.join(names) or 'none'}; give at least {least}, each once")
    return tuple(names)
