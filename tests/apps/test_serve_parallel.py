"""`openkeye serve` over two ranks, as torchrun starts them: one serves, both answer, and they end together."""

import re
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.apps.server_process import ANSWER, DEMO, question
from tests.rank_processes import started


@pytest.fixture
def served() -> Iterator[tuple[str, list[subprocess.Popen]]]:
    """The address, and both ranks."""
    options = ("--port", "0", "--media-dir", DEMO.parent)
    with started(2, "openkeye.apps.commands", "serve", *options) as processes:
        line = processes[0].stderr.readline()
        found = re.search(r"(http://\S+) \(page\)", line)
        assert found, line
        yield found[1], processes


def ask(address: str) -> str:
    reply = httpx.post(f"{address}/v1/chat/completions", json=question(), timeout=60)
    return reply.raise_for_status().json()["choices"][0]["message"]["content"]


def test_two_ranks_serve_many_and_end_on_sigterm(served):
    address, processes = served
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(ask, [address] * 3)) == [ANSWER] * 3
    refused = httpx.post(f"{address}/v1/chat/completions", json=question(logprobs="yes"), timeout=60)
    assert refused.status_code == 400 and ask(address) == ANSWER
    # torchrun sends it to all of them.
    for process in reversed(processes):
        process.send_signal(signal.SIGTERM)
    for process in processes:
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0 and errors == ""


def test_a_server_ends_with_a_rank_that_was_killed(served):
    address, processes = served
    assert httpx.get(f"{address}/health").status_code == 200
    processes[1].kill()
    _, errors = processes[0].communicate(timeout=20)
    assert processes[0].returncode == 1 and errors == "openkeye: rank 1 has ended, and so does rank 0\n"
