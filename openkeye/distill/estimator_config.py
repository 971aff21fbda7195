"""Settings of how a teacher's distribution is compared with the student's."""

import math
from dataclasses import dataclass

from openkeye.common.checks import InputError

SUPPORTS = ("overlap", "student", "teacher")
ESTIMATORS = ("overlap_kl", "keye_literal", "sampled", "full")


@dataclass(frozen=True)
class EstimatorConfig:
    """One switch, and what its positions read (report, MOPD)."""

    name: str = "overlap_kl"
    # "overlap_kl": reverse KL inside the support, differentiated through the student; "keye_literal": the form that the report
    # prints, whose expected gradient is zero; "sampled": the log-ratio of the sampled token as its advantage (MiMo); "full":
    # reverse KL over the whole vocabulary
    support: str = "overlap"
    # tokens compared at each place: "overlap": those in the top k of both; "student", "teacher": the top k of one
    top_k: int = 16
    is_mass_weighted: bool = True
    # "overlap_kl" counts as much as the student's probability on the support
    has_rest: bool = True
    # "overlap_kl": what is outside of the support counts as one token more, and mass moves in and out of it; False: only shares
    # inside of it are compared, as the report has it
    widens: bool = True
    # support "overlap": the student's whole top k where its probability on the overlap is below fallback_mass
    fallback_mass: float = 0.5
    # "overlap_kl" becomes "sampled" where that probability is lower; 0: never
    has_baseline: bool = False
    # "sampled": inside the support only, against the support's mean advantage
    low_ratio: float = 0.0
    high_ratio: float = math.inf
    # "sampled": a token whose probability has changed by another ratio since it was sampled is left out
    max_advantage: float = math.inf
    # "sampled": log-ratios are clipped to it, either way

    def __post_init__(self) -> None:
        """Raises InputError for names and numbers that mean nothing."""
        for field, value, choices in (("name", self.name, ESTIMATORS), ("support", self.support, SUPPORTS)):
            if value not in choices:
                raise InputError(f"estimator: {field} is {value!r}; choose one of {', '.join(choices)}")
        if self.top_k < 1:
            raise InputError(f"estimator: top_k is {self.top_k}; give at least 1")
        if not 0 <= self.fallback_mass <= 1:
            raise InputError(f"estimator: fallback_mass is {self.fallback_mass}; give a probability")
        if not 0 <= self.low_ratio < self.high_ratio:
            raise InputError(
                f"estimator: ratios from {self.low_ratio} to {self.high_ratio}; give a window with 0 <= low < high"
            )
        if not self.max_advantage > 0:
            raise InputError(f"estimator: max_advantage is {self.max_advantage}; give a number above 0")

    @property
    def has_support(self) -> bool:
        """Whether log-probabilities of more than the sampled token are needed."""
        return self.name != "sampled" or self.has_baseline
