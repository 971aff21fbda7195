"""Outcome in mathematics: equality by algebra, and a worker that hangs or dies costs one answer only."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from openkeye.tasks.rewards.limited_worker import LimitedWorker
from openkeye.tasks.rewards.maths import compare


@pytest.fixture(scope="module")
def worker():
    worker = LimitedWorker("openkeye.tasks.rewards.maths_worker", 2.0, 4 << 30)
    yield worker
    worker.close()


@pytest.mark.parametrize(
    ("gold", "answer", "is_right"),
    [
        ("19", "19", True),
        ("19", "19.0", True),
        ("19", "91", False),
        ("1/2", "0.5", True),
        ("1/0", "1", False),
        ("\\frac{1}{2}", "$0.5$", True),
        ("\\frac{1}{2}", "the answer is $\\frac{2}{4}$", True),
        ("x^2 - 1", "$(x-1)(x+1)$", True),
        ("x^2 - 1", "$(x-1)(x-1)$", False),
        ("\\{1, 2\\}", "$\\{2, 1\\}$", True),
        ("19", "", False),
        ("19", "{" * 4000, False),
        ("19", "\\frac{" * 500, False),
    ],
)
def test_answers_are_compared_by_meaning(worker, gold, answer, is_right):
    assert compare(gold, answer, worker).is_right is is_right


def test_a_worker_that_hangs_is_replaced(worker):
    assert compare("x+1", "$1+x$", worker).is_right
    before, replaced, start = worker.process_id, worker.num_replaced, time.monotonic()
    assert not compare("x", "$10^{10^{10^{10}}} + x^{9^{9^{9}}}$", worker).is_right
    assert time.monotonic() - start < 8.0
    assert compare("x+1", "$1+x$", worker).is_right
    # (algebra may refuse that tower in time; what must hold is that the next answer is compared)
    assert worker.num_replaced in (replaced, replaced + 1) and (worker.process_id == before) == (
        worker.num_replaced == replaced
    )


def test_a_worker_that_is_stopped_or_killed_costs_one_answer(worker):
    compare("x+1", "$1+x$", worker)
    for number in (signal.SIGSTOP, signal.SIGKILL):
        before, replaced = worker.process_id, worker.num_replaced
        threading.Timer(0.0, os.kill, (before, number)).start()
        time.sleep(0.2)
        start = time.monotonic()
        is_right = compare("x+2", "$2+x$", worker).is_right
        # One that is gone before it is asked costs no answer, one that hangs costs the answer it was asked for.
        assert is_right is (number == signal.SIGKILL)
        assert time.monotonic() - start < 10.0
        assert compare("x+2", "$2+x$", worker).is_right
        assert worker.process_id != before
        assert worker.num_replaced <= replaced + 1


@pytest.fixture
def harmful(tmp_path, monkeypatch):
    """A module whose work hangs or eats memory when it is asked to."""
    (tmp_path / "harmful_work.py").write_text(
        "import mmap, sys\nfrom openkeye.tasks.rewards.limited_worker import serve\n"
        "def work(request):\n    while request == 'hang':\n        pass\n"
        "    return len(mmap.mmap(-1, 3 << 29)) if request == 'eat' else request\n"
        "serve(work, float(sys.argv[1]), int(sys.argv[2]))\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return "harmful_work"


def test_a_worker_ends_by_itself_when_its_owner_is_gone(harmful):
    """Its owner may have been killed while it hung: nobody is left to end it then."""
    process = subprocess.Popen(
        [sys.executable, "-m", harmful, "0.5", str(1 << 30)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.stdin.write(b'"hang"\n')
    process.stdin.close()
    assert process.wait(20) == -signal.SIGALRM
    process.stdout.close()


def test_work_without_end_or_measure_is_ended(harmful):
    worker = LimitedWorker(harmful, 0.5, 1 << 30)
    try:
        assert worker.call("hello") == "hello"
        for harm in ("hang", "eat"):
            process, start = worker.process_id, time.monotonic()
            assert worker.call(harm) is None
            assert time.monotonic() - start < 5.0
            with pytest.raises(ProcessLookupError):
                os.kill(process, 0)
            assert worker.call("hello") == "hello"
        assert worker.num_replaced == 2
    finally:
        worker.close()


def test_a_module_that_does_not_start_tells_so():
    with pytest.raises(RuntimeError, match="did not start"):
        LimitedWorker("openkeye.no_such_module", 1.0, 1 << 30).call(1)
