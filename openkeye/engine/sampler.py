"""The next token from logits: greedy, temperature, top-k, top-p; every request draws from a generator of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from openkeye.engine.config import SamplingParameters

SMALLEST_TEMPERATURE = 1e-5
# below it the likeliest token is taken: logits divided by less may leave the range of float32


Draw = torch.Generator | float
# a request's own generator, on the host, or a number in [0, 1) that was drawn for this token


def sample(logits_V: Tensor, sampling: SamplingParameters, draw: Draw) -> int:
    """One token id. Draws on the host in fp32, so that a seed gives the same answer alone or in any batch.

    Args:
        logits_V: [V] of one request.
        sampling: how to choose.
        draw: a generator is untouched by greedy choice.
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
    if isinstance(draw, float):
        return int(tokens[_at(probabilities[None], torch.tensor([draw]))])
    return int(tokens[torch.multinomial(probabilities, 1, generator=draw)])


def sample_batch(logits_BV: Tensor, samplings: Sequence[SamplingParameters], draws: Sequence[Draw]) -> list[int]:
    """`sample` of every row; all greedy ones, and those that draw from everything by a number, in one read from the device."""
    rows = {row: draw for row, draw in enumerate(draws) if isinstance(draw, float) and _draws_from_all(samplings[row])}
    tokens_B = logits_BV.argmax(dim=-1)
    if rows:
        some = torch.tensor(list(rows), device=logits_BV.device)
        temperatures = torch.tensor([samplings[row].temperature for row in rows], device=logits_BV.device)
        probabilities = (logits_BV[some].float() / temperatures[:, None]).softmax(dim=-1)
        tokens_B[some] = _at(probabilities, torch.tensor(list(rows.values()), dtype=torch.float64, device=logits_BV.device))
    return [
        token if row in rows or sampling.temperature < SMALLEST_TEMPERATURE else sample(logits, sampling, draw)
        for row, (token, logits, sampling, draw) in enumerate(zip(tokens_B.tolist(), logits_BV, samplings, draws, strict=True))
    ]


def _draws_from_all(sampling: SamplingParameters) -> bool:
    return sampling.temperature >= SMALLEST_TEMPERATURE and sampling.top_p == 1 and not sampling.top_k


def _at(probabilities_BV: Tensor, draws_B: Tensor) -> Tensor:
    """[B] int64: where the running sum of a row passes its number in [0, 1)."""
    sums_BV = probabilities_BV.cumsum(dim=-1, dtype=torch.float64)
    places = torch.searchsorted(sums_BV, draws_B[:, None].double() * sums_BV[:, -1:], right=True)[:, 0]
    return places.clamp(max=probabilities_BV.shape[1] - 1)


def log_probabilities(logits: Tensor) -> Tensor:
    """[..., V] float32: natural logarithms of the probabilities that the model itself gives every token."""
    return logits.float().log_softmax(dim=-1)


def chosen_logprobs(logits_BV: Tensor, tokens: Sequence[int]) -> list[float]:
    """The logprob of one token of each row; a row's does not depend on the others."""
    chosen = torch.tensor(tokens, device=logits_BV.device)[:, None]
    return log_probabilities(logits_BV).gather(1, chosen)[:, 0].tolist()


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
