"""`RecordedAnswer`: what a policy sampled, with everything that learning asks of it."""

import hashlib
from dataclasses import dataclass, field

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
    has_mixed_keys: bool = False
    # whether some were sampled over keys that older weights had made

    def add(self, token: int, logprob: float, version: int) -> None:
        """One more token."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)


def uniform_at(seed: int, place: int) -> float:
    """A number in [0, 1) that seed and place alone decide: an answer that goes on elsewhere draws as it would have here."""
    digest = hashlib.blake2b(f"{seed}:{place}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> (64 - DRAW_BITS)) / (1 << DRAW_BITS)
