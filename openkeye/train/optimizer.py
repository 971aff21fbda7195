"""Muon for the matrices of the trunk, AdamW for the rest, on fp32 master weights beside bf16 parameters.

Muon orthogonalises the momentum of each matrix by a Newton-Schulz iteration (Jordan et al. 2024), with the update scaled by
0.2 * sqrt(max(rows, columns)) so that its size matches AdamW's (Liu et al. 2025). Matrices of one shape go through one batched product.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class ParameterGroup:
    """Parameters that share a rule and a peak learning rate."""

    name: str
    rule: str
    # "muon" or "adamw"
    parameters: list[nn.Parameter]
    learning_rate: float
    weight_decay: float = 0.0


class Optimizer:
    """Steps on fp32 master weights and copies them into the (bf16 or fp32) parameters.

    A step whose gradient is not finite changes nothing but the momenta, and is counted in `num_skipped` on the device.
    """

    def __init__(self, groups: list[ParameterGroup], clip: float = 1.0, betas: tuple[float, float] = (0.9, 0.98)) -> None:
        self.groups = groups
        self.clip = clip
        self.betas = betas
        self.num_steps = 0
        self.parameters = [parameter for group in groups for parameter in group.parameters]
        self.master = [parameter.detach().float().clone() for parameter in self.parameters]
        rules = [group.rule for group in groups for _ in group.parameters]
        self.first = [
            torch.zeros_like(m, dtype=torch.bfloat16 if r == "muon" else torch.float32)
            for m, r in zip(self.master, rules, strict=True)
        ]
        self.second = [torch.zeros_like(m) if r == "adamw" else m.new_zeros(0) for m, r in zip(self.master, rules, strict=True)]
        self.num_skipped = self.master[0].new_zeros(())

    @torch.no_grad()
    def step(self, learning_rate_scale: float, only: str | None = None) -> Tensor:
        """One update from the parameters' gradients, which are then dropped. Returns the gradient norm before clipping.

        With `only`, the other groups stay as they are, momenta included.
        """
        self.num_steps += 1
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)))
        is_finite = torch.isfinite(norm)
        self.num_skipped += (~is_finite).float()
        factor = torch.where(is_finite, (self.clip / (norm + 1e-6)).clamp(max=1.0), norm.new_zeros(()))
        gradients = [torch.where(is_finite, gradient, 0.0) for gradient in gradients]
        wide = [torch.empty_like(m) for m in self.master]
        torch._foreach_copy_(wide, gradients)
        torch._foreach_mul_(wide, factor)
        gradients = wide
        start = 0
        for group in self.groups:
            entries = range(start, start + len(group.parameters))
            start = entries.stop
            if only is not None and group.name != only:
                continue
            rate = group.learning_rate * learning_rate_scale
            update = self._muon if group.rule == "muon" else self._adamw
            update(entries, gradients, rate, group.weight_decay)
        torch._foreach_copy_([p.data for p in self.parameters], self.master)
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def _muon(self, entries: range, gradients: list[Tensor], rate: float, weight_decay: float) -> None:
        span = slice(entries.start, entries.stop)
        master, first = self.master[span], self.first[span]
        narrow = [torch.empty_like(momentum) for momentum in first]
        torch._foreach_copy_(narrow, gradients[span])
        torch._foreach_lerp_(first, narrow, 0.05)
        # Nesterov: look one momentum step ahead.
        torch._foreach_lerp_(narrow, first, 0.95)
        by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, momentum in enumerate(first):
            by_shape[tuple(momentum.shape)].append(number)
        torch._foreach_mul_(master, 1 - rate * weight_decay)
        for shape, members in by_shape.items():
            ahead = torch.stack([narrow[number] for number in members])
            direction = orthogonalise(ahead.reshape(-1, *shape[-2:])).reshape(ahead.shape).float()
            scale = 0.2 * max(shape[-2:]) ** 0.5
            torch._foreach_add_([master[number] for number in members], list(direction.unbind()), alpha=-rate * scale)

    def _adamw(self, entries: range, gradients: list[Tensor], rate: float, weight_decay: float) -> None:
        if not entries:
            return
        span = slice(entries.start, entries.stop)
        beta_1, beta_2 = self.betas
        master, first, second, gradient = self.master[span], self.first[span], self.second[span], gradients[span]
        torch._foreach_mul_(first, beta_1)
        torch._foreach_add_(first, gradient, alpha=1 - beta_1)
        torch._foreach_mul_(second, beta_2)
        torch._foreach_addcmul_(second, gradient, gradient, value=1 - beta_2)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, (1 - beta_2**self.num_steps) ** 0.5)
        torch._foreach_add_(denominator, 1e-8)
        torch._foreach_mul_(master, 1 - rate * weight_decay)
        torch._foreach_addcdiv_(master, first, denominator, value=-rate / (1 - beta_1**self.num_steps))

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name."""
        state = {"num_steps": torch.tensor(self.num_steps), "num_skipped": self.num_skipped}
        for entry in range(len(self.master)):
            state[f"master.{entry}"] = self.master[entry]
            state[f"first.{entry}"] = self.first[entry]
            if self.second[entry].numel():
                state[f"second.{entry}"] = self.second[entry]
        return state

    @torch.no_grad()
    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Take up the state of an earlier `state_tensors` of the same groups; the parameters follow the master weights."""
        self.num_steps = int(state["num_steps"])
        self.num_skipped.copy_(state["num_skipped"])
        for entry in range(len(self.master)):
            self.master[entry].copy_(state[f"master.{entry}"])
            self.first[entry].copy_(state[f"first.{entry}"])
            if self.second[entry].numel():
                self.second[entry].copy_(state[f"second.{entry}"])
            self.parameters[entry].copy_(self.master[entry])


def orthogonalise(matrices_NRC: Tensor, num_iterations: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrix of each, approximately: quintic Newton-Schulz in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices_NRC.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.transpose(-2, -1)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(num_iterations):
        gram = x @ x.transpose(-2, -1)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(-2, -1) if is_tall else x
