"""Grouped-query attention over what the past selects."""

from dataclasses import dataclass

from torch import Tensor, nn

from openkeye.kernels.dispatch import norm_rotary
from openkeye.model.config import KeyeConfig
from openkeye.model.indexer import Indexer
from openkeye.model.norm import RmsNorm
from openkeye.model.past import IndexerOutput
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

    def project(
        self, hidden_TD: Tensor, rotary: RotaryTables, needs_index: bool
    ) -> tuple[Tensor, Tensor, Tensor, IndexerOutput | None]:
        """Query [T, H, D], key and value [T, G, D] and the indexer's output of normalised hidden states [T, hidden]."""
        value = self.v_proj(hidden_TD).unflatten(-1, (-1, self.head_dim))
        weights = (self.q_norm.weight, self.k_norm.weight)
        query, key = norm_rotary(
            self.q_proj(hidden_TD), self.k_proj(hidden_TD), *weights, rotary.cos, rotary.sin, self.q_norm.eps
        )
        # Detached: the indexer learns from its own loss and never through the trunk (report, sparse adaptation).
        index = self.sa_indexer(hidden_TD.detach(), rotary.index_cos, rotary.index_sin) if needs_index else None
        return query, key, value, index

    def forward(self, attended_THD: Tensor) -> Tensor:
        """What attention gathered, back to the residual stream: [T, H, D] -> [T, hidden]."""
        return self.shard.add(self.o_proj(attended_THD.flatten(1)))
