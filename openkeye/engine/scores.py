"""Log-probabilities of a given answer: its tokens run behind the prompt like a prompt's own, through the same pages."""

from collections.abc import Sequence

import torch
from torch import Tensor

from openkeye.engine.batch import Segment
from openkeye.engine.request import Request
from openkeye.engine.runner import Runner
from openkeye.engine.sampler import log_probabilities
from openkeye.engine.scheduler import Scheduler

SLAB_ROWS = 256
# tokens whose logits stand in memory at once: a row is as wide as the vocabulary


@torch.inference_mode()
def score_output(runner: Runner, scheduler: Scheduler, request: Request, tokens: Sequence[int]) -> list[float]:
    """Natural logarithm of the probability of each token, given the prompt and the tokens before it.

    The scheduler must have nothing else to do, and still holds the request afterwards.

    Raises:
        InputError: prompt and tokens do not fit the pages.
    """
    assert not scheduler.has_work, "scores are taken while no other request runs"
    request.output_ids = list(tokens)
    scheduler.add(request)
    logprobs: list[float] = []
    while len(logprobs) < len(tokens):
        batch = scheduler.wait_for_batch()
        (segment,) = batch.segments
        hidden = runner.run_hidden(batch)
        request.num_computed += segment.count
        scheduler.keep_full_pages(request)
        logprobs += _score_segment(runner, segment, hidden)
    return logprobs


def _score_segment(runner: Runner, segment: Segment, hidden_TD: Tensor) -> list[float]:
    """Of the given tokens that this segment's rows predict: the last token of the prompt predicts the first."""
    request = segment.request
    before = request.num_prompt - 1
    first, end = max(segment.start, before), min(segment.start + segment.count, before + len(request.output_ids))
    logprobs: list[float] = []
    for start in range(first, end, SLAB_ROWS):
        stop = min(start + SLAB_ROWS, end)
        logits = runner.logits(hidden_TD, torch.arange(start - segment.start, stop - segment.start))
        tokens = torch.tensor(request.output_ids[start - before : stop - before], device=logits.device)
        logprobs += log_probabilities(logits).gather(1, tokens[:, None])[:, 0].tolist()
    return logprobs
