"""Whether a request's log-probabilities are the same to the bit alone, among others, and among others that come later.

    python -m benchmarks.invariance [--layers 8] [--tokens 12]

Layers of the 30B shape with random weights, five prompts of different lengths, in the batch-invariant mode and without it: the
largest difference of any log-probability of the whole vocabulary from the request's own run alone. Exit status 1 where the mode
does not keep its promise.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.random_model import random_model, shape_30b, shape_tiny, text_prompt, topical_ids
from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.request import Request
from openkeye.engine.runner import Runner
from openkeye.engine.sampler import log_probabilities
from openkeye.engine.scheduler import Scheduler
from openkeye.model.keye import KeyeModel

LENGTHS = (5000, 700, 2100, 64, 3333)
STEPS_BETWEEN = 3
# batches before the next request comes, where they come one after another


def converse(
    model: KeyeModel, engine: EngineConfig, prompts: Sequence[Tensor], num_tokens: int, is_staggered: bool = False
) -> list[Tensor]:
    """[tokens, V] log-probabilities behind each prompt, greedy answers."""
    runner = Runner(model, engine, "sparse")
    scheduler = Scheduler(engine, runner.device)
    rows: dict[Request, list[Tensor]] = {}

    def step() -> None:
        batch = scheduler.wait_for_batch()
        logits = runner.run(batch).clone()
        for row, segment in enumerate(batch.segments):
            request = segment.request
            request.num_computed += segment.count
            if not request.num_missing:
                rows[request].append(log_probabilities(logits[row]))
                request.add_output(int(logits[row].argmax()))
                if request.finish_reason is not None:
                    scheduler.remove(request)

    for ids in prompts:
        request = Request(text_prompt(ids), SamplingParameters(max_new_tokens=num_tokens), frozenset())
        rows[request] = []
        scheduler.add(request)
        for _ in range(STEPS_BETWEEN if is_staggered else 0):
            if scheduler.has_work:
                step()
    while scheduler.has_work:
        step()
    return [torch.stack(one) for one in rows.values()]


def largest(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Difference of any number."""
    return max(float((ours - theirs).abs().max()) for ours, theirs in zip(found, expected, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=12, help="of each answer")
    options = parser.parse_args(arguments)
    is_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if is_gpu else ("cpu", torch.float32)
    config = dataclasses.replace(shape_30b() if is_gpu else shape_tiny(), num_hidden_layers=options.layers, vision=None)
    lengths = LENGTHS if is_gpu else [length // 50 + 1 for length in LENGTHS]
    prompts = [topical_ids(length, config.vocab_size, seed=length) for length in lengths]
    model = random_model(config, device, dtype, False, 0.0)
    print("| mode | all at once | one after another |\n|---|---|---|")
    differences = {}
    for name, is_invariant in (("batch-invariant", True), ("other", False)):
        engine = EngineConfig(
            cache_tokens=64 * 1024 if is_gpu else 4096,
            prefill_chunk_tokens=2048 if is_gpu else 64,
            max_batch_requests=32 if is_gpu else 8,
            is_batch_invariant=is_invariant,
        )
        alone = [converse(model, engine, [prompt], options.tokens)[0] for prompt in prompts]
        together = largest(converse(model, engine, prompts, options.tokens), alone)
        staggered = largest(converse(model, engine, prompts[::-1], options.tokens, True)[::-1], alone)
        differences[name] = max(together, staggered)
        print(f"| {name} | {together:.2e} | {staggered:.2e} |")
    return int(differences["batch-invariant"] > 0)


if __name__ == "__main__":
    sys.exit(main())
