"""Typed settings of multi-teacher on-policy distillation."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from openkeye.common.checks import InputError
from openkeye.distill.estimator_config import EstimatorConfig
from openkeye.distill.repetition import RepetitionConfig
from openkeye.distill.scaling import ScalingConfig

AVERAGINGS = ("tokens", "rollouts")
Option = str | int | float | bool


@dataclass(frozen=True)
class DistillConfig:
    """Who teaches what, and how a student learns from it."""

    teachers: Mapping[str, str]
    # folders by name: checkpoints, or deltas of `base_dir`
    routes: Mapping[str, str]
    # names by "modality/task"; "video/*" for all tasks of a modality without a route of their own
    base_dir: str = ""
    # that deltas are of; empty: there are none
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    repetition: RepetitionConfig = field(default_factory=RepetitionConfig)
    averaging: str = "tokens"
    # "tokens": all of a step count alike; "rollouts": every response counts alike, as the report prints it
    measures_overlap: bool = True
    # the student's top k are looked at also where the estimator does without
    cache_bytes: int = 256 << 20
    # of teachers' scores
    max_full_vocabulary: int = 8192
    # up to which whole distributions are handed over for "full"

    def __post_init__(self) -> None:
        """Raises InputError where nobody teaches, or a setting means nothing."""
        if not self.teachers or not self.routes:
            raise InputError(
                "distillation needs teachers (name=folder) and routes (modality/task=name); give at least one each"
            )
        if self.averaging not in AVERAGINGS:
            raise InputError(f"averaging is {self.averaging!r}; choose one of {', '.join(AVERAGINGS)}")
        if self.cache_bytes < 0:
            raise InputError(f"cache_bytes is {self.cache_bytes}; give a number from 0 on")

    def num_told(self, vocab_size: int) -> int:
        """How many of its likeliest tokens a teacher tells at each place.

        Raises:
            InputError: the whole vocabulary is too many.
        """
        if self.estimator.name != "full":
            return min(self.estimator.top_k, vocab_size)
        if vocab_size > self.max_full_vocabulary:
            raise InputError(
                f"estimator full: {vocab_size:,} tokens of vocabulary, and at most {self.max_full_vocabulary:,} are handed "
                "over at each place; take overlap_kl, or raise max_full_vocabulary"
            )
        return vocab_size

    @property
    def asks_student(self) -> bool:
        """Whether the student's own top k are needed."""
        needs_own = self.estimator.has_support and self.estimator.name != "full" and self.estimator.support != "teacher"
        return needs_own or self.measures_overlap


@dataclass(frozen=True)
class DistillRun:
    """A whole run of `openkeye distill`."""

    model_dir: str
    # the student
    run_dir: str
    out_dir: str
    # the finished student in the published layout
    distill: DistillConfig
    tasks: Mapping[str, float]
    # weights by name, of tasks that `opens` knows
    num_steps: int
    opens: str
    # MODULE:FUNCTION that makes the parts from these settings (`loop.DistillParts`)
    rollouts_per_step: int = 64
    # one response an example
    max_tokens: int = 1024
    # of a response
    seed: int = 0
    save_every_steps: int = 10
    has_tensorboard: bool = True
    learner: Mapping[str, Option] = field(default_factory=dict)
    options: Mapping[str, Option] = field(default_factory=dict)
    # of whoever opens the parts

    def __post_init__(self) -> None:
        """Raises InputError for a run that does nothing."""
        for name in ("num_steps", "rollouts_per_step", "max_tokens", "save_every_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give at least 1")
        if not any(weight > 0 for weight in self.tasks.values()):
            raise InputError("tasks has nothing with a weight above 0; give at least one")
        module, has_function, function = self.opens.partition(":")
        if not (module and has_function and function):
            raise InputError(f"opens is {self.opens!r}; give MODULE:FUNCTION that makes the parts")
