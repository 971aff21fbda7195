"""Roles as real processes: killed, hanging, stopped; each costs what it had in hand and nothing else."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from openkeye.common.checks import InputError
from openkeye.rl.loop import Orchestrator
from openkeye.rl.processes import RoleProcess, role_folder
from openkeye.rl.role_calls import RoleError
from openkeye.rl.roles import RoleLost
from openkeye.train.reporter import SilentReporter
from tests.rl import process_roles
from tests.rl.process_roles import open_echo, open_processes, open_refusing
from tests.rl.stand_ins import config_of, result_of, run_here


def run_with_processes(config, while_running=None, **worker):
    """A run whose roles are processes; `while_running(processes)` is awaited beside it."""
    reporter = SilentReporter()

    async def both(run):
        beside = asyncio.create_task(while_running(process_roles.started)) if while_running else None
        try:
            return await run
        finally:
            if beside is not None:
                beside.cancel()

    orchestrator = Orchestrator(config, partial(open_processes, say=reporter.say, **worker), reporter)
    learn = orchestrator._learn
    orchestrator._learn = lambda: both(learn())
    assert orchestrator.run()
    return reporter


async def kill_by_turns(processes):
    """Each process in turn, again and again, at moments that have nothing to do with what they do."""
    draw = random.Random(1)
    for number in range(1000):
        process = processes[number % len(processes)]
        await process.ready()
        await asyncio.sleep(draw.uniform(0.0, 0.2))
        if process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)


def test_workers_and_learner_killed_at_work_change_nothing(tmp_path):
    config = config_of(tmp_path / "killed", max_losses=50)
    reporter = run_with_processes(config, kill_by_turns)
    unbroken = config_of(tmp_path / "unbroken")
    run_here(unbroken)
    assert result_of(config) == result_of(unbroken)
    killed = Counter(line.split()[0] for line in reporter.lines if "signal 9" in line and "started again" in line)
    assert killed["learner"] and killed["worker0"] and killed["worker1"], killed
    assert any("begins again" in line for line in reporter.lines) or reporter.records[-1]["groups/lost"], reporter.lines


def test_code_that_never_returns_costs_its_rollout_alone(tmp_path):
    # Member 1 of group 1 holds up its process for ever, member 2 waits for ever; both are played beside others.
    config = config_of(tmp_path, num_steps=2, rollout_seconds=1.5, group_size=4)
    reporter = run_with_processes(config, num_workers=1, blocks="1.1", waits="1.2")
    learnt = [line.split()[1] for line in result_of(config)["learnt"]]
    assert len(learnt) == len(set(learnt)) == 2 * 8 - 2
    assert [id.partition("/")[2] for id in learnt if "/1." in id] == ["1.0", "1.3"]
    told = "\n".join(reporter.lines)
    assert "1.1 failed" in told and "held it up" in told and "1.2 failed: nothing after 1.5 s" in told
    assert sum(record["groups/failed"] for record in reporter.records) == 2


def test_roles_end_with_the_process_that_started_them(tmp_path):
    code = (
        "import asyncio, sys\n"
        "from functools import partial\n"
        "from openkeye.rl.processes import RoleProcess, role_folder\n"
        "from tests.rl.process_roles import open_echo\n"
        "async def main():\n"
        "    async with role_folder() as folder:\n"
        "        process = RoleProcess(folder, 'echo', open_echo)\n"
        "        await process.ready()\n"
        "        print(process.pid, flush=True)\n"
        "        await asyncio.sleep(100)\n"
        "asyncio.run(main())\n"
    )
    paths = os.pathsep.join(map(os.path.abspath, sys.path))
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.05)


def with_echo(ask, open_role=open_echo, **options):
    """What `ask(process)` returns, with a process that echoes."""

    async def main():
        async with role_folder() as folder:
            process = RoleProcess(folder, "echo", open_role, **options)
            try:
                return await ask(process)
            finally:
                await process.stop()

    return asyncio.run(main())


def test_calls_cross_over_with_callbacks_errors_and_cancellation():
    async def ask(process):
        await process.ready()
        told = []
        assert await process.call("echo", {"a": 1}, told.append) == {"a": 1} and told == ["first", "second"]
        with pytest.raises(InputError, match="wrong shape"):
            await process.call("refuse")
        with pytest.raises(RoleError, match="ZeroDivisionError"):
            await process.call("break_down")
        call = asyncio.create_task(process.call("wait"))
        await asyncio.sleep(0.2)
        call.cancel()
        await asyncio.sleep(0.2)
        assert await process.call("num_cancelled") == 1

    with_echo(ask)


def test_a_stopped_process_is_ended_and_started_again(monkeypatch):
    monkeypatch.setattr("openkeye.rl.processes.SILENT_SECONDS", 1.0)

    async def ask(process):
        await process.ready()
        pid = process.pid
        call = asyncio.create_task(process.call("wait"))
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(RoleLost, match="no sign of life"):
            await call
        await process.ready()
        assert process.pid != pid and await process.call("echo", 3, print) == 3

    with_echo(ask)


def test_what_cannot_be_opened_says_why():
    async def ask(process):
        await process.ready()

    with pytest.raises(InputError, match="no such model"):
        with_echo(ask, open_refusing)


def test_torchrun_ranks_are_asked_the_same_and_die_together():
    async def ask(process):
        await process.ready()
        first = await process.call("ranks")
        assert first == (0, 2)
        call = asyncio.create_task(process.call("wait"))
        await asyncio.sleep(0.1)
        with pytest.raises(RoleLost):
            await asyncio.gather(call, process.call("end_rank", 1))
        await process.ready()
        assert await process.call("ranks") == (0, 2)

    with_echo(ask, num_ranks=2)
