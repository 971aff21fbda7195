"""Many clients at once against `openkeye serve`: errors, times to the first and the last word, and the server's memory.

    python -m benchmarks.load [--clients 64] [--minutes 5] [--url http://127.0.0.1:8000] [--max-tokens 24]

Without --url a server with openkeye-tiny is started on a free port and stopped at the end. Each client asks again as soon as it
has its answer: text, a picture in the request, or the bundled clip, all streamed. A request that is refused because the queue
is full counts as refused and is asked again a second later; any other failure is an error. The exit status is 1 after an error,
or where the memory of one of the server's two processes grew.
"""

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

import openkeye

MEDIA = Path(openkeye.__file__).parent / "media"
QUESTIONS = ("When is the red circle visible?", "What word can be read at 6.1 seconds?", "How many circles appear?")
START_SECONDS = 120.0
REQUEST_SECONDS = 600.0
WARM_SHARE = 0.2
# of the run, after which the server's memory is taken for what it needs
GROWTH_MEBIBYTES, GROWTH_SHARE = 32, 0.05
# by which a mean of halves may differ though nothing leaks


@dataclass
class Tally:
    """What came of the requests."""

    statuses: Counter[str] = field(default_factory=Counter)
    first_seconds: list[float] = field(default_factory=list)
    whole_seconds: list[float] = field(default_factory=list)
    num_tokens: int = 0


def messages(kind: int) -> list[dict[str, Any]]:
    """Text, a picture of one colour, or the bundled clip."""
    question = {"type": "text", "text": QUESTIONS[kind % len(QUESTIONS)]}
    if kind % 3 == 0:
        return [{"role": "user", "content": question["text"]}]
    if kind % 3 == 1:
        buffer = io.BytesIO()
        Image.new("RGB", (112, 112), (40 * (kind % 6), 80, 160)).save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        part = {"type": "image_url", "image_url": {"url": url}}
    else:
        part = {"type": "video_url", "video_url": {"url": str(next(MEDIA.glob("*.mp4")))}}
    return [{"role": "user", "content": [part, question]}]


async def ask(client: httpx.AsyncClient, kind: int, max_tokens: int, tally: Tally) -> None:
    """One streamed answer."""
    body = {"model": "openkeye-tiny", "messages": messages(kind), "max_tokens": max_tokens, "stream": True}
    body["stream_options"] = {"include_usage": True}
    start, first, is_done = time.monotonic(), None, False
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            tally.statuses[f"{response.status_code}"] += 1
            if response.status_code != 429:
                print(f"error {response.status_code}: {text[:200]}", file=sys.stderr)
            return
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                is_done = True
            elif line.startswith("data: "):
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    print(f"error in a stream: {chunk['error']}", file=sys.stderr)
                    break
                first = first or time.monotonic()
                tally.num_tokens += (chunk.get("usage") or {}).get("completion_tokens", 0)
    tally.statuses["200" if is_done else "cut off"] += 1
    if is_done and first is not None:
        tally.first_seconds.append(first - start)
        tally.whole_seconds.append(time.monotonic() - start)


async def run_client(client: httpx.AsyncClient, kinds: itertools.count, until: float, max_tokens: int, tally: Tally) -> None:
    """Requests one after the other until the time is over."""
    while time.monotonic() < until:
        refused = tally.statuses["429"]
        try:
            await ask(client, next(kinds), max_tokens, tally)
        except httpx.HTTPError as error:
            tally.statuses[type(error).__name__] += 1
            print(f"error: {error!r}", file=sys.stderr)
        if tally.statuses["429"] > refused:
            await asyncio.sleep(1 + random.random())


def resident_mebibytes(pid: int) -> tuple[float, float]:
    """Memory of the process that answers HTTP, and of the workers that it started."""
    own = workers = 0.0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:
            # Gone since the folder was listed.
            continue
        size = int(fields.get("VmRSS", "0 kB").split()[0]) / 1024
        own += size * (int(fields["Pid"]) == pid)
        workers += size * (int(fields["PPid"]) == pid)
    return own, workers


