"""How far the engine's log-probabilities are from the plain model's: pages, chunks and graphs beside one call over all tokens.

    python -m benchmarks.exactness [--layers 4] [--prompt 6000] [--tokens 32]

Layers of the 30B shape with random weights. The engine answers greedily in bfloat16; the plain model then reads prompt and
answer in one call, in bfloat16 and in float32. Every line compares the log-probabilities of the answer's tokens with float32's.
"""

import argparse
import copy
import dataclasses
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.random_model import random_model, shape_30b, shape_tiny, text_prompt, topical_ids
from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.request import Request
from openkeye.engine.runner import Runner
from openkeye.engine.sampler import log_probabilities, sample_batch
from openkeye.engine.scheduler import Scheduler
from openkeye.model.keye import KeyeModel
from openkeye.model.past import PlainPast


def answer(model: KeyeModel, ids_T: Tensor, num_tokens: int, engine: EngineConfig) -> tuple[list[int], list[float]]:
    """Tokens of a greedy answer, and the log-probability that the engine gave each."""
    runner = Runner(model, engine, "sparse")
    scheduler = Scheduler(engine, runner.device)
    request = Request(text_prompt(ids_T), SamplingParameters(max_new_tokens=num_tokens), frozenset())
    scheduler.add(request)
    logprobs: list[float] = []
    while request.finish_reason is None:
        batch = scheduler.wait_for_batch()
        logits = runner.run(batch)
        request.num_computed += batch.num_tokens
        if not request.num_missing:
            (token,) = sample_batch(logits, [request.sampling], [request.generator])
            logprobs.append(float(log_probabilities(logits)[0, token]))
            request.add_output(token)
    return request.output_ids, logprobs


@torch.inference_mode()
def score(model: KeyeModel, ids_T: Tensor, tokens: list[int]) -> list[float]:
    """The plain model's log-probabilities of the same tokens, in one call."""
    device = model.model.embed_tokens.weight.device
    ids = torch.cat([ids_T, torch.tensor(tokens)]).to(device)
    positions = torch.arange(len(ids), device=device).expand(3, -1)
    hidden = model(model.embed(ids, None, None), positions, PlainPast(model.config.indexer.top_k))
    logprobs = log_probabilities(model.logits(hidden[len(ids_T) - 1 : -1]))
    return logprobs.gather(1, ids[len(ids_T) :, None])[:, 0].tolist()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=6000, help="tokens")
    parser.add_argument("--tokens", type=int, default=32, help="of the answer")
    options = parser.parse_args(arguments)
    is_gpu = torch.cuda.is_available()
    device, half = ("cuda", torch.bfloat16) if is_gpu else ("cpu", torch.float32)
    config = dataclasses.replace(shape_30b() if is_gpu else shape_tiny(), num_hidden_layers=options.layers, vision=None)
    num_prompt = options.prompt if is_gpu else 300
    ids = topical_ids(num_prompt, config.vocab_size)
    model = random_model(config, device, half, False, 0.0)
    # The same rounded weights, wider.
    wide = copy.deepcopy(model).float()
    room = -(-(num_prompt + options.tokens) // 64) * 64
    print("| | mean | largest |\n|---|---|---|")
    for name, formats in (
        ("engine, index keys in e4m3", {}),
        ("engine, index keys as the model", {"index_cache": "model"}),
        ("engine, keys and values in e4m3 too", {"kv_cache": "e4m3", "index_cache": "e4m3"}),
        ("plain model, one call", None),
    ):
        engine = EngineConfig(cache_tokens=room, prefill_chunk_tokens=2048, **(formats or {}))
        tokens, found = answer(model, ids, options.tokens, engine)
        if formats is None:
            found = score(model, ids, tokens)
        exact = score(wide, ids, tokens)
        errors = (torch.tensor(found) - torch.tensor(exact)).abs()
        print(f"| {name}, {str(half).removeprefix('torch.')} | {errors.mean():.2e} | {errors.max():.2e} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
