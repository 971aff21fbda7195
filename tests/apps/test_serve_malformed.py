"""Hundreds of malformed requests and media: each gets a reason in bounded time, and nothing else changes."""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.apps.malformed_requests import all_cases
from tests.apps.server_process import ANSWER, DEMO, ServerProcess, question, serving, workers_of

CASES = all_cases()
KEY = "sk-first"
LONGEST_SECONDS = 20.0
# for one refusal, on a busy machine
MOST_MEBIBYTES = 1500
# that the worker may hold at any moment
MOST_GROWTH_MEBIBYTES = 150


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A media folder with a clip and traps, beside a file that is not for the public."""
    folder = tmp_path_factory.mktemp("malformed")
    (folder / "media" / "below").mkdir(parents=True)
    shutil.copy(DEMO, folder / "media" / "demo.mp4")
    shutil.copy(DEMO, folder / "secret.mp4")
    (folder / "media" / "words.txt").write_text("no video")
    (folder / "media" / "empty.mp4").write_text("")
    (folder / "media" / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\n{folder}/secret.mp4\n#EXT-X-ENDLIST\n")
    (folder / "media" / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile {folder}/secret.mp4\n")
    os.symlink(folder / "secret.mp4", folder / "media" / "link.mp4")
    os.symlink(folder, folder / "media" / "up")
    os.symlink("loop.mp4", folder / "media" / "loop.mp4")
    os.mkfifo(folder / "media" / "pipe.mp4")
    (folder / "keys.txt").write_text(f"{KEY}\n")
    return folder


def mebibytes(pid: int, name: str) -> int:
    """VmRSS: memory of a process now; VmHWM: at most so far."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) // 1024


def figures(client: httpx.Client) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("openkeye_") and "{" not in line}


@pytest.fixture(scope="module")
def server(media: Path) -> Iterator[ServerProcess]:
    """A server that is what it was before when all cases have been sent."""
    options = ("--media-dir", media / "media", "--allow-remote-media", "--api-key-file", media / "keys.txt")
    with serving(*options, "--max-body-mib", "2") as running, asking(running) as client:
        answers = [client.post("/v1/chat/completions", json=question()).json()["choices"] for _ in range(2)]
        assert answers[0] == answers[1] and answers[0][0]["message"]["content"] == ANSWER
        pids = [running.process.pid, *workers_of(running.process.pid)]
        before = [mebibytes(pid, "VmRSS") for pid in pids]
        yield running
        assert client.post("/v1/chat/completions", json=question()).json()["choices"] == answers[0]
        assert pids == [running.process.pid, *workers_of(running.process.pid)], "the worker died"
        after = [mebibytes(pid, "VmRSS") for pid in pids]
        grown = [now - then for now, then in zip(after, before, strict=True)]
        assert max(grown) < MOST_GROWTH_MEBIBYTES, (before, after)
        assert max(mebibytes(pid, "VmHWM") for pid in pids) < MOST_MEBIBYTES
        told = figures(client)
        assert told["openkeye_pages_free"] == told["openkeye_pages"] > 0
        assert not told["openkeye_requests_running"] and not told["openkeye_requests_waiting"]
        assert told["openkeye_requests_finished_total"] == 3 and not told["openkeye_engine_restarts_total"]
        assert running.end() == 0 and not [line for line in running.errors if "Traceback" in line], running.errors


def asking(server: ServerProcess) -> httpx.Client:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    return httpx.Client(base_url=server.address, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    with asking(server) as http:
        yield http


def test_there_are_hundreds():
    assert len(CASES) >= 300


@pytest.mark.parametrize("case", CASES, ids=[name for name, _, _ in CASES])
def test_it_is_refused_with_a_reason(client, media, case):
    _, made, reason = case
    body = made() if callable(made) else made
    start = time.monotonic()
    response = client.post("/v1/chat/completions", content=json.dumps(body) if isinstance(body, dict) else body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert re.search(reason, error["message"]) and "\n" not in error["message"], (reason, error)
    assert set(error) == {"message", "type", "param", "code"} and str(media) not in error["message"]
    assert time.monotonic() - start < LONGEST_SECONDS


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/v1/chat/completions", {}, 405),
        ("PUT", "/v1/chat/completions", {}, 405),
        ("DELETE", "/v1/models", {}, 405),
        ("POST", "/metrics", {}, 405),
        ("GET", "/v1/none", {}, 404),
        ("GET", "/v1/models/none", {}, 404),
        ("GET", "/v1/models/../../etc/passwd", {}, 404),
        ("GET", "/web/../server.py", {}, 404),
        ("GET", "/web/..%2fserver.py", {}, 404),
        ("GET", "/web/%2e%2e/server.py", {}, 404),
        ("GET", "/web//etc/passwd", {}, 404),
        ("POST", "/v1/chat/completions", {"headers": {"Content-Type": "text/plain"}}, 400),
        ("POST", "/v1/chat/completions", {"headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 400),
        ("POST", "/v1/chat/completions", {"headers": {"Content-Type": ""}}, 400),
        (
            "POST",
            "/v1/chat/completions",
            {"headers": {"Content-Encoding": "gzip"}, "content": b"\x1f\x8b\x08" + bytes(99)},
            400,
        ),
        ("POST", "/v1/chat/completions", {"content": b" " * (3 << 20)}, 413),
        ("POST", "/v1/chat/completions", {"content": (b" " * (1 << 20) for _ in range(3))}, 413),
        ("POST", "/v1/chat/completions", {"json": question() | {"model": "gpt-5"}}, 404),
        ("POST", "/v1/chat/completions", {"json": question() | {"model": ""}}, 404),
        *(
            ("POST", "/v1/chat/completions", {"json": question(), "headers": {"Authorization": key}}, 401)
            for key in (
                "",
                "Bearer",
                "Bearer sk-wrong",
                KEY,
                f"Basic {KEY}",
                f"Bearer {KEY}x",
                "Bearer " + "x" * 9000,
            )
        ),
        ("GET", "/metrics", {"headers": {"Authorization": "Bearer x"}}, 401),
        ("GET", "/v1/models", {"headers": {"Authorization": "Bearer x"}}, 401),
    ],
)
def test_wrong_routes_headers_and_keys(client, method, path, options, status):
    response = client.request(method, path, **options)
    assert response.status_code == status, response.text
    if status != 404 or not path.startswith("/web"):
        assert response.json()["error"]["message"]
