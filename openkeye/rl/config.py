"""Settings of reinforcement learning: the algorithm, which makes streams and losses, and the learner, which makes steps.

Objectives: GSPO (Zheng et al. 2025), GRPO (Shao et al. 2024), Dr. GRPO (Liu et al. 2025), DAPO (Yu et al. 2025), CISPO
(MiniMax 2025).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from openkeye.common.checks import InputError, check_least, check_number, check_one_of
from openkeye.train.config import ATTENTIONS, COMPUTE_DTYPES, INDEXER_TARGETS, OPTIMIZERS, PARTS


class Published(NamedTuple):
    """What an objective takes where nothing else is said."""

    clip_low: float
    clip_high: float
    # the ratio stays inside 1 - low .. 1 + high
    dual_clip: float
    # for a negative advantage the loss is at most so many times it; 0: no bound
    averaging: str
    # of AVERAGINGS
    divides_by_std: bool


OBJECTIVES = {
    "gspo": Published(3e-4, 4e-4, 0.0, "rollouts", True),
    "grpo": Published(0.2, 0.2, 3.0, "rollouts", True),
    "dr_grpo": Published(0.2, 0.2, 3.0, "constant", False),
    "dapo": Published(0.2, 0.28, 3.0, "tokens", True),
    # Bounded above alone: no ratio is below 0.
    "cispo": Published(1.0, 4.0, 0.0, "tokens", True),
}
AVERAGINGS = ("rollouts", "tokens", "constant")
# mean over a rollout's tokens, then over rollouts; mean over all tokens; sum over tokens / (max_tokens * rollouts)
CORRECTIONS = ("none", "tis", "icepop", "sequence_mask")
PROXIMALS = ("trainer", "rollout")
KL_ESTIMATORS = ("k2", "k3")


@dataclass(frozen=True)
class AlgorithmConfig:
    """From rewards to the loss of a policy. None takes what the objective's paper has (`OBJECTIVES`)."""

    objective: str = "gspo"
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    averaging: str | None = None
    divides_by_std: bool | None = None
    # advantages, by the standard deviation of their group's rewards
    max_tokens: int = 0
    # that the policy may write in a rollout; needed by "constant" averaging and by the overlong penalty
    overlong_tokens: int = 0
    # before max_tokens, over which the reward falls by 1 (DAPO); 0: no penalty
    masks_cut: bool = False
    # rollouts that end for length are not learnt from
    reward_weights: Mapping[str, float] = field(default_factory=lambda: {"outcome": 1.0})
    # the reward is the weighted sum of these
    drops_zero_variance: bool = True
    # groups whose rewards are all equal
    proximal: str = "trainer"
    # what ratios are to: "trainer": its own log-probabilities before the batch's first step; "rollout": those of sampling,
    # which is exact only where both agree, and takes no correction, since the ratio holds it already
    correction: str = "tis"
    # weights for the difference between trainer and sampling, r = proximal / rollout. "tis": r cut to low..high; "icepop": r
    # inside low..high, else 0; "sequence_mask": r, and 0 for rollouts whose geometric mean is outside; "none": 1
    correction_low: float = 0.0
    correction_high: float = 2.0
    ref_kl_weight: float = 0.0
    # of the divergence from a reference policy
    kl_estimator: str = "k2"
    # as a loss: k2 has the gradient of the reverse KL, k3 a biased one, k1 none at all

    def __post_init__(self) -> None:
        """Raises InputError where the settings contradict themselves."""
        where = "algorithm"
        check_one_of(where, "objective", self.objective, tuple(OBJECTIVES))
        check_one_of(where, "averaging", self.length_rule, AVERAGINGS)
        check_one_of(where, "proximal", self.proximal, PROXIMALS)
        check_one_of(where, "correction", self.correction, CORRECTIONS)
        if self.kl_estimator == "k1":
            raise InputError("algorithm: kl_estimator 'k1' has no gradient as a loss; choose k2, which has that of the KL")
        check_one_of(where, "kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        for name, value in zip(("clip_low", "clip_high", "dual_clip"), self.bounds, strict=True):
            check_number(where, name, value)
        if 0 < self.bounds[2] <= 1:
            raise InputError(f"algorithm: dual_clip is {self.bounds[2]:g}; give more than 1, or 0 for none")
        check_least(where, "max_tokens", self.max_tokens, 0)
        check_least(where, "overlong_tokens", self.overlong_tokens, 0)
        check_number(where, "ref_kl_weight", self.ref_kl_weight)
        if not self.max_tokens and (self.length_rule == "constant" or self.overlong_tokens):
            raise InputError("algorithm: 'constant' averaging and overlong_tokens need max_tokens; give the most of a rollout")
        if self.overlong_tokens > self.max_tokens:
            raise InputError(f"algorithm: overlong_tokens {self.overlong_tokens} exceeds max_tokens {self.max_tokens}")
        if not 0 <= self.correction_low < self.correction_high:
            raise InputError(
                f"algorithm: correction_low {self.correction_low:g} and correction_high {self.correction_high:g}; "
                "give 0 <= low < high"
            )
        if self.proximal == "rollout" and self.correction != "none":
            raise InputError(
                f"algorithm: correction {self.correction!r} would count twice what ratios to 'rollout' hold already; "
                "set it to 'none', or proximal to 'trainer'"
            )
        if not self.reward_weights:
            raise InputError("algorithm: reward_weights names no reward; give at least one")

    @property
    def bounds(self) -> tuple[float, float, float]:
        """(clip_low, clip_high, dual_clip)."""
        own, published = (self.clip_low, self.clip_high, self.dual_clip), OBJECTIVES[self.objective]
        low, high, dual = (given if given is not None else known for given, known in zip(own, published[:3], strict=True))
        return low, high, dual

    @property
    def length_rule(self) -> str:
        """Of AVERAGINGS."""
        return OBJECTIVES[self.objective].averaging if self.averaging is None else self.averaging

    @property
    def is_standardised(self) -> bool:
        """Whether advantages are divided by their group's standard deviation."""
        return OBJECTIVES[self.objective].divides_by_std if self.divides_by_std is None else self.divides_by_std


@dataclass(frozen=True)
class LearnerConfig:
    """What the learner trains, and how."""

    model_dir: str
    # where it begins: weights, tokenizer, template, processor
    run_dir: str
    # its checkpoints
    trains: tuple[str, ...] = ("decoder",)
    # of PARTS; Video-RL leaves vision and projector as they are
    rate: float = 1e-6
    rates: Mapping[str, float] = field(default_factory=dict)
    # of each part that trains; a part without one takes `rate`
    num_warmup_steps: int = 0
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    clip: float = 1.0
    num_minibatches: int = 1
    # optimizer steps that a batch of rollouts is parted into, by groups
    tokens_per_pack: int = 32768
    joins_groups: bool = True
    # rollouts of one prompt are branches behind it, which is computed once
    attention: str = "sparse"
    # as the rollouts were sampled
    indexer_target: str = "none"
    # "none": the indexer is frozen; else it learns by its KL, as in `train.config.StageConfig`
    indexer_weight: float = 1.0
    emulates_e4m3: bool = False
    # keys are selected as an engine with an index cache in e4m3 selects them
    replays_routes: bool = True
    # tokens go to the experts of the rollout, where it tells them
    recomputes: bool = False
    # activations of each layer are computed again in the backward pass
    compiles: bool = False
    compute_dtype: str = "auto"
    # "float32", "bfloat16", or "auto": bfloat16 on a GPU
    num_shards: int = 0
    # ranks that share one copy of the weights (FSDP2), the rest replicate; 0: all of them

    def __post_init__(self) -> None:
        """Raises InputError where the settings contradict themselves."""
        where = "learner"
        for name, choices in (
            ("attention", ATTENTIONS), ("indexer_target", INDEXER_TARGETS), ("optimizer", OPTIMIZERS),
            ("compute_dtype", COMPUTE_DTYPES),
        ):  # fmt: skip
            check_one_of(where, name, getattr(self, name), choices)
        for name, least in (("num_warmup_steps", 0), ("num_minibatches", 1), ("tokens_per_pack", 2), ("num_shards", 0)):
            check_least(where, name, getattr(self, name), least)
        for name in ("rate", "weight_decay", "indexer_weight"):
            check_number(where, name, getattr(self, name))
        for part, rate in self.rates.items():
            check_number(where, f"the rate of {part}", rate)
        if not self.clip > 0:
            raise InputError(f"learner: clip is {self.clip}; give the largest gradient norm, above 0 (inf: no clipping)")
        if unknown := [part for part in (*self.trains, *self.rates) if part not in PARTS]:
            raise InputError(f"learner: {', '.join(unknown)} is no part of the network; the parts are {', '.join(PARTS)}")
        if not any(part != "indexer" for part in self.trains):
            raise InputError("learner: no part learns from rewards; name decoder, projector or vision in trains")
        if idle := [part for part in self.rates if part not in self.trains]:
            raise InputError(
                f"learner: rates has {', '.join(idle)}, which trains does not name; let them train, or leave them out"
            )
        if ("indexer" in self.trains) != (self.indexer_target != "none"):
            raise InputError(
                f"learner: indexer_target is {self.indexer_target!r} and trains is {', '.join(self.trains)}; the indexer "
                "learns where trains names it and a target says from what"
            )
        if self.indexer_target.startswith("selected") and self.attention != "sparse":
            raise InputError(f"learner: indexer_target {self.indexer_target!r} needs attention 'sparse'; dense selects nothing")

    def rates_at(self, step: int) -> dict[str, float]:
        """The rate of every part at an optimizer step, counted from 0: a linear warm-up, then constant."""
        share = min(1.0, (step + 1) / self.num_warmup_steps) if self.num_warmup_steps else 1.0
        return {part: share * self.rates.get(part, self.rate) for part in self.trains}
