"""The lightning indexer: a small scorer that names the positions each query attends to (report, DSA for GQA)."""

from torch import Tensor, nn

from openkeye.kernels.dispatch import index_norm_rotary, index_norm_rotary_write
from openkeye.kernels.layer_caches import LayerCaches
from openkeye.model.config import KeyeConfig
from openkeye.model.norm import RmsNorm
from openkeye.model.past import CachedIndex, IndexerOutput


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

    def forward(self, projected_TX: Tensor, key_TI: Tensor, cos_TI: Tensor, sin_TI: Tensor) -> IndexerOutput:
        """The indexer's view of each token, from `q_proj` and `k_proj` of the hidden state that feeds q, k and v."""
        return IndexerOutput(*index_norm_rotary(projected_TX, key_TI, *self._weights, cos_TI, sin_TI, self.q_norm.eps))

    def observe(self, hidden_TD: Tensor, cos_TI: Tensor, sin_TI: Tensor) -> IndexerOutput:
        """`forward` with its projections; one call, so that a trainer that shards parameters knows when they are needed."""
        return self.forward(self.q_proj(hidden_TD), self.k_proj(hidden_TD), cos_TI, sin_TI)

    def write(
        self, projected_TX: Tensor, key_TI: Tensor, cos_TI: Tensor, sin_TI: Tensor, slots_T: Tensor, caches: LayerCaches
    ) -> CachedIndex:
        """`forward`, keys going to their slots of the cache."""
        assert caches.index_key_SI is not None
        targets = (slots_T, caches.index_key_SI, caches.index_scales_S)
        return CachedIndex(
            *index_norm_rotary_write(projected_TX, key_TI, *self._weights, cos_TI, sin_TI, self.q_norm.eps, *targets)
        )

    @property
    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_norm.weight, self.k_norm.weight, self.k_norm.bias
