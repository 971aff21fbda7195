"""The lightning indexer: a small scorer that names the positions each query attends to (report, DSA for GQA)."""

from torch import Tensor, nn

from openkeye.kernels.dispatch import apply_rotary, hadamard, layer_norm, rms_norm, widen
from openkeye.model.config import KeyeConfig
from openkeye.model.norm import RmsNorm
from openkeye.model.past import IndexerOutput


class Indexer(nn.Module):
    """Projections, norms, rotary and Hadamard of the indexer; scoring and selection belong to the past."""

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.indexer.num_heads, config.indexer.head_dim
        rows = self.num_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, rows + self.num_heads, bias=False)
        # the last num_heads rows are the gates
        self.k_proj = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.q_norm = RmsNorm(self.head_dim, 1e-6)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6)

    def forward(self, hidden_TD: Tensor, cos_TI: Tensor, sin_TI: Tensor) -> IndexerOutput:
        """The indexer's view of each token, from the same normalised hidden state that feeds q, k and v."""
        projected = self.q_proj(hidden_TD)
        rows = self.num_heads * self.head_dim
        query_TJI = projected[:, :rows].unflatten(-1, (self.num_heads, self.head_dim))
        gates_TJ = widen(projected[:, rows:]) * self.head_dim**-0.5
        query_TJI = rms_norm(query_TJI, self.q_norm.weight, self.q_norm.eps)
        key_TI = layer_norm(self.k_proj(hidden_TD), self.k_norm.weight, self.k_norm.bias, self.k_norm.eps)
        query_TJI = hadamard(apply_rotary(query_TJI, cos_TI, sin_TI))
        key_TI = hadamard(apply_rotary(key_TI[:, None], cos_TI, sin_TI))[:, 0]
        return IndexerOutput(query_TJI, gates_TJ, key_TI)
