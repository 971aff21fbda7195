"""Typed settings of training data: where samples come from and how they are mixed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SourceConfig:
    """One source of samples: a reader by name and what it reads."""

    reader: str
    # a name of `data/sources`: "chat_json_lines", "web_dataset", "parquet", "frameforge", ...
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
