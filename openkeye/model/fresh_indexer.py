"""Weights of lightning indexers that nobody has taught yet.

Letters: D hidden width, J indexer heads, I indexer width.
"""

import torch
from torch import Tensor

from openkeye.model.config import KeyeConfig

SCORE_STD = 0.3
# of fresh index scores: their softmax is then neither flat nor decided (paper notes on GQA re-implementations)


def fresh_indexers(config: KeyeConfig, gains: list[Tensor], seed: int) -> dict[str, Tensor]:
    """Every layer's indexer under its published names, in `config.dtype`; the seed decides all of it.

    Queries and keys are normed, so that the size of their projections does not matter (normal, variance 1 / D), and
    q_j . k / sqrt(I) has about the variance 1. A score is then the sum over J heads of gate_j * relu(normal). A gate is a row
    of the projection times the normed hidden state, whose square sums to D * mean(gain^2), and relu keeps half the variance:
    the scores' standard deviation is std(row) * sqrt(D * mean(gain^2) * J / 2). Gains of trained layers differ by a hundred
    times, so that each layer has its own std(row), which makes this 0.3.

    Args:
        gains: of every layer's input norm, [D].
        seed: of a generator on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    width, heads, dtype = config.indexer.head_dim, config.indexer.num_heads, getattr(torch, config.dtype)
    hidden = config.hidden_size
    tensors: dict[str, Tensor] = {}
    for number, gain in enumerate(gains):
        size = float(gain.float().square().mean().sqrt().clamp_min(1e-6)) * hidden**0.5
        query = torch.randn(heads * width, hidden, generator=generator) * hidden**-0.5
        key = torch.randn(width, hidden, generator=generator) * hidden**-0.5
        gates = torch.randn(heads, hidden, generator=generator) * (SCORE_STD / (size * (heads / 2) ** 0.5))
        layer = {
            "q_proj.weight": torch.cat([query, gates]),
            "k_proj.weight": key,
            "q_norm.weight": torch.ones(width),
            "k_norm.weight": torch.ones(width),
            "k_norm.bias": torch.zeros(width),
        }
        tensors |= {f"model.layers.{number}.self_attn.sa_indexer.{name}": part.to(dtype) for name, part in layer.items()}
    return tensors
