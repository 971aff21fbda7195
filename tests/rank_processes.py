"""Several real processes that find one another as torchrun's do, for tests."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]


def find_free_port() -> int:
    """A port that nobody listens to just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _listen_to_signals() -> None:
    # A test runner in the background may have been told to ignore Ctrl-C, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def started(size: int, module: str, *arguments: str | Path) -> Iterator[list[subprocess.Popen]]:
    """`python -m module` as ranks 0 to size - 1; whatever still runs at the end is killed."""
    common = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env={**common, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_listen_to_signals,
        )
        for rank in range(size)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def run_ranks(size: int, module: str, *arguments: str | Path) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of every rank."""
    with started(size, module, *arguments) as processes:
        outputs = [process.communicate(timeout=120) for process in processes]
        return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]
