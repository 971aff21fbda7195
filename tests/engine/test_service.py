"""Many callers at once: each gets its own answer in order, and what goes wrong with one ends that one."""

import gc
import pickle
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import PIL.Image
import pytest

from openkeye.engine import service as service_module
from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.loop import Engine
from openkeye.engine.service import EngineService, ErrorEvent, Event, FinishEvent, Ticket, TokenEvent
from openkeye.inputs import encode as encode_module
from openkeye.inputs.processor import BUNDLED_DIR
from tests.engine.test_loop import QUESTIONS, all_pages_are_accounted_for, chat

DEMO = BUNDLED_DIR.parent.parent / "media" / "demo.mp4"
HELLO = [{"role": "user", "content": "Hello"}]
SHORT = SamplingParameters(max_new_tokens=8)
LONG = SamplingParameters(max_new_tokens=20000)


class Caller:
    """Collects what a request says; waits for its end."""

    def __init__(self, service: EngineService, messages, sampling: SamplingParameters = SHORT, **options) -> None:
        self.events: list[Event] = []
        self.is_over = threading.Event()
        self.has_begun = threading.Event()
        self.ticket: Ticket = service.submit(messages, sampling, self.take, **options)

    def take(self, event: Event) -> None:
        assert not self.is_over.is_set(), "an event after the last"
        self.events.append(event)
        self.has_begun.set()
        if not isinstance(event, TokenEvent):
            self.is_over.set()

    def wait(self) -> FinishEvent | ErrorEvent:
        assert self.is_over.wait(60)
        last = self.events[-1]
        assert not isinstance(last, TokenEvent)
        return last

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, TokenEvent))


@pytest.fixture
def endless(monkeypatch) -> None:
    """No token ends an answer."""
    monkeypatch.setattr(Engine, "_read_stop_ids", lambda self: frozenset())


@pytest.fixture
def start() -> Iterator[Callable[..., EngineService]]:
    services: list[EngineService] = []

    def start_service(config: EngineConfig | None = None, **options) -> EngineService:
        services.append(EngineService(Engine(config=config), **options))
        services[-1].start()
        return services[-1]

    yield start_service
    for service in services:
        service.stop()
        assert not service._thread.is_alive()


