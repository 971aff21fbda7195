"""The loader of a run that is killed, interrupted and resumed: real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import pytest

from openkeye.data.loader import Loader
from tests.data.loader_process import make_config, make_sources
from tests.data.small_sources import convert
from tests.data.test_loader import load, quiet
from tests.data.test_reading_pool import is_alive

ROOT = Path(__file__).parents[2]


def start(folder: Path, num_ranks: int, num_workers: int) -> subprocess.Popen:
    """A run in a process group of its own, as a terminal's is."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.data.loader_process", folder, str(num_ranks), str(num_workers)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # (a test runner in the background may have been told to ignore Ctrl-C, and children inherit that)
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def read_steps(process: subprocess.Popen, num: int) -> None:
    """Wait for so many steps more."""
    for _ in range(num):
        assert process.stdout.readline(), process.stderr.read()


def wait_until_gone(pids: list[int]) -> None:
    """Fails where one lives on."""
    end = time.monotonic() + 20
    while left := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < end, left
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole() -> list:
    """Never interrupted, one rank, no workers."""
    return load()[0]


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """What a run of two ranks with workers has written when it is killed."""
    folder = tmp_path_factory.mktemp("killed")
    process = start(folder, 2, 1)
    read_steps(process, 9)
    process.kill()
    process.communicate()
    wait_until_gone(json.loads((folder / "workers.json").read_text()))
    return folder


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_killed_run_goes_on_with_the_same_samples(whole, killed, num_ranks):
    state = json.loads((killed / "state.json").read_text())
    assert 9 <= state["step"] < len(whole)
    names = [[tuple(lane) for lane in json.loads(line)] for line in (killed / "names.jsonl").read_text().splitlines()]
    assert len(names) - state["step"] in (0, 1)
    after, _ = load(num_ranks, state)
    assert names[: state["step"]] + after == whole


def test_a_run_killed_again_and_again_is_the_same_run(whole, tmp_path):
    names = []
    for num_ranks, num_steps in ((4, 3), (1, 5), (2, 2)):
        process = start(tmp_path, num_ranks, 0)
        read_steps(process, num_steps)
        process.kill()
        process.communicate()
        lines = (tmp_path / "names.jsonl").read_text().splitlines()
        step = json.loads((tmp_path / "state.json").read_text())["step"]
        names += [[tuple(lane) for lane in json.loads(line)] for line in lines][: step - len(names)]
        (tmp_path / "names.jsonl").unlink()
    state = json.loads((tmp_path / "state.json").read_text())
    assert names + load(4, state)[0] == whole


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ctrl_c_leaves_no_process_and_no_worker_complains(tmp_path, num_workers):
    process = start(tmp_path, 1, num_workers)
    read_steps(process, 3)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors.count("Traceback") == 1 and "KeyboardInterrupt" in errors
    # (the run's own; no worker prints one)
    workers = json.loads((tmp_path / "workers.json").read_text())
    assert len(workers) == num_workers
    wait_until_gone([process.pid, *workers])
    assert json.loads((tmp_path / "state.json").read_text())["step"] >= 3


def test_workers_killed_while_they_read_change_nothing(whole):
    names = []
    with Loader(make_sources(), make_config(num_workers=2), convert, on_bad=quiet) as loader:
        for step, packs in enumerate(loader):
            names.append([pack.names for pack in packs])
            if step in (5, 20):
                for worker in active_children():
                    os.kill(worker.pid, signal.SIGKILL)
    assert names == whole
    assert active_children() == []
