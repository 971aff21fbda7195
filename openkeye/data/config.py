"""Typed settings of training data: where samples come from and how they are mixed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from openkeye.common.checks import InputError


@dataclass(frozen=True)
class SourceConfig:
    """One source of samples: a reader by name and what it reads."""

    reader: str
    # a name of `data/sources`: "chat_json_lines", "web_dataset", "parquet", ...; or MODULE:CLASS of one made from its path
    path: str = ""
    options: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    # of that reader


@dataclass(frozen=True)
class Share:
    """How often a source is drawn in a stage: the weight may change from the stage's first step to its last."""

    source: str
    # a name in `RunConfig.sources`
    weight: float = 1.0
    weight_end: float | None = None
    # None: as at the beginning

    def __post_init__(self) -> None:
        for weight in (self.weight, self.weight_end):
            if weight is not None and not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"source {self.source!r}: weight {weight} must be a number from 0 on")

    def at(self, progress: float) -> float:
        """The weight at a share of the stage, 0 to 1."""
        end = self.weight if self.weight_end is None else self.weight_end
        return self.weight + (end - self.weight) * progress


@dataclass(frozen=True)
class LoaderConfig:
    """What the loader of one stage needs to know besides the sources."""

    context: int
    # the most tokens of one document; longer samples are counted and left out
    tokens_per_pack: int
    # the most tokens of one pack, at least `context`
    packs_per_step: int
    # of all ranks together, a multiple of their number; each is one lane of samples, so that their order does not depend on it
    shares: tuple[Share, ...]
    num_steps: int
    seed: int = 0
    num_workers: int = 2
    # processes of each rank that decode; 0: none, in the training process itself
    max_bad_share: float = 0.05
    # of the samples read so far; above it the run stops and names the last ones
    max_clip_seconds: float | None = None
    # longer videos are cut to their beginning
    video_tokens: int | None = None
    # the budget of all videos of a sample
    top_k: int | None = None
    # of sparse attention, for the cost that packs are balanced by; None: dense
    stage: str = ""
    # the stage's name: stages of one seed draw and shuffle differently
    max_read_seconds: float = 600.0
    # in which a worker has read and converted a sample; one that takes longer hangs, and is replaced

    def __post_init__(self) -> None:
        for name in ("context", "packs_per_step", "num_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected a whole number of at least 1")
        if self.tokens_per_pack < self.context:
            raise InputError(
                f"a pack of {self.tokens_per_pack:,} tokens does not hold a document of {self.context:,}: "
                f"set tokens_per_pack to at least {self.context}, or a smaller context"
            )
        if self.num_workers < 0:
            raise InputError(f"num_workers is {self.num_workers}, expected 0 (no process beside this one) or more")
        if not 0 <= self.max_bad_share < 1:
            raise InputError(f"max_bad_share is {self.max_bad_share}, expected a share from 0 to below 1, such as 0.05")
        if not self.max_read_seconds > 0:
            raise InputError(f"max_read_seconds is {self.max_read_seconds}, expected a time above 0, such as 600")
