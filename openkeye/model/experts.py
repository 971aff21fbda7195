"""The mixture of experts: fp32 softmax over all experts, the best few, renormalised. Or one dense MLP in its place."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openkeye.kernels.dispatch import experts, experts_share, route, route_as
from openkeye.model.config import KeyeConfig
from openkeye.model.sharding import ALONE


class Experts(nn.Module):
    """The fused weights in the published, input-major layout; for answering they may be e4m3, with a scale an output column."""

    gate_up_scale: Tensor | None
    # float32 [experts, 2 F] and [experts, D] of weights in e4m3; they belong to no checkpoint
    down_scale: Tensor | None

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        shape = (config.num_experts, config.hidden_size, 2 * config.moe_intermediate_size)
        self.gate_up_proj = nn.Parameter(torch.empty(shape))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.moe_intermediate_size, config.hidden_size))
        self.register_buffer("gate_up_scale", None, persistent=False)
        self.register_buffer("down_scale", None, persistent=False)


class MixtureOfExperts(nn.Module):
    """Router and experts (spec: softmax over all, top-k, divided by their sum)."""

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)
        self.has_fixed_blocks = False
        # see `reference.experts`; answers that must not depend on their company set it
        self.shard = ALONE
        self.keeps_router_logits = False
        # training's load balance reads `router_logits` after each call; answering keeps nothing
        self.router_logits: Tensor | None = None
        self.replayed_TK: Tensor | None = None
        # experts that the next call's tokens go to (`reference_learning.route_as`); None: routed by the call's own logits
        self.rerouted_T: Tensor | None = None
        # bool, of the last call that replayed: whether a token's own choice would have been another
        self.keeps_picks = False
        # a rollout's routes are read from `picked_TK` after each call
        self.picked_TK: Tensor | None = None

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        logits = self.gate(x_TD)
        if self.keeps_router_logits:
            self.router_logits = logits
        if self.replayed_TK is None:
            picks = route(logits, self.num_experts_per_tok, self.norm_topk_prob)
        else:
            picks = route_as(logits, self.replayed_TK, self.norm_topk_prob)
            self.rerouted_T = differing_choices(logits, picks[1])
        if self.keeps_picks:
            self.picked_TK = picks[1]
        own = self.experts
        tensors, scales = (x_TD, own.gate_up_proj, own.down_proj, *picks), (own.gate_up_scale, own.down_scale)
        if self.shard.size == 1:
            return experts(*tensors, *scales, self.has_fixed_blocks)
        first_expert = self.shard.part(logits.shape[1]).start
        return self.shard.add(experts_share(*tensors, first_expert, *scales, self.has_fixed_blocks))


def differing_choices(logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """[T] bool: whether a token's own best experts are others than these, in whatever order."""
    own_TK = route(logits_TE.detach(), expert_ids_TK.shape[1], False)[1]
    return (own_TK.sort(dim=-1).values != expert_ids_TK.sort(dim=-1).values).any(dim=-1)


class DenseMlp(nn.Module):
    """silu(gate) * up, then down: what layers have whose configuration names no experts."""

    keeps_router_logits = False
    router_logits: Tensor | None = None
    # as `MixtureOfExperts` has them; there is no router

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.shard = ALONE

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return self.shard.add(self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD)))