async def watch_memory(pid: int, until: float) -> list[tuple[float, float, float]]:
    """(seconds, MiB of the HTTP process, MiB of its worker) every few seconds."""
    start, seen = time.monotonic(), []
    while time.monotonic() < until:
        seen.append((time.monotonic() - start, *resident_mebibytes(pid)))
        await asyncio.sleep(2)
    return seen


@asynccontextmanager
async def server(url: str | None) -> AsyncIterator[tuple[str, int | None]]:
    """The address of a running server, or of one that is started for this run, and then its process number."""
    if url is not None:
        yield url, None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "import sys; from openkeye.apps.commands import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", program, "serve", "--port", str(port), "--media-dir", str(MEDIA)])
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        async with httpx.AsyncClient(base_url=address) as client:
            while True:
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit("openkeye serve did not start")
                try:
                    if (await client.get("/health")).status_code == 200:
                        break
                except httpx.TransportError:
                    await asyncio.sleep(0.2)
        yield address, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def quantile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[round(100 * share) - 1] if len(values) > 1 else float("nan")


def report(tally: Tally, memory: list[tuple[float, float, float]], seconds: float, num_clients: int) -> int:
    """Prints what was measured; 1 where a request failed."""
    print(f"{os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}: {num_clients} clients for {seconds / 60:.1f} minutes\n")
    print("| requests answered | refused (queue full) | errors | answers/s | tokens/s |\n|---|---|---|---|---|")
    errors = {status: count for status, count in tally.statuses.items() if status not in ("200", "429") and count}
    told = ", ".join(f"{count} x {status}" for status, count in errors.items()) or "0"
    answered = tally.statuses["200"]
    print(f"| {answered} | {tally.statuses['429']} | {told} | {answered / seconds:.2f} | {tally.num_tokens / seconds:.1f} |\n")
    print("| seconds | p50 | p99 |\n|---|---|---|")
    for name, values in (("to the first event", tally.first_seconds), ("to the last", tally.whole_seconds)):
        print(f"| {name} | {quantile(values, 0.5):.2f} | {quantile(values, 0.99):.2f} |")
    has_grown = report_memory([row for row in memory if row[0] > WARM_SHARE * seconds])
    return int(bool(errors) or not answered or has_grown)


def report_memory(rows: list[tuple[float, float, float]]) -> bool:
    """Prints the memory after warming up; whether a process holds more in the second half than in the first."""
    if len(rows) < 2:
        return False
    half, has_grown = len(rows) // 2, False
    print("\n| process | MiB, first half | MiB, second half | at most |\n|---|---|---|---|")
    for name, column in (("HTTP", 1), ("engine", 2)):
        sizes = [row[column] for row in rows]
        first, second = statistics.mean(sizes[:half]), statistics.mean(sizes[half:])
        print(f"| {name} | {first:.0f} | {second:.0f} | {max(sizes):.0f} |")
        has_grown = has_grown or second > first + max(GROWTH_MEBIBYTES, GROWTH_SHARE * first)
    if has_grown:
        print("\nmemory grows")
    return has_grown


async def main_async(arguments: argparse.Namespace) -> int:
    tally, kinds = Tally(), itertools.count()
    limits = httpx.Limits(max_connections=arguments.clients)
    async with (
        server(arguments.url) as (address, pid),
        httpx.AsyncClient(base_url=address, timeout=REQUEST_SECONDS, limits=limits) as client,
    ):
        start = time.monotonic()
        until = start + 60 * arguments.minutes
        watching = asyncio.create_task(watch_memory(pid, until)) if pid is not None else None
        clients = (run_client(client, kinds, until, arguments.max_tokens, tally) for _ in range(arguments.clients))
        await asyncio.gather(*clients)
        memory = [] if watching is None else await watching
        return report(tally, memory, time.monotonic() - start, arguments.clients)


def main() -> int:
    parser = argparse.ArgumentParser(description="Many clients at once against `openkeye serve`.")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--url", help="a server that runs already and may read openkeye/media; its memory is then not watched")
    parser.add_argument("--max-tokens", type=int, default=24)
    return asyncio.run(main_async(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
