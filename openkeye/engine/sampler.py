"""The next token from logits: greedy, temperature, top-k, top-p; every request draws from a generator of its own."""

import torch
from torch import Tensor

from openkeye.engine.config import SamplingParameters


def sample(logits_V: Tensor, sampling: SamplingParameters, generator: torch.Generator) -> int:
    """One token id. Draws on the host in fp32, so that a seed gives the same answer alone or in any batch.

    Args:
        logits_V: [V] of one request.
        sampling: how to choose.
        generator: the request's own, on the host; untouched by greedy choice.
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits = logits_V.float().cpu() / sampling.temperature
    ordered, tokens = logits.sort(descending=True, stable=True)
    if sampling.top_k:
        ordered, tokens = ordered[: sampling.top_k], tokens[: sampling.top_k]
    probabilities = ordered.softmax(dim=-1)
    # A token stays while the ones before it hold less than top_p: the first always does.
    is_kept = probabilities.cumsum(dim=-1) - probabilities < sampling.top_p
    probabilities = probabilities * is_kept
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])
