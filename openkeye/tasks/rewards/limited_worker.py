"""`LimitedWorker`: work that may hang, eat memory or crash, done by a process that is replaced when it does.

The process is started as `python -m MODULE SECONDS BYTES` and speaks JSON lines: one request in, one reply out, in order. Its
side is `serve`. It ends by itself when a request takes too long or nobody reads it any more, so that none outlives its owner.
"""

import contextlib
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openkeye

START_SECONDS = 120.0
# imports on a busy machine
GRACE_SECONDS = 1.0
# that the owner waits beyond the limit for the process to end by itself
MAX_REPLY_BYTES = 1 << 20


class LimitedWorker:
    """One process at a time; calls from several threads wait for each other."""

    def __init__(self, module: str, limit_seconds: float, limit_bytes: int) -> None:
        self.module = module
        self.limit_seconds = limit_seconds
        self.limit_bytes = limit_bytes
        self.num_replaced = 0
        # processes that hung or died
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        # process id of whoever started it: a forked child must not read its parent's replies

    def call(self, request: Any) -> Any | None:
        """The reply; None where the work took too long, or took the process with it."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            line = json.dumps(request).encode() + b"\n"
            try:
                process.stdin.write(line)
                process.stdin.flush()
                reply = self._line(process, self.limit_seconds + GRACE_SECONDS)
            except BrokenPipeError:
                reply = None
            if reply is None:
                self.num_replaced += 1
                self._end()
                return None
            return json.loads(reply)

    def close(self) -> None:
        """End the process; the next call starts one."""
        with self._lock:
            self._end()

    @property
    def process_id(self) -> int | None:
        """Of the process that stands ready; None before the first call and after a failure."""
        return None if self._process is None else self._process.pid

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        if self._owner == os.getpid():
            self._end()
        paths = os.pathsep.join([str(Path(openkeye.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module, str(self.limit_seconds), str(self.limit_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            # A terminal's Ctrl-C goes to a whole group; the worker ends when its pipe closes.
            process_group=0,
        )
        self._owner = os.getpid()
        ready = self._line(self._process, START_SECONDS)
        if ready is None:
            self._end()
            raise RuntimeError(f"{self.module} did not start; run `python -m {self.module} 5 4000000000` to see why")
        return self._process

    def _line(self, process: "subprocess.Popen[bytes]", seconds: float) -> bytes | None:
        """The next line of the process; None where it ends or says nothing in time."""
        assert process.stdout is not None
        deadline, text = time.monotonic() + seconds, b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not text.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return None
                piece = os.read(process.stdout.fileno(), 1 << 16)
                if not piece or len(text) > MAX_REPLY_BYTES:
                    return None
                text += piece
        return text

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                # (closing writes what is left in the buffer)
                pipe.close()


def serve(work: Callable[[Any], Any], limit_seconds: float, limit_bytes: int) -> None:
    """The process' side: a reply for each request on standard input, until it closes.

    `work` gets a request and returns what JSON can say. A request that takes longer than the limit ends the process, whatever
    library it is stuck in: the alarm has its default action, which no code needs to let through.
    """
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies = os.fdopen(os.dup(1), "wb")
    # Libraries may print; only replies go to the owner.
    os.dup2(2, 1)
    replies.write(b"ready\n")
    replies.flush()
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, limit_seconds)
        reply = json.dumps(work(json.loads(line)))
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        replies.write(reply.encode() + b"\n")
        replies.flush()
