"""Prompts and answers in one batch, pages by need, preemption: nobody's result depends on any of it."""

import pytest
import torch

from openkeye.engine import decode as decode_module
from openkeye.engine.batch import Batch
from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.events import TokenEvent
from openkeye.engine.loop import Engine
from tests.engine.test_dense_up_to import LENGTH, LIMIT, TOP_K, Sequences, close
from tests.engine.test_loop import QUESTIONS, all_pages_are_accounted_for, chat

TEXTS = (
    "Name the colours that you know, in any order.",
    "Count. " * 60,
    "What can be seen at the beginning, and what at the end? " * 25,
    "Why?",
)
LOGPROBS = SamplingParameters(max_new_tokens=24, logprobs=2)


class Recorded:
    """A request with all that it told; the first stop id is taken away, so that answers are as long as asked."""

    def __init__(self, engine: Engine, messages: list[dict] | str, sampling: SamplingParameters = LOGPROBS) -> None:
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        self.request = engine.prepare(messages, sampling)
        self.request.stop_ids = frozenset()
        self.events: list[TokenEvent] = []
        self.request.on_token = self.events.append
        engine.scheduler.add(self.request)

    @property
    def tokens(self) -> list[int]:
        return [event.token_id for event in self.events]

    @property
    def logprobs(self) -> torch.Tensor:
        return torch.tensor([[event.logprob, *(value for _, value in event.top_logprobs)] for event in self.events])

    def is_like(self, other: "Recorded") -> None:
        assert self.tokens == other.tokens == self.request.output_ids
        torch.testing.assert_close(self.logprobs, other.logprobs, atol=1e-5, rtol=1e-5)
        assert "".join(event.text for event in self.events) + self.request.rest == self.request.text == other.request.text
        assert self.request.finish_reason == other.request.finish_reason


def run(engine: Engine) -> list[Batch]:
    """All that is queued; the batches."""
    batches = []
    while engine.scheduler.has_work:
        batches.append(engine.scheduler.next_batch())
        engine.run_batch(batches[-1])
    return batches


def alone(messages: list[dict] | str, sampling: SamplingParameters = LOGPROBS) -> Recorded:
    engine = Engine()
    recorded = Recorded(engine, messages, sampling)
    run(engine)
    return recorded


@pytest.mark.parametrize("attention", ["sparse", "dense"])
@pytest.mark.parametrize("chunk", [64, 2048])
def test_tokens_and_logprobs_do_not_depend_on_the_mixture(video, chunk, attention):
    engine = Engine(attention=attention, config=EngineConfig(prefill_chunk_tokens=chunk))
    together = [Recorded(engine, text) for text in TEXTS[:2]]
    for _ in range(6):
        engine.step()
    together += [Recorded(engine, messages) for messages in (chat(video, QUESTIONS[0]), *TEXTS[2:])]
    batches = run(engine)
    assert any(segment.count > 1 for batch in batches for segment in batch.segments[1:]), "no batch was mixed"
    whole = Engine(attention=attention)
    for recorded, messages in zip(together, (*TEXTS[:2], chat(video, QUESTIONS[0]), *TEXTS[2:]), strict=True):
        single = Recorded(whole, messages)
        run(whole)
        recorded.is_like(single)
    assert all_pages_are_accounted_for(engine)


def test_no_answer_waits_for_the_prompt_of_another():
    engine = Engine(config=EngineConfig(prefill_chunk_tokens=64))
    early = [Recorded(engine, TEXTS[3]), Recorded(engine, TEXTS[0])]
    while not all(recorded.request.is_answering for recorded in early):
        engine.step()
    late = [Recorded(engine, text) for text in (TEXTS[2], TEXTS[1])]
    num_batches = 0
    while not late[0].request.is_prefilled:
        before = [len(recorded.events) for recorded in early]
        batch = engine.scheduler.next_batch()
        engine.run_batch(batch)
        assert [len(recorded.events) for recorded in early] == [count + 1 for count in before]
        assert [segment.count for segment in batch.segments[:2]] == [1, 1]
        assert sum(segment.count for segment in batch.segments[2:]) <= 64
        num_batches += 1
    assert num_batches > 4
    engine.scheduler.clear()


