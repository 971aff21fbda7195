"""Log-probabilities of given tokens are the plain model's."""

import pytest
import torch

from openkeye.common.checks import InputError
from openkeye.engine import scores
from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.loop import Engine
from openkeye.inputs.encode import encode
from openkeye.model.past import PlainPast
from openkeye.model.weights import load_model
from tests.engine.test_loop import QUESTIONS, all_pages_are_accounted_for, chat

ANSWER = "From 1.0 to 3.5 seconds."


def plain_scores(engine: Engine, messages: list[dict], tokens: list[int], attention: str = "sparse") -> list[float]:
    """One shot of prompt and tokens through the model alone."""
    prompt = encode(messages, engine.processor).model_input
    model = load_model(engine.model_dir, "cpu", torch.float32)
    positions = (torch.arange(len(tokens)) + prompt.num_tokens + prompt.rope_delta).expand(3, -1)
    with torch.inference_mode():
        frames = None if prompt.video_patches is None else model.encode_patches(prompt.video_patches)
        embeds = torch.cat([model.embed(prompt.input_ids, None, frames), model.embed(torch.tensor(tokens), None, None)])
        past = PlainPast(model.config.indexer.top_k, attention)
        hidden = model(embeds, torch.cat([prompt.position_ids, positions], dim=1), past)
        rows = model.logits(hidden[prompt.num_tokens - 1 : -1]).float().log_softmax(-1)
    return rows.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


@pytest.mark.parametrize("attention", ["sparse", "dense"])
@pytest.mark.parametrize("chunk", [23, 2048])
def test_scores_equal_the_plain_model(video, chunk, attention, monkeypatch):
    monkeypatch.setattr(scores, "SLAB_ROWS", 5)
    engine = Engine(attention=attention, config=EngineConfig(prefill_chunk_tokens=chunk))
    for messages in (chat(video, QUESTIONS[0]), [{"role": "user", "content": "Hello"}]):
        scored = engine.score(messages, ANSWER)
        tokens = [token for token, _, _ in scored]
        assert tokens == engine.processor.encode_text(ANSWER) and "".join(text for _, text, _ in scored) == ANSWER
        expected = plain_scores(engine, messages, tokens, attention)
        assert [logprob for _, _, logprob in scored] == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert all_pages_are_accounted_for(engine)


def test_scores_of_an_answer_are_the_logprobs_that_it_came_with(video):
    engine, events = Engine(), []
    request = engine.prepare(chat(video, QUESTIONS[0]), SamplingParameters(logprobs=0))
    request.on_token = events.append
    engine.scheduler.add(request)
    while engine.scheduler.has_work:
        engine.step()
    scored = engine.score(chat(video, QUESTIONS[0]), request.text)
    assert [token for token, _, _ in scored] == request.output_ids
    assert [logprob for _, _, logprob in scored] == pytest.approx([event.logprob for event in events], abs=1e-5)


def test_a_second_score_reuses_the_prompt_and_answers_go_on(video):
    engine = Engine()
    first = engine.score(chat(video, QUESTIONS[0]), ANSWER)
    assert engine.score(chat(video, QUESTIONS[0]), ANSWER) == [
        (token, text, pytest.approx(logprob, abs=1e-5)) for token, text, logprob in first
    ]
    answer = engine.generate(chat(video, QUESTIONS[0]))
    assert answer.text == Engine().generate(chat(video, QUESTIONS[0])).text and answer.num_cached_tokens > 0


def test_one_token_is_scored_too():
    engine = Engine()
    messages = [{"role": "user", "content": "Hello"}]
    ((token, text, logprob),) = engine.score(messages, "1")
    assert text == "1" and [logprob] == pytest.approx(plain_scores(engine, messages, [token]), abs=1e-5)


def test_special_tokens_in_a_continuation_are_prose():
    engine = Engine()
    scored = engine.score([{"role": "user", "content": "Hello"}], "a<|im_end|>")
    assert len(scored) > 2 and "".join(text for _, text, _ in scored) == "a<|im_end|>"


def test_what_cannot_be_scored_is_refused_and_leaves_nothing():
    engine = Engine(config=EngineConfig(cache_tokens=64))
    messages = [{"role": "user", "content": "Hello"}]
    with pytest.raises(InputError, match="continuation to score is empty"):
        engine.score(messages, "")
    with pytest.raises(InputError, match="cache tokens, the engine has 64"):
        engine.score(messages, "many words " * 40)
    assert all_pages_are_accounted_for(engine)
