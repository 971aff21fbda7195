"""Grouped-query attention over what the past selects."""

from dataclasses import dataclass

from torch import Tensor, nn

from openkeye.kernels.dispatch import apply_rotary
from openkeye.model.config import KeyeConfig
from openkeye.model.indexer import Indexer
from openkeye.model.norm import RmsNorm
from openkeye.model.past import Past


@dataclass(frozen=True)
class RotaryTables:
    """cos and sin of the new tokens, for attention [T, D] and for the indexer [T, I]."""

    cos: Tensor
    sin: Tensor
    index_cos: Tensor
    index_sin: Tensor


class Attention(nn.Module):
    """Projections, per-head norms and rotary; the past appends, selects and attends."""

    def __init__(self, config: KeyeConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        width, num_kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, num_kv, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, num_kv, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = RmsNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RmsNorm(config.head_dim, config.rms_norm_eps)
        self.sa_indexer = Indexer(config)

    def forward(self, hidden_TD: Tensor, rotary: RotaryTables, past: Past) -> Tensor:
        """Normalised hidden states [T, D] -> [T, D]."""
        query, key, value = (
            projection(hidden_TD).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = apply_rotary(self.q_norm(query), rotary.cos, rotary.sin)
        key = apply_rotary(self.k_norm(key), rotary.cos, rotary.sin)
        # Detached: the indexer learns from its own loss and never through the trunk (report, sparse adaptation).
        index = self.sa_indexer(hidden_TD.detach(), rotary.index_cos, rotary.index_sin) if past.needs_index else None
        return self.o_proj(past.attend(self.layer_index, query, key, value, index).flatten(1))