def test_one_chunk_ends_a_prompt_and_begins_the_next():
    engine = Engine(config=EngineConfig(prefill_chunk_tokens=100))
    requests = [Recorded(engine, text).request for text in (TEXTS[0], TEXTS[1], TEXTS[3])]
    batch = engine.scheduler.next_batch()
    counts = [segment.count for segment in batch.segments]
    assert sum(counts) == 100 and counts[0] == requests[0].num_prompt and counts[1] < requests[1].num_prompt
    engine.scheduler.clear()


def test_a_mixed_batch_attends_as_its_parts_do():
    parts = [(0, LENGTH - 1, 1), (1, LIMIT - 1, 1), (2, 20, 50), (3, 0, 7), (4, 30, 1)]
    sequences = Sequences(len(parts))
    for number, start, _ in parts:
        if start:
            sequences.attend([(number, 0, start)], None)
    for dense_up_to in (None, LIMIT):
        mixed = sequences.attend(parts, dense_up_to).split([count for _, _, count in parts])
        for (number, start, count), found in zip(parts, mixed, strict=True):
            expected = sequences.sparse(number).clone()
            limit = max(TOP_K, dense_up_to or 0)
            expected[:limit] = sequences.dense(number)[:limit]
            close(found, expected[start : start + count])


def test_answers_in_a_mixed_batch_are_decoded_together(monkeypatch):
    calls = []
    decode = decode_module.decode_in_pages

    def record(query, index_query, gates, caches, table, lengths, *rest):
        calls.append((query.shape[0], table.shape[0], lengths.tolist()))
        return decode(query, index_query, gates, caches, table, lengths, *rest)

    sequences = Sequences(3)
    for number, start in ((0, LENGTH - 1), (1, 50), (2, 20)):
        sequences.attend([(number, 0, start)], None)
    parts = [(0, LENGTH - 1, 1), (1, 50, 1), (2, 20, 30)]
    expected = torch.cat([sequences.attend([part], None) for part in parts])
    monkeypatch.setattr(decode_module, "decode_in_pages", record)
    close(sequences.attend(parts, None), expected)
    assert calls == [(2, 2, [LENGTH, 51])]


def test_answers_read_nothing_that_nobody_wrote():
    engine = Engine(config=EngineConfig(page_size=16, cache_tokens=512))
    for cache in (engine.runner.caches.keys, engine.runner.caches.values, engine.runner.caches.index_keys):
        cache.fill_(torch.nan)
    # The first page goes to a request that never runs.
    Recorded(engine, TEXTS[3])
    engine.scheduler.next_batch()
    engine.scheduler.clear()
    recorded = Recorded(engine, TEXTS[0])
    run(engine)
    recorded.is_like(alone(TEXTS[0]))


# Pages.


