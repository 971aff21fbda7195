"""The engine says what the plain model says, however the work is cut, batched, cached or interrupted."""

import pytest
import torch

from openkeye.common.checks import InputError
from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.loop import Engine
from openkeye.inputs.encode import encode
from openkeye.model.past import PlainPast
from openkeye.model.weights import load_model

QUESTIONS = ("When is the red circle visible?", "How many different objects appear in the video?", "Count the stars.")


def chat(video, question: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": question}]}]


def first_logits(engine: Engine, messages: list[dict]) -> torch.Tensor:
    """Logits after the whole prompt, and nothing left in the engine."""
    request = engine._request(encode(messages, engine.processor), SamplingParameters(max_new_tokens=1))
    engine.scheduler.add(request)
    while not request.is_prefilled:
        batch = engine.scheduler.next_batch()
        logits = engine.runner.run(batch)
        request.num_computed += batch.segments[0].count
    engine.scheduler.clear()
    return logits[0]


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_logits_equal_the_plain_model(video, processor, attention):
    engine = Engine(attention=attention)
    messages = chat(video, QUESTIONS[0])
    prompt = encode(messages, processor).model_input
    model = load_model(engine.model_dir, "cpu", torch.float32)
    with torch.inference_mode():
        embeds = model.embed(prompt.input_ids, None, model.encode_patches(prompt.video_patches))
        hidden = model(embeds, prompt.position_ids, PlainPast(model.config.indexer.top_k, attention))
        expected = model.logits(hidden[-1:])[0]
    torch.testing.assert_close(first_logits(engine, messages), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [37, 64, 300])
def test_chunked_prefill_equals_one_shot(video, chunk):
    whole, cut = Engine(), Engine(config=EngineConfig(prefill_chunk_tokens=chunk))
    messages = chat(video, QUESTIONS[0])
    torch.testing.assert_close(first_logits(cut, messages), first_logits(whole, messages), atol=1e-4, rtol=1e-4)
    assert cut.generate(messages).text == whole.generate(messages).text


def test_answers_do_not_depend_on_company(video, other_video):
    alone = [Engine().generate(chat(video, question)).text for question in QUESTIONS]
    mixed = Engine().generate_batch(
        [chat(video, QUESTIONS[0]), chat(other_video, QUESTIONS[1]), chat(video, QUESTIONS[1]), chat(video, QUESTIONS[2])]
    )
    assert [mixed[0].text, mixed[2].text, mixed[3].text] == alone


def test_a_second_question_reuses_the_video(video, other_video):
    engine = Engine()
    conversation = engine.open(video)
    first, second = (conversation.ask(question) for question in QUESTIONS[:2])
    assert first.num_cached_tokens == 0 and second.num_cached_tokens > 0.85 * second.num_prompt_tokens
    assert second.stage_seconds["encode_vision"] < 0.3 * first.stage_seconds["encode_vision"] + 0.01
    assert second.text == Engine().open(video).ask(QUESTIONS[1]).text
    assert engine.open(other_video).ask(QUESTIONS[0]).num_cached_tokens < 64, "other pixels must not match"


def all_pages_are_accounted_for(engine: Engine) -> bool:
    pool = engine.scheduler.pool
    engine.scheduler.prefix_cache.make_room(pool.num_pages)
    return pool.num_free == pool.num_pages and not engine.scheduler.slots


def test_pages_come_back_after_answers_errors_and_interrupts(video):
    engine = Engine()
    engine.generate(chat(video, QUESTIONS[0]))

    def interrupt(_piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(chat(video, QUESTIONS[1]), on_text=interrupt)
    assert not engine.scheduler.has_work
    assert engine.generate(chat(video, QUESTIONS[0])).text
    assert all_pages_are_accounted_for(engine)


def test_old_prefixes_make_room_for_new_requests(video, other_video):
    engine = Engine(config=EngineConfig(cache_tokens=1024))
    sampling = SamplingParameters(max_new_tokens=32)
    texts = [engine.generate(chat(v, QUESTIONS[0]), sampling=sampling).text for v in (video, other_video, video)]
    assert texts[0] == texts[2] and all_pages_are_accounted_for(engine)


def test_a_prompt_that_cannot_fit_is_refused_with_the_numbers(video):
    with pytest.raises(InputError, match=r"552 tokens .* the engine's cache holds 256"):
        Engine(config=EngineConfig(cache_tokens=256)).generate(chat(video, QUESTIONS[0]))


def test_text_only_and_pictures_are_answered_too(video):
    engine = Engine()
    sampling = SamplingParameters(max_new_tokens=3)
    text = engine.generate([{"role": "user", "content": "Hello"}], sampling=sampling)
    assert text.num_frames == 0 and text.finish_reason in ("length", "stop")
    import PIL.Image

    picture = PIL.Image.fromarray(video.pixels[3])
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    assert engine.generate([{"role": "user", "content": content}], sampling=sampling).num_prompt_tokens > 16


def test_sampling_follows_its_seed_and_not_its_company(video):
    sampling = SamplingParameters(temperature=1.5, top_p=0.95, seed=7)
    alone = Engine().generate(chat(video, QUESTIONS[0]), sampling=sampling).text
    batch = Engine().generate_batch([chat(video, QUESTIONS[1]), chat(video, QUESTIONS[0])], sampling=sampling)
    assert batch[1].text == alone


def test_the_answer_is_cut_at_the_limit_and_says_so(video):
    answer = Engine().generate(chat(video, QUESTIONS[0]), sampling=SamplingParameters(max_new_tokens=2))
    assert answer.finish_reason == "length" and answer.num_generated_tokens == 2


def test_a_prompt_that_is_wholly_known_still_computes_its_last_token(video):
    # Pages of one token: the second time, every page of the prompt is in the cache.
    engine = Engine(config=EngineConfig(page_size=1))
    first, second = (engine.generate(chat(video, QUESTIONS[0])) for _ in range(2))
    assert second.num_cached_tokens == second.num_prompt_tokens - 1 and second.text == first.text
