"""`Rollout`: what the policy said, token by token, and everything that learning needs to know of it.

Token in, token out: ids come from the sampler and are never made again from text. Tool output and user turns between the
policy's turns are in the same row of ids and masked.

Letters: P prompt tokens, T tokens behind the prompt, L layers, K experts a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from openkeye.engine.recorded_answer import Picks

FINISHES = ("stop", "length", "failed")


@dataclass(frozen=True)
class RolloutId:
    """Which one: an example, asked in a group, the how manyth of the group. Unique in a run, and all that messages carry."""

    task: str
    number: int
    # of the example
    group: int
    # counts up over the run
    member: int

    def __str__(self) -> str:
        return f"{self.task}:{self.number}/{self.group}.{self.member}"


@dataclass(frozen=True)
class Rollout:
    """One finished answer or episode."""

    id: RolloutId
    prompt_ids: np.ndarray
    # [P] int32, with the pads of media
    output_ids: np.ndarray
    # [T] int32, with the token that ends each turn
    is_policy: np.ndarray
    # [T] bool: sampled by the policy; tool output is not
    logprobs: np.ndarray
    # [T] float32: natural logarithm of each sampled token's probability at temperature 1; 0 where not sampled
    versions: np.ndarray
    # [T] int32: of the weights that sampled it, -1 where not sampled
    routes: np.ndarray | None = None
    # [P + T, L, K] int16: experts that each token was sent to, -1 where unknown (then routed live)
    finish_reason: str = "stop"
    # of FINISHES; "failed": the environment broke, which costs this rollout alone
    rewards: Mapping[str, float] = field(default_factory=dict)
    # by name; empty until scored
    text: str = ""
    # of the last turn, for logs and rewards
    picks: Picks | None = None
    # keys that attention selected, of a share of the tokens that chose the next one

    def __post_init__(self) -> None:
        length = len(self.output_ids)
        if not len(self.is_policy) == len(self.logprobs) == len(self.versions) == length:
            raise ValueError(f"{self.id}: ids, mask, log-probabilities and versions must be equally long")
        if self.finish_reason not in FINISHES:
            raise ValueError(f"{self.id}: finish_reason is {self.finish_reason!r}; give one of {', '.join(FINISHES)}")
        if self.routes is not None and self.routes.shape[0] != len(self.prompt_ids) + length:
            raise ValueError(f"{self.id}: routes of {self.routes.shape[0]} tokens, {len(self.prompt_ids) + length} expected")
        if self.picks is not None and len(places := self.picks.places_N) and places[-1] >= len(self.prompt_ids) + length:
            raise ValueError(f"{self.id}: picks of token {places[-1]} of {len(self.prompt_ids) + length}")

    @property
    def num_policy_tokens(self) -> int:
        return int(self.is_policy.sum())

    def age(self, version: int) -> int:
        """How many versions ago its oldest token was sampled."""
        sampled = self.versions[self.is_policy]
        return 0 if not len(sampled) else version - int(sampled.min())


@dataclass(frozen=True)
class TokenStreams:
    """What each output token of a rollout counts for in the loss (design after prime-rl); algorithms make these, the learner
    never changes. Each kind is divided by its own count over the whole step: L = sum L_rl / N_rl + sum L_ce / N_ce + ...
    """

    advantages: np.ndarray
    # [T] float32
    rl_weights: np.ndarray
    # [T] float32: of the policy loss; 0 leaves a token out
    ce_weights: np.ndarray
    # [T] float32: of plain imitation
    ref_kl_weights: np.ndarray
    # [T] float32: of the divergence from a reference policy, whose log-probabilities come beside
    ref_logprobs: np.ndarray | None = None
    # [T] float32
    support_ids: np.ndarray | None = None
    # [T, K] int32: tokens over which a teacher is compared with the student, -1 where unused
    support_logprobs: np.ndarray | None = None
    # [T, K] float32: the teacher's
