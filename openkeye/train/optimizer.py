"""AdamW, and Muon for matrices, on fp32 parameters that may be shared out among ranks.

Muon orthogonalises the momentum of each matrix by a Newton-Schulz iteration (Jordan et al. 2024), with the update scaled by
0.2 * sqrt(max(rows, columns)) so that its size matches AdamW's (Liu et al. 2025): one rate serves both.

Letters: N matrices, R rows, C columns.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from openkeye.train.groups import TrainedParameter
from openkeye.train.shard import own_part, own_rows, shard_group, whole

MUON_MOMENTUM = 0.95
BETAS = (0.9, 0.98)


@dataclass(frozen=True)
class Moments:
    """What a parameter's steps leave behind, shared out as the parameter is."""

    first: Tensor
    second: Tensor | None
    # AdamW's; Muon has none, but for the rows that it leaves to AdamW
    num_steps: Tensor
    # fp32, of AdamW's bias correction

    def tensors(self) -> dict[str, Tensor]:
        """By name, for checkpoints."""
        tensors = {"first": self.first, "second": self.second, "num_steps": self.num_steps}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


class Optimizer:
    """Steps the parameters of a stage; what goes on into the next stage keeps its moments.

    A step whose gradient is not finite changes nothing and is counted in `num_skipped`. Nothing here waits for the device.
    """

    def __init__(self, device: torch.device, clip: float, weight_decay: float) -> None:
        self.clip = clip
        self.weight_decay = weight_decay
        self.parameters: list[TrainedParameter] = []
        self.moments: dict[str, Moments] = {}
        self.num_skipped = torch.zeros((), device=device)

    def train(self, parameters: Sequence[TrainedParameter]) -> None:
        """From now on these, and no others; moments of parameters that stop are dropped, new ones begin at zero."""
        self.parameters = list(parameters)
        self.moments = {one.name: self.moments.get(one.name) or _fresh_moments(one) for one in parameters}

    @torch.no_grad()
    def step(self, rates: Mapping[str, float]) -> Tensor:
        """One update at each part's rate from the parameters' gradients, which are then dropped; all ranks call it.

        Returns:
            the norm of all gradients before clipping, 0-dimensional.
        """
        norm = gradient_norm([one.parameter for one in self.parameters])
        is_finite = torch.isfinite(norm)
        self.num_skipped += (~is_finite).float()
        divisor = ((norm + 1e-6) / self.clip).clamp(min=1.0)
        groups: dict[tuple, list[TrainedParameter]] = defaultdict(list)
        for one in self.parameters:
            shape = tuple(one.parameter.shape) if one.rule == "muon" else ()
            groups[one.part, one.rule, one.decays, shape, one.num_adamw_rows, one.adamw_share].append(one)
        for (part, rule, decays, *_), group in groups.items():
            decay = self.weight_decay if decays else 0.0
            update = self._muon if rule == "muon" else self._adamw
            update(group, rates[part], decay, divisor, is_finite)
        for one in self.parameters:
            one.parameter.grad = None
        return norm

    def _adamw(self, group: list[TrainedParameter], rate: float, decay: float, divisor: Tensor, is_finite: Tensor) -> None:
        rate = rate * group[0].adamw_share
        # Ranks that hold no row of a short parameter have nothing to step.
        group = [one for one in group if own_part(one.parameter).numel()]
        moments = [self.moments[one.name] for one in group]
        adamw(
            [own_part(one.parameter) for one in group],
            [_own_gradient(one) for one in group],
            [own_part(one.first) for one in moments],
            [own_part(one.second) for one in moments if one.second is not None],
            [],
            [one.num_steps for one in moments],
            fused=True,
            grad_scale=divisor,
            found_inf=(~is_finite).float(),
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=rate,
            weight_decay=decay,
            eps=1e-8,
            maximize=False,
        )

    def _muon(self, group: list[TrainedParameter], rate: float, decay: float, divisor: Tensor, is_finite: Tensor) -> None:
        """Parameters of one shape, all matrices or all stacks of experts, with equally many last rows that are AdamW's."""
        parts = [own_part(one.parameter) for one in group]
        kept = is_finite.float()
        wide = [torch.where(is_finite, _own_gradient(one) / divisor, 0.0) for one in group]
        firsts = [own_part(self.moments[one.name].first) for one in group]
        gradients = [gradient.to(first.dtype) for gradient, first in zip(wide, firsts, strict=True)]
        for first, gradient in zip(firsts, gradients, strict=True):
            first.copy_(torch.where(is_finite, first.lerp(gradient, 1 - MUON_MOMENTUM), first))
        # Nesterov: look one momentum step ahead.
        aheads = [gradient.lerp(first, MUON_MOMENTUM) for first, gradient in zip(firsts, gradients, strict=True)]
        rows, columns = group[0].parameter.shape[-2] - group[0].num_adamw_rows, group[0].parameter.shape[-1]
        if group[0].parameter.ndim == 3:
            # Whole experts lie on each rank.
            sizes = [ahead.shape[0] for ahead in aheads]
            directions = list(orthogonalise(torch.cat(aheads)).split(sizes))
        else:
            stack = torch.stack([whole(ahead, one.parameter) for ahead, one in zip(aheads, group, strict=True)])
            own = [own_rows(one.parameter) for one in group]
            directions = [matrix[part] for matrix, part in zip(orthogonalise(stack[:, :rows]), own, strict=True)]
        scale = rate * 0.2 * max(rows, columns) ** 0.5 * kept
        for part, direction in zip(parts, directions, strict=True):
            part[: len(direction)].mul_(1 - rate * decay * kept).sub_(direction * scale)
        if group[0].num_adamw_rows:
            for one, part, gradient, direction in zip(group, parts, wide, directions, strict=True):
                last = slice(len(direction), None)
                self._adamw_rows(self.moments[one.name], part, gradient, last, rate * one.adamw_share, kept)

    def _adamw_rows(self, moments: Moments, part: Tensor, gradient: Tensor, rows: slice, rate: float, kept: Tensor) -> None:
        """Some rows of this rank's part; their first moment is Muon's, which is up to date by now."""
        assert moments.second is not None
        moments.num_steps.add_(kept)
        first, second = own_part(moments.first)[rows], own_part(moments.second)[rows]
        second.lerp_(gradient[rows].square(), (1 - BETAS[1]) * kept)
        num_steps = moments.num_steps.clamp(min=1)
        unbiased = (second / (1 - BETAS[1] ** num_steps)).sqrt_().add_(1e-8)
        part[rows].sub_(first / (1 - MUON_MOMENTUM**num_steps) / unbiased * (rate * kept))

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name; the tensors themselves, to be read or written in place."""
        state = {"num_skipped": self.num_skipped}
        for name, moments in self.moments.items():
            state |= {f"{name}.{kind}": tensor for kind, tensor in moments.tensors().items()}
        return state


def _fresh_moments(one: TrainedParameter) -> Moments:
    like = one.parameter.detach()
    num_steps = torch.zeros((), device=own_part(like).device)
    if one.rule == "muon" and not one.num_adamw_rows:
        return Moments(torch.zeros_like(like, dtype=torch.bfloat16), None, num_steps)
    return Moments(torch.zeros_like(like), torch.zeros_like(like), num_steps)


def _own_gradient(one: TrainedParameter) -> Tensor:
    gradient = one.parameter.grad
    return torch.zeros_like(own_part(one.parameter)) if gradient is None else own_part(gradient)


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """Of all gradients together, 0-dimensional, the same on every rank: squares add up over sharers."""
    by_group: dict[dist.ProcessGroup | None, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            by_group[shard_group(parameter)].append(own_part(parameter.grad))
    squares = []
    for group, gradients in by_group.items():
        square = torch.stack(torch._foreach_norm(gradients)).square().sum()
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(square, group=group)
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


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