def is_idle(service: EngineService) -> bool:
    """Nothing runs or waits, and all pages came back; the engine thread may need a moment."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        stats = service.stats()
        if (stats.num_running, stats.num_waiting, stats.num_free_pages) == (0, 0, stats.num_pages):
            return not service._ticket_of
        time.sleep(0.005)
    return False


def test_many_callers_get_what_they_would_get_alone(start, video, other_video):
    service = start()
    asked = [chat(v, question) for question in QUESTIONS for v in (video, other_video)] + [HELLO]
    callers = [Caller(service, messages, SamplingParameters()) for messages in asked]
    engine = Engine()
    for caller, messages in zip(callers, asked, strict=True):
        last, answer = caller.wait(), engine.generate(messages)
        assert isinstance(last, FinishEvent)
        assert last.text == last.answer.text == answer.text == caller.text + last.rest
        assert last.finish_reason == answer.finish_reason and last.answer.intervals_seconds == answer.intervals_seconds
        assert last.num_output_tokens == answer.num_generated_tokens == len(caller.events) - 1
        assert last.num_prompt_tokens == answer.num_prompt_tokens
    assert is_idle(service)
    stats = service.stats()
    assert (stats.num_finished, stats.num_failed) == (7, 0)
    assert stats.num_output_tokens == sum(len(caller.events) - 1 for caller in callers)
    assert stats.num_prompt_tokens == sum(caller.wait().num_prompt_tokens for caller in callers)
    service.stop()
    assert all_pages_are_accounted_for(service._engine)


def test_logprobs_and_stop_strings_reach_the_caller(start):
    service = start()
    last = Caller(service, HELLO, SamplingParameters(max_new_tokens=6, logprobs=3)).wait()
    caller = Caller(service, HELLO, SamplingParameters(max_new_tokens=6, logprobs=3, stop=(last.text[1:],)))
    assert caller.wait().text == caller.text + caller.wait().rest == last.text[:1]
    for event in caller.events[:-1]:
        assert len(event.top_logprobs) == 3 and event.top_logprobs[0] == (event.token_id, event.logprob)


def test_cancel_ends_a_running_request_and_frees_its_pages(start, endless):
    service = start()
    caller, other = Caller(service, HELLO, LONG), Caller(service, HELLO, SamplingParameters(max_new_tokens=50))
    caller.has_begun.wait(30)
    caller.ticket.cancel()
    caller.ticket.cancel()
    last = caller.wait()
    assert last.finish_reason == "cancelled" and last.text == caller.text + last.rest
    assert 0 < last.num_output_tokens == len(caller.events) - 1 < 10000
    assert other.wait().num_output_tokens == 50
    assert is_idle(service)


def test_cancel_ends_a_waiting_request(start, endless):
    service = start(EngineConfig(max_batch_requests=1))
    first = Caller(service, HELLO, LONG)
    first.has_begun.wait(30)
    second = Caller(service, HELLO)
    second.ticket.cancel()
    assert second.wait().finish_reason == "cancelled" and second.wait().num_output_tokens == 0
    assert not first.is_over.is_set()
    first.ticket.cancel()
    first.wait()
    assert is_idle(service)


def test_a_callback_may_cancel(start, endless):
    service = start()
    callers: list[Caller] = []

    class Leaving(Caller):
        def take(self, event: Event) -> None:
            super().take(event)
            if len(self.events) == 3:
                self.ticket.cancel()

    with service._changed:
        # So that the ticket is in its caller's hands before the first token.
        callers.append(Leaving(service, HELLO, LONG))
    assert callers[0].wait().num_output_tokens == 3
    assert is_idle(service)


class SlowDecoding:
    """Reports of decoding that wait to be let on."""

    def __init__(self, monkeypatch) -> None:
        self.has_begun, self.may_go_on, self.num_ended = threading.Event(), threading.Event(), 0
        prepare = Engine.prepare

        def prepare_slowly(engine, messages, sampling, on_decoded=None, **options):
            def report(num_done: int, num_frames: int) -> None:
                self.has_begun.set()
                assert self.may_go_on.wait(60)
                self.num_ended += 1

            return prepare(engine, messages, sampling, report, **options)

        monkeypatch.setattr(Engine, "prepare", prepare_slowly)


def video_chat(path: Path) -> list[dict]:
    return chat(str(path), "When is the red circle visible?")


@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
def test_a_request_ends_while_its_video_is_decoded(start, monkeypatch, reason):
    slow, service = SlowDecoding(monkeypatch), start()
    caller = Caller(service, video_chat(DEMO), deadline_seconds=0.2 if reason == "deadline" else None)
    slow.has_begun.wait(30)
    if reason == "cancelled":
        caller.ticket.cancel()
    last = caller.wait()
    assert last.finish_reason == reason and (last.text, last.num_output_tokens) == ("", 0)
    assert not slow.num_ended, "the end must not wait for the decoder"
    slow.may_go_on.set()
    assert Caller(service, HELLO).wait().num_output_tokens
    assert is_idle(service) and slow.num_ended == 1 and len(caller.events) == 1, "no frame is decoded for nobody"


def test_a_deadline_ends_an_answer_as_it_is(start, endless):
    service = start()
    begin = time.monotonic()
    caller = Caller(service, HELLO, LONG, deadline_seconds=0.5)
    last = caller.wait()
    assert last.finish_reason == "deadline" and 0.5 <= time.monotonic() - begin < 5
    assert last.text == caller.text + last.rest and last.num_output_tokens == len(caller.events) - 1 > 0
    with pytest.raises(ValueError, match="deadline_seconds is nan"):
        service.submit(HELLO, SHORT, print, float("nan"))
    assert isinstance(Caller(service, HELLO, deadline_seconds=1e300).wait(), FinishEvent)


def test_a_bad_video_fails_its_own_request_only(start, endless, tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video at all" * 100)
    service = start()
    good = Caller(service, HELLO, SamplingParameters(max_new_tokens=200))
    for messages in (video_chat(bad), video_chat(tmp_path / "none.mp4"), [], [{"role": "nobody"}]):
        error = Caller(service, messages).wait()
        assert isinstance(error, ErrorEvent) and error.kind == "input" and "\n" not in error.message
    assert good.wait().num_output_tokens == 200 and is_idle(service)


def test_an_unexpected_error_of_an_encoding_fails_that_request_only(start, monkeypatch):
    service, prepare = start(), Engine.prepare

    def fail_sometimes(engine, messages, sampling, on_decoded=None, **options):
        if "fail" in messages[0]["content"]:
            raise ZeroDivisionError("of a library\nsomewhere")
        return prepare(engine, messages, sampling, on_decoded, **options)

    monkeypatch.setattr(Engine, "prepare", fail_sometimes)
    good, bad = Caller(service, HELLO), Caller(service, [{"role": "user", "content": "fail"}])
    expected = ErrorEvent("internal", "the request could not be encoded: ZeroDivisionError: of a library somewhere")
    assert bad.wait() == expected
    assert isinstance(good.wait(), FinishEvent)


class Unforeseen(Exception):
    pass


def test_an_exception_in_a_callback_fails_its_request_only(start, endless):
    service = start()
    events: list[Event] = []

    def fail(event: Event) -> None:
        events.append(event)
        raise Unforeseen

    good = Caller(service, HELLO, SamplingParameters(max_new_tokens=100))
    service.submit(HELLO, LONG, fail)
    assert good.wait().num_output_tokens == 100 and is_idle(service)
    assert [type(event) for event in events] == [TokenEvent, ErrorEvent] and events[1].kind == "internal"
    assert isinstance(Caller(service, HELLO).wait(), FinishEvent)


def test_an_unexpected_error_in_a_batch_fails_that_batch_and_the_service_goes_on(start, endless, monkeypatch):
    service = start(EngineConfig(max_batch_requests=2))
    run, is_broken = service._engine.runner.run, threading.Event()

    def run_or_fail(batch):
        if is_broken.is_set() and len(batch.segments) == 2:
            is_broken.clear()
            raise Unforeseen("something\nnew")
        return run(batch)

    monkeypatch.setattr(service._engine.runner, "run", run_or_fail)
    callers = [Caller(service, HELLO, LONG) for _ in range(2)]
    assert all(caller.has_begun.wait(30) for caller in callers)
    third = Caller(service, HELLO)
    is_broken.set()
    for caller in callers:
        assert caller.wait() == ErrorEvent("internal", "the batch of this request failed: Unforeseen: something new")
    assert isinstance(third.wait(), FinishEvent) and isinstance(Caller(service, HELLO).wait(), FinishEvent)
    assert service.is_alive and is_idle(service) and service.stats().num_failed == 2


def test_an_answer_that_cannot_be_read_fails_its_request_only(start, monkeypatch):
    service, answer = start(), Engine.answer

    def answer_or_fail(engine, request):
        if request.sampling.seed == 1:
            raise Unforeseen
        return answer(engine, request)

    monkeypatch.setattr(Engine, "answer", answer_or_fail)
    callers = [Caller(service, HELLO, SamplingParameters(max_new_tokens=8, seed=seed)) for seed in range(3)]
    assert [type(caller.wait()) for caller in callers] == [FinishEvent, ErrorEvent, FinishEvent] and is_idle(service)


def test_an_error_in_choosing_a_batch_fails_all_that_it_chose_from(start, monkeypatch):
    service = start()
    next_batch = service._engine.scheduler.next_batch

    def fail_once():
        monkeypatch.setattr(service._engine.scheduler, "next_batch", next_batch)
        raise Unforeseen

    monkeypatch.setattr(service._engine.scheduler, "next_batch", fail_once)
    assert Caller(service, HELLO).wait().kind == "internal"
    assert isinstance(Caller(service, HELLO).wait(), FinishEvent) and is_idle(service)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [KeyboardInterrupt, service_module.torch.AcceleratorError])
def test_interrupts_and_errors_of_the_device_end_the_thread_and_every_request(start, endless, monkeypatch, error):
    service = start()
    caller = Caller(service, HELLO, LONG)
    caller.has_begun.wait(30)
    slow = SlowDecoding(monkeypatch)
    other = Caller(service, video_chat(DEMO))
    slow.has_begun.wait(30)

    def fail(batch):
        raise error

    monkeypatch.setattr(service._engine.runner, "run", fail)
    assert caller.wait() == other.wait() == ErrorEvent("stopped", "the engine died")
    service._thread.join(10)
    assert not service.is_alive
    late = Caller(service, HELLO)
    assert late.events == [ErrorEvent("stopped", "the engine is not running")]
    slow.may_go_on.set()


def test_a_full_queue_and_requests_that_cannot_fit_are_refused(start, endless):
    service = start(EngineConfig(max_batch_requests=1, cache_tokens=4096, page_size=16), max_queue=3)
    running = Caller(service, HELLO, SamplingParameters(max_new_tokens=4000))
    running.has_begun.wait(30)
    large = Caller(service, HELLO, SamplingParameters(max_new_tokens=5000)).wait()
    assert large.kind == "input" and "the engine's cache holds 4,096: ask for at most 4,078 tokens" in large.message
    waiting = [Caller(service, HELLO) for _ in range(3)]
    refused = Caller(service, HELLO).wait()
    assert refused == ErrorEvent("full", "the queue holds 3 requests already; try again later")
    stats = service.stats()
    assert (stats.num_running, stats.num_waiting) == (1, 3)
    running.ticket.cancel()
    assert all(isinstance(caller.wait(), FinishEvent) for caller in waiting)


def test_what_the_cache_cannot_hold_is_refused_before_its_media_are_decoded(start, monkeypatch):
    for name in ("read_request", "open_image"):
        monkeypatch.setattr(encode_module, name, lambda *arguments: pytest.fail("decoded"))
    service = start(EngineConfig(cache_tokens=256))
    picture = PIL.Image.new("RGB", (200, 200))
    for content in ([{"type": "video", "video": str(DEMO)}], [{"type": "image", "image": picture}] * 20):
        refused = Caller(service, [{"role": "user", "content": content}]).wait()
        assert refused.kind == "input" and re.search(
            r"has [3-9]\d\d tokens .* may take 8; .* cache holds 256: take fewer", refused.message
        )
    assert Caller(service, HELLO, SamplingParameters(max_new_tokens=256 - 18)).wait().num_output_tokens


def test_few_requests_are_encoded_ahead_of_those_that_run(start, endless, monkeypatch):
    monkeypatch.setattr(service_module, "MAX_ENCODED_AHEAD", 2)
    service = start(EngineConfig(max_batch_requests=1))
    first = Caller(service, HELLO, LONG)
    first.has_begun.wait(30)
    callers = [Caller(service, HELLO) for _ in range(6)]
    callers[5].ticket.cancel()
    assert callers[5].wait().finish_reason == "cancelled"
    time.sleep(0.1)
    assert len(service._engine.scheduler.waiting) == 2 and service.stats().num_waiting == 5
    first.ticket.cancel()
    assert all(caller.wait().finish_reason == "length" for caller in callers[:5])
    assert is_idle(service)


def test_evidence_comes_with_the_end_and_can_cross_a_pipe(start, video):
    service = start()
    asked, plain = Caller(service, chat(video, QUESTIONS[0]), evidence=True), Caller(service, chat(video, QUESTIONS[0]))
    event = asked.wait()
    assert isinstance(event, FinishEvent) and event.answer.evidence is not None
    assert len(event.answer.evidence[0].moments) == event.answer.num_frames and plain.wait().answer.evidence is None
    assert pickle.loads(pickle.dumps(event)) == event


def test_stop_ends_what_is_open_and_refuses_what_comes(start, endless, monkeypatch):
    service = start()
    running = Caller(service, HELLO, LONG)
    running.has_begun.wait(30)
    slow = SlowDecoding(monkeypatch)
    encoding = Caller(service, video_chat(DEMO))
    slow.has_begun.wait(30)
    service.stop()
    assert running.wait() == encoding.wait() == ErrorEvent("stopped", "the engine is shutting down")
    assert not service.is_alive and Caller(service, HELLO).wait().kind == "stopped"
    slow.may_go_on.set()
    assert all_pages_are_accounted_for(service._engine)


def test_a_request_that_has_ended_is_gone_at_once_with_its_pixels(start, monkeypatch):
    service, prepare = start(), Engine.prepare
    made: list[weakref.ref] = []

    def prepare_and_note(*arguments, **options):
        request = prepare(*arguments, **options)
        made.append(weakref.ref(request))
        return request

    monkeypatch.setattr(Engine, "prepare", prepare_and_note)
    gc.disable()
    try:
        callers = [Caller(service, video_chat(DEMO)), Caller(service, HELLO)]
        assert all(isinstance(caller.wait(), FinishEvent) for caller in callers) and is_idle(service)
        # (the engine's thread lets its last batch go when the next one comes)
        Caller(service, HELLO).wait()
        assert is_idle(service) and [ref() for ref in made[:2]] == [None, None]
    finally:
        gc.enable()


def test_a_service_that_was_not_started_refuses(video):
    service = EngineService(Engine())
    assert not service.is_alive and Caller(service, HELLO).wait().kind == "stopped"
    service.stop()


def test_preemption_is_invisible_to_callers(start, endless):
    sampling = SamplingParameters(max_new_tokens=120)
    crowded = start(EngineConfig(page_size=16, cache_tokens=192))
    callers = [Caller(crowded, [{"role": "user", "content": "Hello" * (n + 1)}], sampling) for n in range(4)]
    roomy = start()
    others = [Caller(roomy, [{"role": "user", "content": "Hello" * (n + 1)}], sampling) for n in range(4)]
    for caller, other in zip(callers, others, strict=True):
        assert caller.wait().text == other.wait().text == caller.text + caller.wait().rest
        assert caller.wait().num_output_tokens == len(caller.events) - 1 == 120
        assert caller.wait().num_cached_tokens <= caller.wait().num_prompt_tokens
    assert is_idle(crowded)
