"""The engine on its kernels: two layers of the 30B shape, prompts in chunks and answers together, against the plain twins."""

import pytest
import torch
from torch import Tensor

from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.request import Request
from openkeye.engine.runner import Runner
from openkeye.engine.scheduler import Scheduler
from openkeye.inputs.encode import EncodedPrompt
from openkeye.inputs.model_input import ModelInput
from openkeye.kernels import dispatch
from openkeye.model.config import KeyeConfig
from openkeye.model.keye import KeyeModel
from tests.model.naive_keye import make_config

LENGTHS = (6000, 2500, 700)
NUM_STEPS = 8
SHAPE = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "vocab_size": 1000,
    "vision_config": None,
    "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20]},
    "sa_config": {"indexer_num_heads": 16, "indexer_head_dim": 64, "topk": 2048},
}


def make_model(dtype: torch.dtype, device: str, shape: dict) -> KeyeModel:
    """Random weights, rounded to bfloat16 whatever the dtype."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = KeyeModel(KeyeConfig.from_dict(make_config(**shape))).requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            fan_in = 1 if "embed" in name else parameter.shape[1]
            parameter.normal_(generator=generator).mul_(fan_in**-0.5)
    return model.to(dtype)


def converse(model: KeyeModel, device: str, lengths: tuple[int, ...], chunk: int) -> Tensor:
    """Logits after every prompt and after each of the same given tokens, [rows, V]; caches that nobody wrote are NaN."""
    config = EngineConfig(cache_tokens=16384, prefill_chunk_tokens=chunk)
    runner, scheduler = Runner(model, config, "sparse"), Scheduler(config, torch.device(device))
    for cache in (runner.caches.keys, runner.caches.values, runner.caches.index_keys):
        cache.fill_(torch.nan)
    generator = torch.Generator().manual_seed(1)
    tokens, requests = {}, []
    for length in lengths:
        ids = torch.randint(100, 900, (length + NUM_STEPS + 1,), generator=generator)
        prompt = EncodedPrompt(ModelInput(ids[:length], torch.arange(length).expand(3, -1)), "", [], ())
        request = Request(prompt, SamplingParameters(max_new_tokens=NUM_STEPS + 5), frozenset())
        tokens[id(request)] = iter(ids[length:].tolist())
        requests.append(request)
        scheduler.add(request)
    rows: dict[int, list[Tensor]] = {id(request): [] for request in requests}
    while any(len(request.output_ids) <= NUM_STEPS for request in requests):
        batch = scheduler.next_batch()
        logits = runner.run(batch)
        for row, segment in enumerate(batch.segments):
            request = segment.request
            request.num_computed += segment.count
            if request.is_prefilled:
                rows[id(request)].append(logits[row].float())
                request.add_output(next(tokens[id(request)], 100))
    return torch.stack([row for request in requests for row in rows[id(request)][: NUM_STEPS + 1]])


@pytest.mark.gpu
def test_kernels_are_as_close_to_float32_as_the_plain_twins_are(monkeypatch):
    """Not row by row: where a router or a selection turns at a rounding, a single row may be far off on either side."""
    kernels = converse(make_model(torch.bfloat16, "cuda", SHAPE), "cuda", LENGTHS, 2048)
    monkeypatch.setattr(dispatch, "can_be_fast", lambda x: False)
    plain = converse(make_model(torch.bfloat16, "cuda", SHAPE), "cuda", LENGTHS, 2048)
    truth = converse(make_model(torch.float32, "cuda", SHAPE), "cuda", LENGTHS, 2048)
    errors = [(found - truth).norm(dim=1) / truth.norm(dim=1) for found in (kernels, plain)]
    assert bool(errors[0].isfinite().all())
    assert float(errors[0].median()) <= 1.5 * float(errors[1].median()) + 2e-3


def test_the_comparison_sees_every_prompt_and_step():
    shape = SHAPE | {"hidden_size": 64, "num_attention_heads": 8, "num_experts": 8, "num_experts_per_tok": 2}
    shape |= {"moe_intermediate_size": 32, "sa_config": SHAPE["sa_config"] | {"topk": 32}}
    model = make_model(torch.float32, "cpu", shape)
    rows = converse(model, "cpu", (90, 40), 32)
    assert rows.shape[0] == 2 * (NUM_STEPS + 1) and bool(rows.isfinite().all())
    torch.testing.assert_close(rows, converse(model, "cpu", (90, 40), 1000), atol=1e-4, rtol=1e-4)
