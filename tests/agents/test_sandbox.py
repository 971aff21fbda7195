"""Hostile programs cost their own run only: real processes, in every way in which this machine can wall them in."""

import asyncio
import dataclasses
import os
import pickle
import shutil
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
        run = asyncio.create_task(Sandbox(LIMITS).run(marked("import time; time.sleep(600)", 0, "mark-cancelled")))
        while not processes_with("mark-cancelled"):
            await asyncio.sleep(0.01)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run

    asyncio.run(cancel())
    assert not processes_with("mark-cancelled")


@needs_walls
def test_a_killed_parent_takes_its_programs_with_it():
    source = """
import asyncio
from openkeye.agents.sandbox import Program, Sandbox
asyncio.run(Sandbox().run(Program(("python", "-c", "import time; time.sleep(600)", "mark-orphan"))))
"""
    parent = subprocess.Popen([sys.executable, "-c", source], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 20
    while not processes_with("mark-orphan") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes_with("mark-orphan")
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while processes_with("mark-orphan") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not processes_with("mark-orphan")


def test_a_broken_sandbox_says_so(monkeypatch):
    monkeypatch.setattr(sandbox, "_found", [SandboxAbilities("namespaces", False, True)])
    monkeypatch.setattr(sandbox, "PROCESS", Path("/nowhere.py"))
    with pytest.raises(SandboxError, match=r"nowhere\.py"):
        asyncio.run(Sandbox().run(Program(("python",))))


def test_elsewhere_than_on_linux_the_error_says_so(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(InputError, match="Linux only, this is darwin"):
        asyncio.run(Sandbox().run(Program(("python",))))
