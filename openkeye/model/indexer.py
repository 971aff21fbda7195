"""The lightning indexer: a small scorer that names the positions each query attends to (report, DSA for GQA)."""

from torch import Tensor, nn

from openkeye.kernels.dispatch import index_norm_rotary
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
        weights = (self.q_norm.weight, self.k_norm.weight, self.k_norm.bias)
        return IndexerOutput(
            *index_norm_rotary(self.q_proj(hidden_TD), self.k_proj(hidden_TD), *weights, cos_TI, sin_TI, self.q_norm.eps)
        )
