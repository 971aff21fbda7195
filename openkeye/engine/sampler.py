"""The next token from logits: greedy, temperature, top-k, top-p; every request draws from a generator of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from openkeye.engine.config import SamplingParameters

SMALLEST_TEMPERATURE = 1e-5
# below it the likeliest token is taken: logits divided by less may leave the range of float32


def sample(logits_V: Tensor, sampling: SamplingParameters, generator: torch.Generator) -> int:
    """One token id. Draws on the host in fp32, so that a seed gives the same answer alone or in any batch.

    Args:
        logits_V: [V] of one request.
        sampling: how to choose.
        generator: the request's own, on the host; untouched by greedy choice.
    """
    if sampling.temperature < SMALLEST_TEMPERATURE:
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


def sample_batch(
    logits_BV: Tensor, samplings: Sequence[SamplingParameters], generators: Sequence[torch.Generator]
) -> list[int]:
    """`sample` of every row; all greedy ones in one read from the device."""
    likeliest = logits_BV.argmax(dim=-1).tolist()
    return [
        greedy if sampling.temperature < SMALLEST_TEMPERATURE else sample(logits, sampling, generator)
        for greedy, logits, sampling, generator in zip(likeliest, logits_BV, samplings, generators, strict=True)
    ]


def log_probabilities(logits: Tensor) -> Tensor:
    """[..., V] float32: natural logarithms of the probabilities that the model itself gives every token."""
    return logits.float().log_softmax(dim=-1)


def token_logprobs(logits_V: Tensor, token: int, count: int | None) -> tuple[float | None, list[tuple[int, float]]]:
    """What `SamplingParameters.logprobs` asks for: the token's logprob, and (id, logprob) of the `count` likeliest tokens.

    The likeliest come first, equal ones by id. None asks for nothing: (None, []).
    """
    if count is None:
        return None, []
    logprobs = log_probabilities(logits_V)
    values, tokens = logprobs.topk(min(count, logprobs.shape[0]))
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    return float(logprobs[token]), sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
