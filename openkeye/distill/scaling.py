"""How much a token counts: by its category, with the mean kept at one, and by the noise of its domain's teacher.

Letters: T tokens of a response.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from openkeye.common.checks import InputError
from openkeye.common.fields import unknown
from openkeye.distill.token_categories import CATEGORY_NAMES

REPORT_DIRECTION = {"format": 0.5, "perception": 1.5, "reasoning": 1.5}
# The report says which way (format down, perception and reasoning up) and not how far; these are ours. Others stay at one.


@dataclass(frozen=True)
class ScalingConfig:
    """Factors of categories, and the bounds of those of domains."""

    categories: Mapping[str, float] = field(default_factory=lambda: dict(REPORT_DIRECTION))
    # by name of `token_categories.CATEGORY_NAMES`; empty: all tokens count alike
    least_domain: float = 0.25
    most_domain: float = 4.0
    # of a domain's factor; both 1: domains count alike

    def __post_init__(self) -> None:
        """Raises InputError for unknown categories, factors below zero, and bounds that cross."""
        for name, factor in self.categories.items():
            if name not in CATEGORY_NAMES:
                raise unknown("category", name, CATEGORY_NAMES)
            if not 0 <= factor < np.inf:
                raise InputError(f"category {name}: its factor is {factor}; give a number from 0 on")
        if not 0 < self.least_domain <= self.most_domain < np.inf:
            raise InputError(f"domains scale from {self.least_domain} to {self.most_domain}; give rising numbers above 0")


def category_factors(
    categories: Sequence[np.ndarray], are_policy: Sequence[np.ndarray], config: ScalingConfig
) -> list[np.ndarray]:
    """[T] float32 of every response of a step: the factor of each token, 1 on average over all sampled ones that count.

    Tokens of the factor 0 do not count, as the learner's sums do not count them.

    Args:
        categories: [T] of each response.
        are_policy: [T] bool of each: tokens that are learnt.
        config: factors by category.

    Raises:
        InputError: every token of the step has the factor 0.
    """
    table = np.array([config.categories.get(name, 1.0) for name in CATEGORY_NAMES])
    raw = [table[codes] for codes in categories]
    own = [factors[is_policy] for factors, is_policy in zip(raw, are_policy, strict=True)]
    total, count = sum(float(factors.sum()) for factors in own), sum(int((factors != 0).sum()) for factors in own)
    if not count and any(len(factors) for factors in own):
        raise InputError("all tokens of the step are of categories whose factor is 0; give one of them another")
    return [(factors * (count / total if count else 1.0)).astype(np.float32) for factors in raw]


def domain_scales(domains: Sequence[str], advantages: Sequence[np.ndarray], config: ScalingConfig) -> dict[str, float]:
    """clip(sigma_all / sigma_d) of each domain: a teacher whose log-ratios scatter widely does not rule the batch (DN-MOPD).

    Args:
        domains: of each response.
        advantages: [tokens of the policy] of each response: log T(y) - log pi(y).
        config: the bounds.
    """
    by_domain: dict[str, list[np.ndarray]] = defaultdict(list)
    for domain, values in zip(domains, advantages, strict=True):
        by_domain[domain].append(values.astype(np.float64))
    joined = {domain: np.concatenate(parts) for domain, parts in by_domain.items()}
    everything = np.concatenate(list(joined.values())) if joined else np.zeros(0)
    sigma = everything.std() if len(everything) else 0.0
    scales = {}
    for domain, values in joined.items():
        own = values.std() if len(values) else 0.0
        # Without any scatter there is nothing to weigh against.
        ratio = sigma / own if own else 1.0
        scales[domain] = float(np.clip(ratio, config.least_domain, config.most_domain))
    return scales
