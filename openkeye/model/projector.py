"""The projector `mlp_AR`: 2x2 neighbouring patches become one token of the decoder's width."""

import torch.nn.functional as F
from torch import Tensor, nn

from openkeye.model.config import KeyeConfig


class Projector(nn.Module):
    """Merge, LayerNorm (after the merge, eps 1e-5), linear, exact GELU, linear."""

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        assert config.vision is not None
        self.merge = config.vision.spatial_merge_size
        merged = config.vision.hidden_size * self.merge**2
        self.pre_norm = nn.LayerNorm(merged, eps=1e-5)
        self.linear_1 = nn.Linear(merged, merged)
        self.linear_2 = nn.Linear(merged, config.hidden_size)

    def forward(self, x_NPD: Tensor, height: int, width: int) -> Tensor:
        """N pictures [N, height * width, D] -> [N * height * width / merge^2, hidden], merged tokens row-major.

        The 2x2 block is concatenated top-left, top-right, bottom-left, bottom-right.
        """
        m = self.merge
        blocks = x_NPD.unflatten(1, (height // m, m, width // m, m)).transpose(2, 3)
        merged = blocks.flatten(3).flatten(3).reshape(-1, m * m * x_NPD.shape[-1])
        return self.linear_2(F.gelu(self.linear_1(self.pre_norm(merged))))
