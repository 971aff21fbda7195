"""What a step's losses are divided by and made of, as functions of tensors; and the figures that wait on the device.

Letters: T tokens, E experts, L layers.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepCounts:
    """Of one step, over all packs of all ranks: what sums are divided by, so that no plan changes the loss."""

    num_tokens: int
    num_learnt: int
    num_packs: int


@dataclass(frozen=True)
class ExpertLoad:
    """Sums of one pack, or of more when added up."""

    num_picks_LE: Tensor
    # how often each expert was picked
    probability_LE: Tensor
    # the router's probabilities, summed over tokens; with gradients

    def joined(self) -> Tensor:
        """[2, L, E] without gradients, to be added up."""
        return torch.stack([self.num_picks_LE, self.probability_LE.detach()])


def expert_load(router_logits: Iterable[Tensor], num_experts_per_token: int) -> ExpertLoad:
    """The load of one pack from the router's logits [T, E] of every layer."""
    picks, sums = [], []
    for logits_TE in router_logits:
        probability_TE = logits_TE.float().softmax(dim=-1)
        chosen = probability_TE.detach().topk(num_experts_per_token, dim=-1).indices.flatten()
        ones = torch.ones_like(chosen, dtype=torch.float32)
        picks.append(ones.new_zeros(logits_TE.shape[1]).index_add(0, chosen, ones))
        sums.append(probability_TE.sum(dim=0))
    return ExpertLoad(torch.stack(picks), torch.stack(sums))


def balance_loss(share_LE: Tensor, probability_LE: Tensor, num_tokens: int) -> Tensor:
    """E * sum_e (share of picks that went to e) * (mean probability of e), mean over layers: 1 where the load is even.

    Switch Transformer eq. 4, with shares of all picks. The shares are those of all packs of all ranks; a pack's summed
    probabilities over the number of all packs' tokens are its summand.
    """
    num_experts = share_LE.shape[1]
    return num_experts * (share_LE.detach() * probability_LE).sum() / (num_tokens * share_LE.shape[0])


@dataclass
class Figures:
    """Ratios that add up over packs, steps and ranks: (numerator, denominator) by name, on the device until fetched."""

    pairs: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, numerator: Tensor, denominator: float) -> None:
        """One more summand of a ratio; the numerator is a 0-dimensional tensor on the device. NaN says that there is none."""
        top = numerator.detach().float()
        bottom = torch.where(top.isnan(), 0.0, denominator)
        pair = torch.stack([top.nan_to_num(nan=0.0), bottom])
        self.pairs[name] = self.pairs[name] + pair if name in self.pairs else pair

    def fetch(self) -> dict[str, tuple[float, float]]:
        """All pairs on the host, in one wait for the device; then there are none."""
        pairs, self.pairs = self.pairs, {}
        if not pairs:
            return {}
        table = torch.stack(list(pairs.values())).tolist()
        return {name: (top, bottom) for name, (top, bottom) in zip(pairs, table, strict=True)}


def merge(fetched: Iterable[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """The ratios of all ranks' pairs."""
    sums: dict[str, tuple[float, float]] = {}
    for pairs in fetched:
        for name, (top, bottom) in pairs.items():
            old_top, old_bottom = sums.get(name, (0.0, 0.0))
            sums[name] = (old_top + top, old_bottom + bottom)
    return {name: top / bottom for name, (top, bottom) in sums.items() if bottom}
