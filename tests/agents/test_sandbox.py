"""Hostile programs cost their own run only: real processes, in every way in which this machine can wall them in."""

import asyncio
import dataclasses
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openkeye.agents import sandbox
from openkeye.agents.sandbox import Limits, Program, Sandbox, SandboxAbilities, SandboxError
from openkeye.common.checks import InputError
from tests.agents.hostile_programs import LIMITS, PLAIN, PROGRAMS, WALLED, marked, processes_with, try_program

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="programs run on Linux only")


def can_be_walled() -> bool:
    """Whether this machine allows namespaces, asked of the system's own tool: a broken sandbox must fail, not be skipped."""
    if not sys.platform.startswith("linux") or shutil.which("unshare") is None:
        return False
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", *user, "--net", "--pid", "--mount", "--fork", "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


needs_walls = pytest.mark.skipif(not can_be_walled(), reason="this machine lets no network be cut off")


@needs_walls
def test_each_hostile_program_costs_its_own_run_only():
    async def try_all():
        programs = {**PROGRAMS, **WALLED}
        return await asyncio.gather(*(try_program(name, hostile) for name, hostile in programs.items()))

    assert len(asyncio.run(try_all())) == len(PROGRAMS) + len(WALLED)


def other_user(*words: str) -> subprocess.CompletedProcess:
    """The same programs, tried by a user who is not root."""
    python = "/usr/bin/python3"
    if os.geteuid() != 0 or not os.path.exists(python) or not os.access(ROOT, os.R_OK):
        pytest.skip("needs root, who becomes another user, and the system's Python")
    command = [python, "-B", "-m", "tests.agents.hostile_programs", *words]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        user=54321,
        group=54321,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("mode", ["", "bubblewrap", "plain"])
def test_a_plain_user_walls_them_in_as_well(mode):
    if mode == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    result = other_user(*([mode] if mode else []))
    if "SandboxAbilities('plain'" in result.stdout.replace("mode=", "") and mode == "":
        pytest.skip("no user namespaces for this user")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "kills the watcher" in result.stdout or mode == "plain"


def test_without_walls_programs_are_refused_unless_the_network_is_allowed(monkeypatch):
    monkeypatch.setattr(sandbox, "_found", [dataclasses.replace(PLAIN, reason="unshare: not permitted")])
    program = Program(("python", "-c", "print('ran')"))
    with pytest.raises(InputError, match=r"unshare: not permitted.*allow_network=True"):
        asyncio.run(Sandbox().run(program))
    before = set(Path("/tmp").glob("openkeye-sandbox-*"))
    assert asyncio.run(Sandbox(allow_network=True).run(program)).stdout == "ran\n"
    assert set(Path("/tmp").glob("openkeye-sandbox-*")) <= before


def test_plain_mode_kills_whole_and_limits(monkeypatch):
    monkeypatch.setattr(sandbox, "_found", [PLAIN])
    for name in ("forks", "becomes a daemon", "ignores signals", "allocates in many"):
        asyncio.run(try_program(name, PROGRAMS[name]))


@needs_walls
def test_allowed_network_is_there():
    program = Program(("python", "-c", "import socket; print(len(socket.if_nameindex()))"))
    inside = asyncio.run(Sandbox(allow_network=True).run(program))
    assert int(inside.stdout) == len(os.listdir("/sys/class/net"))


@needs_walls
def test_files_go_in_and_come_back():
    source = "open('out/made', 'w').write(open('in/given').read() + input()); import os; os.symlink('/usr/bin/env', 'link')"
    files = {"in/given": b"one ", "out/empty": ""}
    program = Program(("python", "-c", source), files, "two", outputs=("out/made", "link", "missing"))
    ended = asyncio.run(Sandbox().run(program))
    assert ended.is_success and ended.files == {"out/made": b"one two"}
    with pytest.raises(InputError, match=r"\.\./x"):
        Program(("python",), {"../x": ""})
    with pytest.raises(InputError, match="wall_seconds is 0"):
        Limits(wall_seconds=0)


@needs_walls
def test_a_missing_program_is_its_own_failure():
    ended = asyncio.run(Sandbox().run(Program(("no-such-program",))))
    assert ended.exit_code == 127 and "No such file" in ended.stderr


@needs_walls
def test_many_at_once_are_bounded_and_settings_pickle():
    async def run_many(sandbox: Sandbox) -> float:
        start = time.monotonic()
        program = Program(("python", "-c", "import time; time.sleep(0.3)"))
        assert all(ended.is_success for ended in await asyncio.gather(*(sandbox.run(program) for _ in range(4))))
        return time.monotonic() - start

    assert asyncio.run(run_many(pickle.loads(pickle.dumps(Sandbox(num_at_once=2))))) > 0.6


