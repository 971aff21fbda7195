"""Muon for the matrices of the trunk, AdamW for the rest, on fp32 master weights beside bf16 parameters.

Muon orthogonalises the momentum of each matrix by a Newton-Schulz iteration (Jordan et al. 2024), with the update scaled by
0.2 * sqrt(max(rows, columns)) so that its size matches AdamW's (Liu et al. 2025).

A small network's step is as long as its number of operations, so parameters that share a rule (and, for Muon, a shape) live in
one tensor and are stepped at once.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

MUON_MOMENTUM = 0.95


@dataclass
class ParameterGroup:
    """Parameters that share a rule and a peak learning rate."""

    name: str
    rule: str
    # "muon" or "adamw"
    parameters: list[nn.Parameter]
    learning_rate: float
    weight_decay: float = 0.0


@dataclass
class _Bundle:
    """Parameters stepped at once: matrices of one shape stacked, or everything of an AdamW group flattened."""

    group: ParameterGroup
    parameters: list[nn.Parameter]
    is_stack: bool
    master: Tensor = field(init=False)
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.master = self.join([parameter.detach() for parameter in self.parameters]).float()
        self.first = torch.zeros_like(self.master, dtype=torch.bfloat16 if self.is_stack else torch.float32)
        self.second = self.master.new_zeros(0) if self.is_stack else torch.zeros_like(self.master)

    def join(self, tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors) if self.is_stack else torch.cat([tensor.flatten() for tensor in tensors])

    def split(self, joined: Tensor) -> list[Tensor]:
        """The parts of a joined tensor, shaped as the parameters."""
        if self.is_stack:
            return list(joined.unbind())
        parts = joined.split([parameter.numel() for parameter in self.parameters])
        return [part.view_as(parameter) for part, parameter in zip(parts, self.parameters, strict=True)]


class Optimizer:
    """Steps on fp32 master weights and copies them into the (bf16 or fp32) parameters.

    A step whose gradient is not finite changes nothing but the momenta, and is counted in `num_skipped`. Counts and rates stay
    on the device, so that a step can be recorded once and replayed.
    """

    def __init__(self, groups: list[ParameterGroup], clip: float = 1.0, betas: tuple[float, float] = (0.9, 0.98)) -> None:
        self.clip = clip
        self.betas = betas
        self.bundles = [bundle for group in groups for bundle in _bundles(group)]
        self.num_steps = self.bundles[0].master.new_zeros(())
        self.num_skipped = self.bundles[0].master.new_zeros(())

    @torch.no_grad()
    def step(self, learning_rate_scale: Tensor, only: str | None = None) -> Tensor:
        """One update from the parameters' gradients, which are then dropped. Returns the gradient norm before clipping.

        `learning_rate_scale` (a 0-dimensional float32 tensor) multiplies the groups' peak rates. With `only`, the other
        groups stay as they are, momenta included.
        """
        self.num_steps += 1
        bundles = [bundle for bundle in self.bundles if only is None or bundle.group.name == only]
        gradients = [
            bundle.join([torch.zeros_like(p) if p.grad is None else p.grad for p in bundle.parameters]).float()
            for bundle in bundles
        ]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        is_finite = torch.isfinite(norm)
        self.num_skipped += (~is_finite).float()
        factor = torch.where(is_finite, (self.clip / (norm + 1e-6)).clamp(max=1.0), norm.new_zeros(()))
        for bundle, gradient in zip(bundles, gradients, strict=True):
            gradient.nan_to_num_(0.0, 0.0, 0.0).mul_(factor)
            rate = bundle.group.learning_rate * learning_rate_scale
            bundle.master.mul_(1 - rate * bundle.group.weight_decay)
            if bundle.is_stack:
                _muon(bundle, gradient, rate)
            else:
                self._adamw(bundle, gradient, rate)
            torch._foreach_copy_([p.data for p in bundle.parameters], bundle.split(bundle.master))
        for bundle in self.bundles:
            for parameter in bundle.parameters:
                parameter.grad = None
        return norm

    def _adamw(self, bundle: _Bundle, gradient: Tensor, rate: Tensor) -> None:
        beta_1, beta_2 = self.betas
        bundle.first.lerp_(gradient, 1 - beta_1)
        bundle.second.mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
        denominator = (bundle.second.sqrt() / (1 - beta_2**self.num_steps).sqrt()).add_(1e-8)
        bundle.master.sub_((bundle.first / denominator).mul_(rate / (1 - beta_1**self.num_steps)))

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name."""
        state = {"num_steps": self.num_steps, "num_skipped": self.num_skipped}
        for number, bundle in enumerate(self.bundles):
            state[f"master.{number}"] = bundle.master
            state[f"first.{number}"] = bundle.first
            if bundle.second.numel():
                state[f"second.{number}"] = bundle.second
        return state

    @torch.no_grad()
    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Take up the state of an earlier `state_tensors` of the same groups; the parameters follow the master weights."""
        self.num_steps.copy_(state["num_steps"])
        self.num_skipped.copy_(state["num_skipped"])
        for number, bundle in enumerate(self.bundles):
            bundle.master.copy_(state[f"master.{number}"])
            bundle.first.copy_(state[f"first.{number}"])
            if bundle.second.numel():
                bundle.second.copy_(state[f"second.{number}"])
            torch._foreach_copy_([p.data for p in bundle.parameters], bundle.split(bundle.master))


def _bundles(group: ParameterGroup) -> list[_Bundle]:
    if not group.parameters:
        return []
    if group.rule == "adamw":
        return [_Bundle(group, group.parameters, is_stack=False)]
    assert group.rule == "muon", group.rule
    by_shape: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
    for parameter in group.parameters:
        by_shape[tuple(parameter.shape)].append(parameter)
    return [_Bundle(group, parameters, is_stack=True) for parameters in by_shape.values()]


def _muon(bundle: _Bundle, gradient: Tensor, rate: Tensor) -> None:
    narrow = gradient.bfloat16()
    bundle.first.lerp_(narrow, 1 - MUON_MOMENTUM)
    # Nesterov: look one momentum step ahead.
    ahead = narrow.lerp_(bundle.first, MUON_MOMENTUM)
    shape = ahead.shape
    direction = orthogonalise(ahead.reshape(-1, *shape[-2:])).reshape(shape)
    bundle.master.sub_(direction * (rate * 0.2 * max(shape[-2:]) ** 0.5))


def orthogonalise(matrices_NRC: Tensor, num_iterations: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrix of each, approximately: quintic Newton-Schulz in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices_NRC.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.transpose(-2, -1)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(num_iterations):
        gram = torch.bmm(x, x.transpose(-2, -1))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(-2, -1) if is_tall else x
