"""`RecordedAnswer`: what a policy sampled, with everything that learning asks of it.

Letters: S tokens of prompt and answer, L layers, K experts a token or keys that it selects; N tokens whose keys are kept.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Union

import numpy as np
import torch
from torch import Tensor

DRAW_BITS = 53
# of a number in [0, 1) as a float holds them


@dataclass(frozen=True)
class Picks:
    """The keys that attention selected, of some tokens that had to choose."""

    places_N: np.ndarray
    # int32, rising: which tokens of prompt and answer
    keys_NLK: np.ndarray
    # int32, rising, as places in prompt and answer; -1 in front where there are fewer

    def __post_init__(self) -> None:
        shape = self.keys_NLK.shape
        if len(shape) != 3 or self.places_N.shape != shape[:1]:
            raise ValueError(f"picks of {list(self.places_N.shape)} tokens with keys {list(shape)}; give [N] and [N, L, K]")

    def joined(self, later: Union["Picks", None]) -> "Picks":
        """With those of tokens behind these."""
        if later is None:
            return self
        both = zip((self.places_N, self.keys_NLK), (later.places_N, later.keys_NLK), strict=True)
        return Picks(*(np.concatenate(pair) for pair in both))


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
    known_picks: Picks | None = None
    # of tokens before an interruption
    picks: dict[int, list[Tensor]] = field(default_factory=dict)
    # since then, by token: [K] int32 of every layer, where the engine computes

    def add_pick(self, place: int, layer_index: int, picked_K: Tensor) -> None:
        """A layer's selected keys of a token; layers come in order, and a pass that is run again begins anew."""
        # (a copy: the row alone, not the selection of a whole prompt)
        self.picks[place] = [*(self.picks[place] if layer_index else ()), picked_K.clone()]

    def all_picks(self) -> Picks | None:
        """On the host; None where nothing was kept."""
        if not self.picks:
            return self.known_picks
        places = sorted(self.picks)
        keys_NLK = torch.stack([torch.stack(self.picks[place]) for place in places]).sort(dim=-1).values
        own = Picks(np.array(places, dtype=np.int32), keys_NLK.int().cpu().numpy())
        return own if self.known_picks is None else self.known_picks.joined(own)

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
