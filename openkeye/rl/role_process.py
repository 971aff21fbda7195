"""The process of a role: python -m openkeye.rl.role_process FOLDER NAME, or the same under torchrun.

`FOLDER/NAME.opening` is a pickled `Opening`; calls are answered at `FOLDER/NAME.RANK.socket`. A thread watches: it shows that
the process lives, ends it when the one that started it is gone, and when its loop is held up for too long.
"""

import asyncio
import fcntl
import math
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openkeye.common.checks import InputError
from openkeye.common.launch import rank
from openkeye.rl.role_calls import RoleServer

BEAT_SECONDS = 0.25
REFUSED_STATUS = 2
PARENT_LOCK = "parent.lock"
# held by whoever starts roles for as long as it lives
OPENING, SOCKET, ALIVE, REFUSAL = ".opening", ".socket", ".alive", ".refusal"
OpenRole = Callable[[], Awaitable[Any]]


@dataclass(frozen=True)
class Opening:
    """What a process needs to know."""

    open_role: OpenRole
    # a function of a module, or a `partial` of one
    blocked_seconds: float
    # for which a call may hold up the others without awaiting anything; inf for roles that compute


class Watch:
    """The watching thread."""

    def __init__(self, folder: Path, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self.blocked_seconds = math.inf
        # for which the loop may be held up
        self._lock = (folder / PARENT_LOCK).open()
        self._alive = folder / f"{name}{ALIVE}"
        self._loop = loop
        self._answered = time.monotonic()
        threading.Thread(target=self._run, name="openkeye-watch", daemon=True).start()

    def _run(self) -> None:
        while True:
            if _is_free(self._lock):
                os._exit(0)
            self._loop.call_soon_threadsafe(self._answer)
            self._alive.touch()
            if time.monotonic() - self._answered > self.blocked_seconds:
                task = asyncio.current_task(self._loop)
                # Read by whoever starts the next one: the call that hangs is not asked again, its neighbours are.
                self._alive.write_text(task.get_name() if task is not None else "")
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(BEAT_SECONDS)

    def _answer(self) -> None:
        self._answered = time.monotonic()


def _is_free(lock: Any) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def serve(folder: Path, name: str) -> None:
    """Open the role and answer calls."""
    opening: Opening = pickle.loads((folder / f"{name}{OPENING}").read_bytes())
    place = f"{name}.{rank()}"
    watch = Watch(folder, place, asyncio.get_running_loop())
    try:
        role = await opening.open_role()
    except InputError as error:
        (folder / f"{name}{REFUSAL}").write_text(str(error))
        sys.exit(REFUSED_STATUS)
    watch.blocked_seconds = opening.blocked_seconds
    # (loading a model holds it up for long)
    await RoleServer(role).serve(folder / f"{place}{SOCKET}")


def main() -> None:
    """See the top of this file."""
    # A terminal's Ctrl-C is for whoever started us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2]))


if __name__ == "__main__":
    main()
