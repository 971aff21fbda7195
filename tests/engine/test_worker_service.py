"""An engine in a process of its own: as good as one on a thread, and replaced when it dies."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from openkeye.common.checks import InputError
from openkeye.engine import worker_service as worker_service_module
from openkeye.engine.config import SamplingParameters
from openkeye.engine.events import ErrorEvent, Event, FinishEvent, TokenEvent
from openkeye.engine.loop import Engine
from openkeye.engine.pages import CPU_CACHE_TOKENS
from openkeye.engine.worker_service import WorkerService
from tests.engine.test_loop import chat
from tests.engine.test_service import DEMO, HELLO, LONG, SHORT, Caller
from tests.engine.worker_engines import die, open_endless, open_while


@pytest.fixture
def start(monkeypatch) -> Iterator[Callable[..., WorkerService]]:
    monkeypatch.setattr(worker_service_module, "FIRST_WAIT_SECONDS", 0.01)
    services: list[WorkerService] = []

    def start_service(open_engine: Callable[[], Engine], **options) -> WorkerService:
        services.append(WorkerService(open_engine, **options))
        services[-1].start()
        return services[-1]

    yield start_service
    for service in services:
        service.stop()
        assert not service._thread.is_alive() and service._worker is None


def kill(service: WorkerService) -> None:
    service._worker.process.send_signal(signal.SIGKILL)


def wait_for(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_answers_are_those_of_an_engine_here(start):
    service, engine = start(Engine), Engine()
    asked = [HELLO, chat(str(DEMO), "When is the red circle visible?"), chat(DEMO.read_bytes(), "How many circles appear?")]
    sampling = SamplingParameters(max_new_tokens=20, logprobs=2)
    callers = [Caller(service, messages, sampling) for messages in asked]
    for caller, messages in zip(callers, asked, strict=True):
        last, answer = caller.wait(), engine.generate(messages, sampling=sampling)
        assert isinstance(last, FinishEvent) and last.text == last.answer.text == answer.text == caller.text + last.rest
        assert last.answer.intervals_seconds == answer.intervals_seconds and last.num_output_tokens == len(caller.events) - 1
        assert all(len(event.top_logprobs) == 2 for event in caller.events if isinstance(event, TokenEvent))
        assert caller.ticket.is_settled
    stats = service.stats()
    assert (stats.num_finished, stats.num_failed, stats.num_running, stats.num_waiting) == (3, 0, 0, 0)
    assert stats.num_free_pages == stats.num_pages == CPU_CACHE_TOKENS // 64
    assert stats.num_output_tokens == sum(len(caller.events) - 1 for caller in callers)
    assert stats.num_prompt_tokens == sum(caller.wait().num_prompt_tokens for caller in callers)


def test_requests_end_by_cancel_deadline_limits_and_their_own_faults(start, tmp_path):
    service = start(partial(open_endless, max_batch_requests=1, cache_tokens=4096), max_queue=2)
    running = Caller(service, HELLO, SamplingParameters(max_new_tokens=4000))
    assert running.has_begun.wait(30)
    waiting = [Caller(service, HELLO) for _ in range(2)]
    assert Caller(service, HELLO).wait() == ErrorEvent("full", "the queue holds 2 requests already; try again later")
    assert (service.stats().num_running, service.stats().num_waiting) == (1, 2)
    running.ticket.cancel()
    running.ticket.cancel()
    assert running.wait().finish_reason == "cancelled" and running.wait().text == running.text + running.wait().rest
    assert [caller.wait().finish_reason for caller in waiting] == ["length", "length"]
    late = Caller(service, HELLO, SamplingParameters(max_new_tokens=4000), deadline_seconds=0.3).wait()
    assert late.finish_reason == "deadline" and late.num_output_tokens
    missing = Caller(service, chat(str(tmp_path / "none.mp4"), "What?")).wait()
    assert missing.kind == "input" and "none.mp4: no such file" in missing.message
    with pytest.raises(InputError, match="deadline_seconds is -1"):
        service.submit(HELLO, SHORT, print, -1.0)
    wait_for(lambda: service.stats().num_free_pages == service.stats().num_pages > 0)


def test_a_callback_that_raises_ends_its_request_only(start):
    service = start(open_endless)
    events: list[Event] = []

    def fail(event: Event) -> None:
        events.append(event)
        raise ZeroDivisionError

    good = Caller(service, HELLO, SamplingParameters(max_new_tokens=100))
    service.submit(HELLO, LONG, fail)
    assert good.wait().num_output_tokens == 100
    wait_for(lambda: len(events) == 2)
    assert isinstance(events[0], TokenEvent) and events[1].kind == "internal" and service.stats().num_running == 0


def test_a_killed_worker_fails_what_was_open_and_another_takes_over(start, caplog):
    service = start(open_endless)
    assert Caller(service, HELLO).wait().num_output_tokens == 8
    open_ones = [Caller(service, HELLO, LONG), Caller(service, chat(str(DEMO), "What?"), LONG)]
    assert open_ones[0].has_begun.wait(30)
    kill(service)
    for caller in open_ones:
        assert caller.wait() == ErrorEvent("stopped", "the engine died; ask again in a moment")
    assert not service.is_alive and service.stats().num_pages == 0
    assert Caller(service, HELLO).events == [ErrorEvent("stopped", "the engine is not running")]
    wait_for(lambda: service.is_alive)
    assert Caller(service, HELLO).wait().num_output_tokens == 8
    stats = service.stats()
    assert (stats.num_restarts, stats.num_finished, stats.num_failed) == (1, 2, 3) and stats.num_pages > 0
    assert stats.num_output_tokens >= 17
    assert [record.getMessage() for record in caplog.records] == [
        "the engine's process ended (signal 9); it is started again in 0.01 s"
    ]


def test_a_worker_that_hangs_is_replaced(start, monkeypatch, caplog):
    monkeypatch.setattr(worker_service_module, "LATE_SECONDS", 1.0)
    service = start(open_endless)
    caller = Caller(service, HELLO, LONG, deadline_seconds=0.5)
    assert caller.has_begun.wait(30)
    service._worker.process.send_signal(signal.SIGSTOP)
    assert caller.wait() == ErrorEvent("stopped", "the engine died; ask again in a moment")
    assert "hangs" in caplog.records[0].getMessage()
    wait_for(lambda: service.is_alive)
    assert Caller(service, HELLO).wait().num_output_tokens == 8


def test_it_is_given_up_when_it_cannot_be_started_again(start, tmp_path, caplog):
    folder = tmp_path / "model"
    folder.mkdir()
    service = start(partial(open_while, folder))
    folder.rmdir()
    kill(service)
    wait_for(lambda: service.has_given_up)
    assert len(list(tmp_path.glob("try-*"))) == 6 and not service.is_alive
    assert Caller(service, HELLO).wait().kind == "stopped"
    told = caplog.records[-1].getMessage()
    assert told.startswith("the engine could not be started 5 times in a row") and told.endswith("make it again")


def test_an_engine_that_cannot_be_opened_is_told_at_the_start(start, tmp_path):
    with pytest.raises(InputError, match="nothing: no such folder; make it again"):
        start(partial(open_while, tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"ended before it was ready \(exit status 7\)"):
        start(die)


def test_stop_ends_what_is_open(start):
    service = start(open_endless)
    caller = Caller(service, HELLO, LONG)
    assert caller.has_begun.wait(30)
    begin = time.monotonic()
    service.stop()
    assert caller.wait() == ErrorEvent("stopped", "the engine is shutting down") and time.monotonic() - begin < 5
    assert not service.is_alive and Caller(service, HELLO).wait().kind == "stopped"


def test_a_worker_whose_owner_is_killed_ends(tmp_path):
    program = (
        "from openkeye import SamplingParameters, WorkerService\n"
        "from tests.engine.worker_engines import open_endless\n"
        "service = WorkerService(open_endless)\n"
        "service.start()\n"
        "service.submit([{'role': 'user', 'content': 'x'}], SamplingParameters(max_new_tokens=20000), id)\n"
        "print(service._worker.process.pid, flush=True)\n"
        "service._thread.join()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE) as owner:
        worker = int(owner.stdout.readline())
        os.kill(worker, 0)
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGINT)
        time.sleep(0.1)
        os.kill(worker, 0)
        owner.kill()
    wait_for(
        lambda: not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/status").read_text().split("State:")[1][:4]
    )
