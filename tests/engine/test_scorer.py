"""Scores of given tokens are those of a dense log-softmax over the whole vocabulary, however they are cut and batched."""

import asyncio

import numpy as np
import pytest
import torch

from openkeye.common.checks import InputError
from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.loop import Engine
from openkeye.engine.scorer import Scorer
from openkeye.engine.weight_update import changes_between
from openkeye.inputs.encode import encode
from openkeye.model.keye import KeyeModel
from openkeye.model.past import PlainPast
from openkeye.model.weights import load_model
from tests.engine.other_weights import changed, published
from tests.engine.test_loop import QUESTIONS, all_pages_are_accounted_for, chat

ONE_TOKEN = SamplingParameters(max_new_tokens=1)
TEXT = [{"role": "user", "content": "Hello"}]
OUTPUT = np.array([40, 371, 5, 99, 2, 207, 1, 6, 300, 12, 0, 671], dtype=np.int32)
# end tokens, special tokens and pads among them


def dense(engine: Engine, messages: list[dict], output: np.ndarray, weights: dict | None = None) -> torch.Tensor:
    """[T, V] from one shot through the plain model."""
    prompt = encode(messages, engine.processor).model_input
    model: KeyeModel = load_model(engine.model_dir, "cpu", torch.float32)
    if weights is not None:
        model.load_state_dict(weights)
    positions = (torch.arange(len(output)) + prompt.num_tokens + prompt.rope_delta).expand(3, -1)
    with torch.inference_mode():
        frames = None if prompt.video_patches is None else model.encode_patches(prompt.video_patches)
        given = model.embed(prompt.input_ids, None, frames)
        embeds = torch.cat([given, model.embed(torch.from_numpy(output).long(), None, None)])
        past = PlainPast(model.config.indexer.top_k)
        hidden = model(embeds, torch.cat([prompt.position_ids, positions], dim=1), past)
        return model.logits(hidden[prompt.num_tokens - 1 : -1]).float().log_softmax(-1)


def with_scorer(engine: Engine, work, **options):
    scorer = Scorer(engine, "teacher", **options)
    try:
        return asyncio.run(work(scorer))
    finally:
        scorer.close()
        assert all_pages_are_accounted_for(engine)


@pytest.mark.parametrize("config", [{}, {"prefill_chunk_tokens": 23, "page_size": 16}, {"cache_tokens": 1344, "page_size": 16}])
def test_scores_are_those_of_a_dense_log_softmax(video, config):
    engine = Engine(config=EngineConfig(**config))
    outputs = [OUTPUT, OUTPUT[3:], OUTPUT[:1], OUTPUT[::-1].copy()]
    questions = [chat(video, QUESTIONS[0]), TEXT, TEXT, TEXT]
    chosen = [np.random.default_rng(n).integers(0, 672, (len(output), 4)) for n, output in enumerate(outputs)]
    chosen[1][2, 1] = -1
    prompts = [engine.prepare(messages, ONE_TOKEN).prompt for messages in questions]

    async def work(scorer):
        return await asyncio.gather(*(scorer.score(p, o, c, 6) for p, o, c in zip(prompts, outputs, chosen, strict=True)))

    for messages, output, ids, scored in zip(questions, outputs, chosen, with_scorer(engine, work, slab_rows=5), strict=True):
        expected = dense(engine, messages, output)
        assert scored.model == "teacher" and scored.logprobs.dtype == scored.chosen.dtype == np.float32
        assert scored.logprobs == pytest.approx(
            expected.gather(1, torch.from_numpy(output).long()[:, None])[:, 0].numpy(), rel=5e-6, abs=2e-5
        )
        of_chosen = expected.gather(1, torch.from_numpy(ids.clip(min=0))).numpy()
        assert scored.chosen == pytest.approx(np.where(ids == -1, -np.inf, of_chosen), rel=5e-6, abs=2e-5)
        values, _ = expected.topk(6)
        assert scored.top_logprobs == pytest.approx(values.numpy(), rel=5e-6, abs=2e-5)
        assert scored.top_logprobs == pytest.approx(
            expected.gather(1, torch.from_numpy(scored.top_ids).long()).numpy(), rel=5e-6, abs=2e-5
        )