def test_a_request_begins_with_the_pages_of_its_prompt_and_one_more():
    engine = Engine(config=EngineConfig(page_size=16))
    request = Recorded(engine, TEXTS[1], SamplingParameters(max_new_tokens=100)).request
    engine.step()
    num_pages = -(-request.num_prompt // 16) + 1
    assert len(request.pages) == num_pages
    while engine.scheduler.has_work:
        engine.step()
        assert len(request.pages) in (0, max(num_pages, -(-(request.num_known - 1) // 16)))
    assert len(request.output_ids) == 100


def test_an_engine_takes_more_requests_than_their_longest_answers_fit():
    engine = Engine(config=EngineConfig(page_size=16, cache_tokens=1024))
    recorded = [Recorded(engine, TEXTS[3], SamplingParameters(max_new_tokens=900)) for _ in range(6)]
    engine.step()
    assert len(engine.scheduler.running) == 6
    engine.scheduler.clear()
    assert all(not entry.request.pages for entry in recorded) and all_pages_are_accounted_for(engine)


def crowd(engine: Engine, sampling: SamplingParameters) -> list[Recorded]:
    return [Recorded(engine, text, sampling) for text in (TEXTS[0], TEXTS[1], TEXTS[3], TEXTS[0] + TEXTS[3])]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "seed": 5}])
def test_preempted_requests_lose_nothing(options):
    sampling = SamplingParameters(max_new_tokens=120, logprobs=1, **options)
    engine = Engine(config=EngineConfig(page_size=16, cache_tokens=544, prefill_chunk_tokens=50))
    recorded = crowd(engine, sampling)
    run(engine)
    assert sum(entry.request.num_preemptions for entry in recorded) >= 2 and recorded[0].request.num_preemptions == 0
    undisturbed = Engine()
    for entry, other in zip(recorded, crowd(undisturbed, sampling), strict=True):
        run(undisturbed)
        entry.is_like(other)
    assert all_pages_are_accounted_for(engine)


def test_the_youngest_steps_back_and_is_the_next_to_come():
    engine = Engine(config=EngineConfig(page_size=16, cache_tokens=256, max_batch_requests=3))
    limits = (200, 200, 200, 5)
    requests = [Recorded(engine, TEXTS[3], SamplingParameters(max_new_tokens=limit)).request for limit in limits]
    scheduler, order = engine.scheduler, []
    while not requests[2].num_preemptions:
        engine.step()
    assert scheduler.running == requests[:2] and list(scheduler.waiting) == requests[2:] and not requests[2].pages
    while scheduler.has_work:
        order += engine.step()
        assert scheduler.running == [request for request in requests if request in scheduler.running]
    assert order[0] is requests[0] and len(order) == 4
    assert requests[2].num_cached == 0 and tuple(len(request.output_ids) for request in requests) == limits


def test_preemption_of_a_video_computes_it_again(video, other_video):
    prompts = (chat(video, QUESTIONS[0]), chat(other_video, QUESTIONS[0]))
    sampling = SamplingParameters(max_new_tokens=150, logprobs=0)
    size = Engine().prepare(prompts[0], sampling).num_prompt
    engine = Engine(config=EngineConfig(page_size=16, cache_tokens=(2 * size + 120) // 16 * 16))
    recorded = [Recorded(engine, messages, sampling) for messages in prompts]
    run(engine)
    assert recorded[1].request.num_preemptions >= 1
    for entry, messages in zip(recorded, prompts, strict=True):
        entry.is_like(alone(messages, sampling))


def test_what_is_refused_at_once_leaves_the_rest_alone():
    engine = Engine(config=EngineConfig(page_size=16, cache_tokens=64))
    first = Recorded(engine, TEXTS[3])
    with pytest.raises(ValueError, match="cache holds 64"):
        Recorded(engine, TEXTS[1])
    run(engine)
    assert len(first.tokens) == 24


def test_stop_strings_end_the_answer_over_tokens(video):
    whole = Engine().generate(chat(video, QUESTIONS[0]))
    stop = whole.text[6:12]
    assert len(Engine().processor.encode_text(stop)) > 1
    pieces: list[str] = []
    sampling = SamplingParameters(stop=("never", stop))
    answer = Engine().generate(chat(video, QUESTIONS[0]), sampling=sampling, on_text=pieces.append)
    assert answer.text == "".join(pieces) == whole.text[: whole.text.index(stop)] and answer.finish_reason == "stop"
    assert 0 < answer.num_generated_tokens < whole.num_generated_tokens


def test_text_held_back_for_a_stop_string_is_told_at_the_end(video):
    whole = Engine().generate(chat(video, QUESTIONS[0]))
    pieces: list[str] = []
    sampling = SamplingParameters(stop=(whole.text[-3:] + "!",))
    answer = Engine().generate(chat(video, QUESTIONS[0]), sampling=sampling, on_text=pieces.append)
    assert answer.text == "".join(pieces) == whole.text and pieces[-1] == whole.text[-3:]
