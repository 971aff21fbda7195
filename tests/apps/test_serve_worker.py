"""`openkeye serve` when its worker process is killed, and when it is killed itself."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.apps.server_process import (
    ANSWER,
    DEMO,
    MODEL,
    ROOT,
    ServerProcess,
    endless_model,
    is_running,
    question,
    serving,
    workers_of,
)

LONG = {"model": MODEL, "messages": [{"role": "user", "content": "Tell."}], "max_tokens": 4000}


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    with serving("--media-dir", DEMO.parent) as running:
        yield running


def wait_for(is_so: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def kill_worker(server: ServerProcess) -> None:
    (worker,) = workers_of(server.process.pid)
    os.kill(worker, signal.SIGKILL)


def test_a_killed_worker_costs_what_was_open_and_is_replaced(tmp_path):
    with (
        serving("--model", endless_model(tmp_path), "--media-dir", DEMO.parent) as server,
        httpx.Client(base_url=server.address, timeout=60) as client,
        client.stream("POST", "/v1/chat/completions", json=LONG | {"stream": True}) as stream,
    ):
        before = client.post("/v1/chat/completions", json=question(max_tokens=12)).json()["choices"]
        lines = stream.iter_lines()
        next(lines)
        kill_worker(server)
        last = [line for line in lines if line][-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["type"] == "service_unavailable_error" and "the engine died" in error["message"]
        for response in (client.get("/health"), client.post("/v1/chat/completions", json=question())):
            assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
            assert "started again" in response.json()["error"]["message"]
        assert client.get("/v1/models").status_code == 200 and "openkeye_alive 0.0" in client.get("/metrics").text
        wait_for(lambda: client.get("/health").status_code == 200)
        after = client.post("/v1/chat/completions", json=question(max_tokens=12)).json()["choices"]
        assert after == before and after[0]["message"]["content"].startswith(ANSWER)
        metrics = client.get("/metrics").text
        assert "openkeye_engine_restarts_total 1.0" in metrics and "openkeye_requests_failed_total 1.0" in metrics
        assert server.end() == 0 and [line for line in server.errors if "signal 9" in line] == server.errors[1:]


def test_an_answer_that_is_not_streamed_ends_with_503_when_the_worker_dies(tmp_path):
    with serving("--model", endless_model(tmp_path)) as server, httpx.Client(base_url=server.address, timeout=60) as client:
        got: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: got.append(client.post("/v1/chat/completions", json=LONG)))
        asking.start()
        wait_for(lambda: "openkeye_requests_running 1.0" in client.get("/metrics").text)
        kill_worker(server)
        asking.join(10)
    assert got[0].status_code == 503 and "the engine died" in got[0].json()["error"]["message"]
    assert int(got[0].headers["retry-after"]) > 0


def test_what_the_worker_cannot_open_is_told_in_one_line(tmp_path):
    model = endless_model(tmp_path)
    (model / "model.safetensors").unlink()
    command = [sys.executable, "-m", "openkeye.apps.commands", "serve", "--port", "0", "--model", str(model)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 2 and f"openkeye serve: {model}" in result.stderr and result.stderr.count("\n") == 1, (
        result.stderr
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_its_server(server, number):
    (worker,) = workers_of(server.process.pid)
    server.end(number)
    wait_for(lambda: not is_running(worker), 5.0)


def test_the_process_that_answers_http_holds_no_model(server):
    (worker,) = workers_of(server.process.pid)
    has_torch = ["libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in (server.process.pid, worker)]
    assert has_torch == [False, True]
