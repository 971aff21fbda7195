"""One rank of an engine at work, for test_parallel.py: python -m tests.engine.answers_of_ranks MODEL EXTENT OUTPUT [DEVICE].

EXTENT is whole, brief, or replayed: whole, and steps of answers under way go the way of captured graphs, which here compute.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from openkeye.common.launch import rank
from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.decode import DecodeRows
from openkeye.engine.graphs import StepRow
from openkeye.engine.loop import Engine
from openkeye.engine.parallel import follow
from openkeye.engine.runner import Runner
from openkeye.engine.sharded_past import decode_past
from openkeye.model.keye import KeyeModel
from tests.engine.conftest import frames_of_clip

TEXTS = ("Name the colours that you know, in any order.", "Count. " * 60, "Why?", "What can be seen at the end? " * 25)
QUESTIONS = ("When is the red circle visible?", "How many different objects appear in the video?")


class EagerSteps:
    """`DecodeGraphs` without graphs: from the same rows, with the same model call."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def run(self, rows: Sequence[StepRow]) -> torch.Tensor:
        model, caches = self.runner.model, self.runner.caches
        table = pad_sequence([torch.tensor(row.request.pages, dtype=torch.int32) for row in rows], batch_first=True)
        lengths = torch.tensor([row.length for row in rows], dtype=torch.int32)
        decode_rows = DecodeRows(torch.tensor([row.slot for row in rows]), table, lengths)
        past = decode_past(model.shard, decode_rows, caches, self.runner.attention, model.config.indexer.top_k)
        positions = torch.tensor([row.position for row in rows]).expand(3, -1)
        embeds = model.embed(torch.tensor([row.token for row in rows]), None, None)
        return model.logits(model(embeds, positions, past))


def replay_all_steps() -> None:
    """Every runner of this process takes its answers under way as captured graphs do."""
    make = Runner.__init__

    def make_with_steps(self: Runner, model: KeyeModel, config: EngineConfig, attention: str) -> None:
        make(self, model, config, attention)
        self.graphs = EagerSteps(self)

    Runner.__init__ = make_with_steps


def chat(*content: object) -> list[dict[str, Any]]:
    """A turn of a video or of text."""
    parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "video", "video": part} for part in content]
    return [{"role": "user", "content": parts}]


def run(engine: Engine, messages: list[list[dict[str, Any]]], num_tokens: int, **options: Any) -> dict[str, Any]:
    """Tokens and log-probabilities of answers given together, the later ones begun while the first are under way."""
    events: list[list[Any]] = [[] for _ in messages]
    requests = [engine.prepare(one, SamplingParameters(max_new_tokens=num_tokens, logprobs=2, **options)) for one in messages]
    for number, request in enumerate(requests):
        request.stop_ids, request.on_token = frozenset(), events[number].append
        engine.scheduler.add(request)
        engine.step()
    while engine.scheduler.has_work:
        engine.step()
    told = [[[event.logprob, *(value for _, value in event.top_logprobs)] for event in one] for one in events]
    return {
        "tokens": [[event.token_id for event in one] for one in events],
        "logprobs": torch.tensor(told),
        "num_preemptions": sum(request.num_preemptions for request in requests),
        "num_cached": [request.num_cached for request in requests],
    }


def work(model: str, extent: str, device: str = "cpu") -> dict[str, Any]:
    """All that the ranks are compared by, or its beginning."""
    options: dict[str, Any] = {"device": device, "dtype": torch.float32}
    # A clip and a question without a near tie in the selection: fp32 sums in another order would decide it otherwise.
    video, other = frames_of_clip(0), frames_of_clip(2)
    engine = Engine(model, config=EngineConfig(prefill_chunk_tokens=150), **options)
    texts = [chat(text) for text in TEXTS]
    results = {"mixed": run(engine, [texts[0], chat(video, QUESTIONS[0]), *texts[1:], chat(other, QUESTIONS[0])], 10)}
    results["reused"] = run(engine, [chat(video, QUESTIONS[1])], 8, temperature=1.3, seed=5)
    scored = engine.score(chat(video, QUESTIONS[0]), "From 1.0 to 3.5 seconds.")
    results["scored"] = {
        "tokens": [token for token, _, _ in scored],
        "logprobs": torch.tensor([logprob for _, _, logprob in scored]),
    }
    request = engine.prepare(chat(video, QUESTIONS[0]), SamplingParameters(max_new_tokens=8), evidence=True)
    engine.scheduler.add(request)
    while engine.scheduler.has_work:
        engine.step()
    results["evidence"] = {
        "tokens": [*request.output_ids, *request.evidence.counts_P().tolist()],
        "logprobs": request.evidence.weights_P(),
    }
    if extent == "brief":
        return results
    dense = Engine(model, attention="dense", **options)
    results["dense"] = run(dense, [chat(video, QUESTIONS[0])], 4)
    del dense
    small = Engine(model, config=EngineConfig(page_size=16, cache_tokens=416, prefill_chunk_tokens=50), **options)
    results["preempted"] = run(small, texts[:3], 100)
    fixed = EngineConfig(is_batch_invariant=True, max_batch_requests=4, prefill_chunk_tokens=150)
    mixed = [texts[0], chat(video, QUESTIONS[0])]
    results["fixed"] = run(Engine(model, config=fixed, **options), mixed, 6)
    alone = [run(Engine(model, config=fixed, **options), [messages], 6)["logprobs"] for messages in mixed]
    results["fixed"]["is_invariant"] = torch.equal(torch.cat(alone), results["fixed"]["logprobs"])
    return results


def main() -> None:
    if sys.argv[2] == "replayed":
        replay_all_steps()
    if rank():
        follow()
    else:
        torch.save(work(sys.argv[1], sys.argv[2], *sys.argv[4:]), Path(sys.argv[3]))


if __name__ == "__main__":
    main()
