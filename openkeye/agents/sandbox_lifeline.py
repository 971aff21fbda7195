"""The process beside an untrusted program, from outside: started, told, waited for, and ended whatever state it is in.

What is said lies in files in memory, and only the process's end is waited for. asyncio's own subprocesses will not do: where
all tasks of a loop are cancelled, so is the one that connects their pipes, and whoever starts a process waits forever.
"""

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

END_SECONDS = 2.0
# for killing a program when its run is given up; then the process beside it is killed, and namespaces end with it


class SandboxError(OSError):
    """The sandbox itself failed; says nothing about the program."""


async def ask(words: Sequence[str], order_for: Callable[[int], Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """The answer of `sandbox_process.py`.

    Args:
        words: the command that runs it; the number of the file that holds the order is added.
        order_for: the order, from the number of the process.
        seconds: until it must have answered.

    Raises:
        SandboxError: it did not answer.
    """
    with ExitStack() as files:
        given, answer, complaint = (files.enter_context(open(os.memfd_create(name), "w+b")) for name in ("in", "out", "err"))
        process = subprocess.Popen(
            [*words, str(given.fileno())],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=answer,
            stderr=complaint,
            pass_fds=[given.fileno()],
            start_new_session=True,
        )
        end = _end_of(process)
        order: Mapping[str, Any] = {}
        try:
            order = order_for(process.pid)
            given.write(json.dumps(order).encode())
            given.flush()
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.write(b"\0")
            is_over = bool((await asyncio.wait({end}, timeout=seconds))[0])
        finally:
            await _end(process, end, order)
        if not is_over:
            raise SandboxError(f"sandbox: no answer within {seconds:g} s")
        content, complaints = (_text(file.fileno()) for file in (answer, complaint))
    if process.returncode != 0 or not content:
        lines = complaints.decode(errors="replace").strip().splitlines()
        raise SandboxError(f"sandbox: {lines[-1] if lines else f'its process ended with {process.returncode}'}")
    result: dict[str, Any] = json.loads(content)
    return result


def _text(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _end_of(process: "subprocess.Popen[bytes]") -> "asyncio.Future[None]":
    """Done when a process has ended; its exit code is there then."""
    loop = asyncio.get_running_loop()
    descriptor, end = os.pidfd_open(process.pid), loop.create_future()

    def note() -> None:
        loop.remove_reader(descriptor)
        os.close(descriptor)
        process.wait()
        end.set_result(None)

    loop.add_reader(descriptor, note)
    return end


async def _end(process: "subprocess.Popen[bytes]", end: "asyncio.Future[None]", order: Mapping[str, Any]) -> None:
    """The end of its input tells the process to kill the program whole, and to go; one that does not is killed."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        await asyncio.wait({end}, timeout=END_SECONDS)
    finally:
        # Also where this wait is cancelled in its turn.
        if process.returncode != 0 and order.get("mode") == "plain":
            # There is no namespace that ends with it.
            kill_program(process.pid, order["uid"], order["folder"])
        process.kill()
    await asyncio.wait({end})


def kill_program(supervisor: int, uid: int | None, folder: str) -> None:
    """SIGKILL for every process of a program in the mode "plain", when the process beside it hangs or is gone.

    These are its descendants, who become its children when they are orphans. Where it is gone they are those of the run's own
    user; or, without one, those that stand in the folder or are told of it, which a program may undo if it sets out to.
    """
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline:
        parents = _parents()
        found, grew = {supervisor}, True
        while grew:
            more = {number for number, parent in parents.items() if parent in found} - found
            found |= more
            grew = bool(more)
        found |= {number for number in parents if _belongs(number, uid, folder)}
        found -= {supervisor, os.getpid()}
        if not found:
            return
        for number in found:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.005)


def _parents() -> dict[int, int]:
    """Parents of all processes but the dead."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = path.read_bytes().rpartition(b")")[2].split()[:2]
            if state not in (b"Z", b"X"):
                found[int(path.parent.name)] = int(parent)
    return found


def _belongs(number: int, uid: int | None, folder: str) -> bool:
    """Whether a process is of the run's user, or of this user in the run's folder."""
    place = Path(f"/proc/{number}")
    try:
        owner = place.stat().st_uid
        if uid is not None or owner != os.getuid():
            return owner == uid
        variables = (place / "environ").read_bytes().split(b"\0")
        return f"HOME={folder}".encode() in variables or (place / "cwd").readlink().is_relative_to(folder)
    except OSError:
        return False