def test_no_more_rows_of_logits_than_a_slab_stand_in_memory():
    engine, rows = Engine(), []
    logits = engine.runner.logits
    engine.runner.logits = lambda hidden, numbers: rows.append(len(numbers)) or logits(hidden, numbers)
    prompt = engine.prepare(TEXT, ONE_TOKEN).prompt
    with_scorer(engine, lambda scorer: scorer.score(prompt, np.tile(OUTPUT, 9)), slab_rows=16)
    assert max(rows) == 16 and sum(rows) == 9 * len(OUTPUT)


def test_what_was_scored_is_remembered_by_model_ids_and_support(video):
    engine, weights = Engine(), published()
    other = changed(weights)
    prompt = engine.prepare(chat(video, QUESTIONS[0]), ONE_TOKEN).prompt

    async def work(scorer):
        first = await scorer.score(prompt, OUTPUT, top_k=2)
        assert await scorer.score(prompt, OUTPUT.astype(np.int64), top_k=2) is first and scorer.num_hits == 1
        for output, chosen, top_k in ((OUTPUT[:-1], None, 2), (OUTPUT, None, 3), (OUTPUT, OUTPUT[:, None], 2)):
            await scorer.score(prompt, output, chosen, top_k)
        assert scorer.num_hits == 1
        await scorer.load("other", changes_between(weights, other))
        second = await scorer.score(prompt, OUTPUT, top_k=2)
        await scorer.load("teacher", changes_between(other, weights))
        assert await scorer.score(prompt, OUTPUT, top_k=2) is first and scorer.num_hits == 2
        third = await scorer.score(prompt, OUTPUT, top_k=1)
        return first, second, third

    first, second, third = with_scorer(engine, work)
    assert (first.model, second.model) == ("teacher", "other")
    ids = torch.from_numpy(OUTPUT).long()[:, None]
    expected = dense(engine, chat(video, QUESTIONS[0]), OUTPUT, other).gather(1, ids)[:, 0].numpy()
    assert second.logprobs == pytest.approx(expected, rel=5e-6, abs=2e-5) and first.logprobs != pytest.approx(
        expected, abs=1e-3
    )
    assert third.logprobs == pytest.approx(first.logprobs, rel=5e-6, abs=2e-5)


def test_memory_of_results_is_bounded():
    engine = Engine()
    prompt = engine.prepare(TEXT, ONE_TOKEN).prompt

    async def work(scorer):
        for _ in range(2):
            for first in range(4):
                await scorer.score(prompt, OUTPUT[first:])
        return scorer.num_hits, scorer._known_bytes

    hits, known_bytes = with_scorer(engine, work, cache_bytes=100)
    assert hits == 0 and known_bytes <= 100
    assert with_scorer(engine, work)[0] == 4


def test_what_cannot_be_scored_is_refused():
    engine = Engine(config=EngineConfig(cache_tokens=64))
    prompt = engine.prepare(TEXT, ONE_TOKEN).prompt

    async def work(scorer):
        for output, chosen, top_k, message in (
            (OUTPUT[:0], None, 0, "give \\[T\\]"),
            (OUTPUT, OUTPUT, 0, "chosen ids of shape"),
            (OUTPUT, OUTPUT[1:, None], 0, "chosen ids of shape"),
            (OUTPUT, None, 673, "top_k is 673"),
            (OUTPUT + 1, None, 0, "output ids from 1 to 672"),
            (np.tile(OUTPUT, 9), None, 0, "cache tokens, the engine has 64"),
        ):
            with pytest.raises(InputError, match=message):
                await scorer.score(prompt, output, chosen, top_k)
        return await scorer.score(prompt, OUTPUT)

    assert len(with_scorer(engine, work).logprobs) == len(OUTPUT)
