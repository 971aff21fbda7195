"""MCP: a real server process, over its streams and over HTTP."""

import asyncio
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openkeye.agents.loop import run_agent
from openkeye.agents.mcp_tools import McpEnvironment, McpServer, McpServerError
from openkeye.common.checks import InputError
from tests.agents.scripted import Scripted, call, say

pytest.importorskip("mcp")

PROGRAM = str(Path(__file__).with_name("mcp_server.py"))
SERVER = McpServer((sys.executable, PROGRAM))
USER = [{"role": "user", "content": "Count."}]


def judge(counts) -> dict[str, float]:
    return {"outcome": float(any(outcome.result == "x is 3" for outcome in counts.outcomes))}


def environment(server: McpServer = SERVER) -> McpEnvironment:
    return McpEnvironment(USER, server, judge)


def test_tools_of_a_process():
    replies = [
        call("add", name="x"),
        call("add", name="x", amount=2),
        call("add", name=5),
        call("add", name="x", amount=-1),
        say("3"),
    ]
    client = Scripted(replies)
    episode = asyncio.run(run_agent(client, environment()))
    said = [message["content"] for message in episode.transcript if message["role"] == "tool"]
    assert client.seen_tools == ["add", "crash"] and said[:2] == ["x is 1", "x is 3"]
    assert "5 is not of type 'string'" in said[2] and said[3].startswith("error: ") and "only upwards" in said[3]
    assert episode.rewards == {"valid_calls": 0.5, "outcome": 1.0}


def test_a_pickled_environment_goes_on_where_it_was_a_reset_begins_anew_and_close_ends_the_process():
    async def move() -> list[str]:
        first = environment()
        await first.reset()
        await first.step(call("add", name="x", amount=2))
        moved = pickle.loads(pickle.dumps(first))
        await first.close()
        try:
            said = [(await moved.step(call("add", name="x"))).messages[0]["content"]]
            await moved.reset()
            return [*said, (await moved.step(call("add", name="x"))).messages[0]["content"]]
        finally:
            await moved.close()
            await moved.close()

    assert asyncio.run(move()) == ["x is 3", "x is 1"]
    # This process's own: others may try the same file beside it.
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", PROGRAM], capture_output=True, text=True, check=False)
    assert found.stdout == ""


def test_a_server_that_dies_or_is_not_there_is_an_error_of_the_world():
    async def die() -> None:
        world = environment()
        await world.reset()
        try:
            await world.step(call("crash"))
        finally:
            await world.close()

    with pytest.raises(McpServerError):
        asyncio.run(asyncio.wait_for(die(), 20))
    with pytest.raises(McpServerError, match="no-such-server"):
        asyncio.run(asyncio.wait_for(environment(McpServer(("no-such-server",))).reset(), 20))
    with pytest.raises(InputError, match="command, or a URL"):
        McpServer()


def test_tools_over_http():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, PROGRAM, str(port)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        server = McpServer(url=f"http://127.0.0.1:{port}/mcp")
        episode = asyncio.run(run_agent(Scripted([call("add", name="x", amount=3), say("3")]), environment(server)))
        assert episode.rewards["outcome"] == 1.0
    finally:
        process.kill()
        process.wait()
    with pytest.raises(McpServerError, match=str(port)):
        asyncio.run(asyncio.wait_for(environment(McpServer(url=f"http://127.0.0.1:{port}/mcp")).reset(), 20))


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(InputError, match=r"pip install 'mcp>=2\.0'"):
        environment()