@needs_walls
def test_a_cancelled_run_is_killed():
    async def cancel() -> None:
        run = asyncio.create_task(Sandbox(LIMITS).run(marked("import time; time.sleep(8)", 0, "mark-cancelled")))
        while not processes_with("mark-cancelled"):
            await asyncio.sleep(0.01)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run

    asyncio.run(cancel())
    assert not processes_with("mark-cancelled")


@needs_walls
@pytest.mark.parametrize("mode", ["", "plain"])
def test_runs_are_cancelled_with_their_loop_at_any_moment(monkeypatch, mode):
    if mode:
        monkeypatch.setattr(sandbox, "_found", [PLAIN])
    asyncio.run(sandbox.find_abilities())

    async def fail(num_turns: int) -> None:
        box = Sandbox(LIMITS, allow_network=bool(mode))
        runs = [asyncio.create_task(box.run(marked("import time; time.sleep(8)", 0, "mark-all"))) for _ in range(2)]
        for _ in range(num_turns):
            await asyncio.sleep(0)
        await asyncio.sleep(0.05 * (num_turns > 4))
        assert not any(run.done() for run in runs)
        raise ZeroDivisionError

    start = time.monotonic()
    for num_turns in range(7):
        with pytest.raises(ZeroDivisionError):
            asyncio.run(fail(num_turns))
    assert time.monotonic() - start < 10 and not processes_with("mark-all")


def wait_for(is_so) -> bool:
    deadline = time.monotonic() + 5
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.02)
    return is_so()


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_without_walls_a_program_ends_with_a_process_beside_it_that_hangs_or_is_gone(monkeypatch, number):
    monkeypatch.setattr(sandbox, "_found", [PLAIN])
    before = set(Path("/tmp").glob("openkeye-sandbox-*"))
    source = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-S", "-c", "import time; time.sleep(8)", "mark-stopped"])
    os._exit(0)
time.sleep(8)
"""

    async def stop() -> None:
        box = Sandbox(LIMITS, allow_network=True)
        run = asyncio.create_task(box.run(marked(source, 0, "mark-stopped")))
        while len(processes_with("mark-stopped")) < 2:
            await asyncio.sleep(0.01)
        places = set(Path("/tmp").glob("openkeye-sandbox-*")) - before
        assert len(places) == 1
        (parent,) = [child for child in children_of(os.getpid()) if "sandbox_process.py" in command_of(child)]
        os.kill(parent, number)
        if number == signal.SIGKILL:
            with pytest.raises(SandboxError, match="ended with -9"):
                await run
            return
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run

    asyncio.run(stop())
    assert not processes_with("mark-stopped")
    assert set(Path("/tmp").glob("openkeye-sandbox-*")) <= before


def children_of(number: int) -> list[int]:
    return [int(word) for path in Path(f"/proc/{number}/task").glob("*/children") for word in path.read_text().split()]


def command_of(number: int) -> str:
    return Path(f"/proc/{number}/cmdline").read_bytes().replace(b"\0", b" ").decode()


@needs_walls
@pytest.mark.parametrize("mode", ["", "plain"])
def test_a_killed_parent_takes_its_programs_with_it(mode):
    source = """
import asyncio, os, sys, threading, time
from openkeye.agents import sandbox
from openkeye.agents.sandbox import Program, Sandbox
from tests.agents.hostile_programs import PLAIN
if sys.argv[1:]:
    sandbox._found[:] = [PLAIN]

def fork_while_it_runs():
    time.sleep(0.5)
    # A forked process holds the other end of the lifeline, as those of a data loader may.
    if os.fork() == 0:
        time.sleep(8)
        os._exit(0)

threading.Thread(target=fork_while_it_runs).start()
program = Program(("python", "-c", "import time; time.sleep(8)", "mark-orphan"))
asyncio.run(Sandbox(allow_network=bool(sys.argv[1:])).run(program))
"""
    before = set(Path("/tmp").glob("openkeye-sandbox-*"))
    command = [sys.executable, "-c", source, *([mode] if mode else [])]
    parent = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert wait_for(lambda: processes_with("mark-orphan") and len(children_of(parent.pid)) == 2)
    (forked,) = [number for number in children_of(parent.pid) if "sandbox_process.py" not in command_of(number)]
    parent.kill()
    parent.wait()
    try:
        assert wait_for(lambda: not processes_with("mark-orphan"))
        assert wait_for(lambda: set(Path("/tmp").glob("openkeye-sandbox-*")) <= before)
    finally:
        os.kill(forked, signal.SIGKILL)


def test_a_broken_sandbox_says_so(monkeypatch):
    monkeypatch.setattr(sandbox, "_found", [SandboxAbilities("namespaces", False, True)])
    monkeypatch.setattr(sandbox, "PROCESS", Path("/nowhere.py"))
    with pytest.raises(SandboxError, match=r"nowhere\.py"):
        asyncio.run(Sandbox().run(Program(("python",))))


def test_elsewhere_than_on_linux_the_error_says_so(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(InputError, match="Linux only, this is darwin"):
        asyncio.run(Sandbox().run(Program(("python",))))
