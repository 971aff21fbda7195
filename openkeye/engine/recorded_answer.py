"""`RecordedAnswer`: what a policy sampled, with everything that learning asks of it.

Letters: S tokens of prompt and answer, L layers, K experts a token.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np

DRAW_BITS = 53
# of a number in [0, 1) as a float holds them


@dataclass
class RecordedAnswer:
    """The sampled tokens of one request, in order, the one that ended it included."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    # natural logarithms of their probabilities at temperature 1, of the model's own logits in float32
    versions: list[int] = field(default_factory=list)
    # of the weights that sampled each
    routes_SLK: np.ndarray | None = None
    # int16, of prompt and answer: of the pass by which each token was first computed, -1 where none has; None: not recorded
    has_mixed_keys: bool = False
    # whether some were sampled over keys that older weights had made

    def keep_routes(self, routes_SLK: np.ndarray) -> None:
        """Take the routes of tokens that have none yet: those by which something was sampled stay."""
        routes_SLK = routes_SLK.copy()
        if self.routes_SLK is not None:
            known = self.routes_SLK[: len(routes_SLK)]
            routes_SLK[: len(known)] = np.where(known >= 0, known, routes_SLK[: len(known)])
            routes_SLK = np.concatenate([routes_SLK, self.routes_SLK[len(routes_SLK) :]])
        self.routes_SLK = routes_SLK

    def add(self, token: int, logprob: float, version: int) -> None:
        """One more token."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)


def uniform_at(seed: int, place: int) -> float:
    """A number in [0, 1) that seed and place alone decide: an answer that goes on elsewhere draws as it would have here."""
    digest = hashlib.blake2b(f"{seed}:{place}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> (64 - DRAW_BITS)) / (1 << DRAW_BITS)
