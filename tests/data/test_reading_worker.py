"""The worker process itself: it leaves with its parent, and says why it does not start."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.data.test_reading_pool import is_alive, opened, take_all


@dataclass(frozen=True)
class UnwelcomeSource:
    """Cannot be made in another process."""

    num_samples: int = 5

    def __setstate__(self, state: dict) -> None:
        raise OSError("the licence is for one process")


def test_workers_that_never_start_end_the_run():
    with (
        opened(UnwelcomeSource()) as pool,
        pytest.raises(RuntimeError, match="3 worker processes ended before they read a sample"),
    ):
        take_all(pool, 1)


ORPHANS = """
import sys, time
from multiprocessing import active_children
from openkeye.data.mixture import Draw
from openkeye.data.reading import SampleReader
from openkeye.data.reading_pool import ReadingPool
from tests.data.small_sources import DeadlySource, convert
if __name__ == "__main__":
    pool = ReadingPool(SampleReader({"s": DeadlySource(sys.argv[1], {1: ("hang", 99)})}, convert, 100), 2, 1000, 60.0)
    numbers = [pool.submit(Draw("s", index)) for index in range(3)]
    pool.take(numbers[0])
    pool.take(numbers[2])
    print(*[process.pid for process in active_children()], flush=True)
    time.sleep(100)
"""


def test_workers_leave_when_their_parent_is_killed(tmp_path):
    # One idle, one in the middle of a sample that never ends.
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    parent = subprocess.Popen([sys.executable, script, tmp_path], stdout=subprocess.PIPE, text=True, env=environment)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(is_alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    # (they hold the other end of its output, which therefore is not read to the end)
    parent.stdout.close()
    end = time.monotonic() + 20
    while left := [pid for pid in pids if is_alive(pid)]:
        if time.monotonic() > end:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail("workers outlive their parent")
        time.sleep(0.02)
