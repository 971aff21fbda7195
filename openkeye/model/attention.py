"""Grouped-query attention over what the past selects."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openkeye.kernels.dispatch import norm_rotary, norm_rotary_write
from openkeye.model.config import KeyeConfig
from openkeye.model.indexer import Indexer
from openkeye.model.norm import RmsNorm
from openkeye.model.past import CachedIndex, CachedPast, IndexerOutput
from openkeye.model.sharding import ALONE


@dataclass(frozen=True)
class RotaryTables:
    """cos and sin of the new tokens, for attention [T, D] and for the indexer [T, I]."""

    cos: Tensor
    sin: Tensor
    index_cos: Tensor
    index_sin: Tensor


class Attention(nn.Module):
    """Projections, per-head norms and rotary; between `project` and `forward` the past appends, selects and attends."""

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.shard = ALONE
        width, num_kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, num_kv, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, num_kv, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = RmsNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RmsNorm(config.head_dim, config.rms_norm_eps)
        self.sa_indexer = Indexer(config)
        self.joint_weight: Tensor | None = None
        # all projections' rows, after `join_projections`

    @torch.no_grad()
    def join_projections(self) -> None:
        """For answering: one matrix product makes queries, keys, values and the indexer's part of them.

        The projections' weights become views of the joint one and keep their names.
        """
        parts = self._projections()
        self.joint_weight = torch.cat([part.weight for part in parts])
        for part, rows in zip(parts, self.joint_weight.split([part.out_features for part in parts]), strict=True):
            part.weight = nn.Parameter(rows, requires_grad=False)

    def project(
        self, hidden_TD: Tensor, rotary: RotaryTables, needs_index: bool
    ) -> tuple[Tensor, Tensor, Tensor, IndexerOutput | None]:
        """Query [T, H, D], key and value [T, G, D] and the indexer's output of normalised hidden states [T, hidden]."""
        weights = (self.q_norm.weight, self.k_norm.weight)
        query, key, value = (part(hidden_TD) for part in self._projections()[:3])
        query, key = norm_rotary(query, key, *weights, rotary.cos, rotary.sin, self.q_norm.eps)
        value = value.unflatten(-1, (-1, self.head_dim))
        if not needs_index:
            return query, key, value, None
        # Detached: the indexer learns from its own loss and never through the trunk (report, sparse adaptation).
        still_TD = hidden_TD.detach()
        return query, key, value, self.sa_indexer.observe(still_TD, rotary.index_cos, rotary.index_sin)

    def write(
        self, hidden_TD: Tensor, rotary: RotaryTables, layer_index: int, past: CachedPast
    ) -> tuple[Tensor, CachedIndex | None]:
        """`project` for a past with caches: keys and values go to their slots, query and index come back."""
        caches, slots = past.caches(layer_index), past.new_slots_T
        parts = self._projections()[: None if past.needs_index else 3]
        if self.joint_weight is not None:
            widths = [part.out_features for part in parts]
            query, key, value, *index = F.linear(hidden_TD, self.joint_weight[: sum(widths)]).split(widths, dim=1)
        else:
            query, key, value, *index = (part(hidden_TD) for part in parts)
        weights = (self.q_norm.weight, self.k_norm.weight)
        query = norm_rotary_write(
            query,
            key,
            value,
            *weights,
            rotary.cos,
            rotary.sin,
            self.q_norm.eps,
            slots,
            caches.key_SGD,
            caches.value_SGD,
            caches.key_scales_SG,
            caches.value_scales_SG,
        )
        if not index:
            return query, None
        projected, index_key = index
        return query, self.sa_indexer.write(projected, index_key, rotary.index_cos, rotary.index_sin, slots, caches)

    def forward(self, attended_THD: Tensor) -> Tensor:
        """What attention gathered, back to the residual stream: [T, H, D] -> [T, hidden]."""
        return self.shard.add(self.o_proj(attended_THD.flatten(1)))

    def _projections(self) -> list[nn.Linear]:
        """In the order of their rows in the joint weight: the indexer's last, so that dense attention leaves them out."""
        return [self.q_proj, self.k_proj, self.v_proj, self.sa_indexer.q_proj, self.sa_indexer.k_proj]
