"""`ReadingPool`: samples read and converted in worker processes; one that dies or hangs is replaced.

submit: draws wait ──> a worker each (pipe) ──> documents, by number ──> take
The pool has no thread: whoever takes drives it. While nobody takes, a worker finishes its sample and waits at its pipe.
"""

import pickle
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from openkeye.common.checks import InputError
from openkeye.data.document import Document
from openkeye.data.mixture import Draw
from openkeye.data.reading import BadSample, ReadingStoppedError, SampleReader
from openkeye.data.reading_worker import OUT_OF_MEMORY, Mistake, Ready, load, run

START_SECONDS = 300.0
# in which a worker has imported everything, on a busy machine
END_SECONDS = 2.0
# between asking a worker to end and killing it
MAX_TRIES = 2
# of a sample, on as many workers
MAX_FAILED_STARTS = 3
# one after the other; then something is wrong with all of them


@dataclass
class _Task:
    """A draw on its way."""

    number: int
    draw: Draw
    num_tries: int = 0


class _Worker:
    """A process, our end of its pipe, and what it is busy with."""

    def __init__(self, pickled_reader: bytes) -> None:
        self.connection, theirs = Pipe()
        self.process: BaseProcess = get_context("spawn").Process(
            target=run, args=(theirs, pickled_reader), name="openkeye-read", daemon=True
        )
        # Blocked here, Ctrl-C is blocked in the child from its first instruction on.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
        self.is_ready = False
        self.task: _Task | None = None
        self.since = time.monotonic()
        # it started, became ready or got its task, whichever came last

    def give(self, task: _Task) -> None:
        """Let it read; a process that has gone is found out when its answer is awaited."""
        self.task, self.since = task, time.monotonic()
        with suppress(OSError):
            self.connection.send_bytes(pickle.dumps(task.draw))

    def end(self, is_dying: bool = False) -> str:
        """Make sure that it is gone; returns how it ended, in words.

        is_dying: it ends by itself; its own status is wanted and not that of our signal.
        """
        self.connection.close()
        if is_dying:
            self.process.join(END_SECONDS)
        self.process.terminate()
        self.process.join(END_SECONDS)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        status = self.process.exitcode
        assert status is not None
        self.process.close()
        if status == -signal.SIGKILL:
            return "it was killed (signal 9), as the system does when memory runs out"
        if status == OUT_OF_MEMORY:
            return "it ran out of memory"
        return f"signal {-status} ended it" if status < 0 else f"it ended with status {status}"


class ReadingPool:
    """See `Reading`; all calls but `stop` from one thread at a time."""

    def __init__(self, reader: SampleReader, num_workers: int, max_held_tokens: int, max_read_seconds: float) -> None:
        """
        Args:
            reader: reads in the workers.
            num_workers: at least 1.
            max_held_tokens: of documents that nobody has taken, at which no more are read ahead.
            max_read_seconds: in which a worker is done with a sample.

        Raises:
            InputError: the reader cannot go to another process.
        """
        try:
            self._pickled_reader = pickle.dumps(reader, pickle.HIGHEST_PROTOCOL)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InputError(
                f"the sources and convert cannot go to worker processes ({error}): "
                "make them of classes and functions of a module, or set num_workers=0"
            ) from error
        self._max_held_tokens = max_held_tokens
        self._max_read_seconds = max_read_seconds
        self._num_submitted = 0
        self._waiting: dict[int, _Task] = {}
        self._done: dict[int, Document | BadSample] = {}
        self._held_tokens = 0
        self._num_failed_starts = 0
        self._stop_reader, self._stop_writer = Pipe(duplex=False)
        self._stop_lock = threading.Lock()
        # readable once the other end is closed
        self._workers: list[_Worker] = []
        self._num_workers = num_workers

    def submit(self, draw: Draw) -> int:
        """See `Reading.submit`."""
        number = self._num_submitted
        self._num_submitted += 1
        self._waiting[number] = _Task(number, draw)
        return number

    def take(self, number: int) -> Document | BadSample:
        """See `Reading.take`.

        Raises:
            RuntimeError: source or convert raised what is no InputError, or workers do not even start.
        """
        while len(self._workers) < self._num_workers:
            self._workers.append(_Worker(self._pickled_reader))
        assert (
            number in self._waiting
            or number in self._done
            or any(worker.task is not None and worker.task.number == number for worker in self._workers)
        ), "a document is taken once"
        self._collect(0.0)
        self._give_out(number)
        while number not in self._done:
            self._collect(self._seconds_to_deadline())
            self._replace_late()
            self._give_out(number)
        outcome = self._done.pop(number)
        if isinstance(outcome, Document):
            self._held_tokens -= outcome.num_tokens
        return outcome

    def stop(self) -> None:
        """See `Reading.stop`."""
        # Whoever waits and whoever ends the run may call it at the same moment, and a descriptor is closed once.
        with self._stop_lock:
            self._stop_writer.close()

    def close(self) -> None:
        """See `Reading.close`: no process is left."""
        for worker in self._workers:
            # (all at once: each may need a moment)
            worker.process.terminate()
        for worker in self._workers:
            worker.end()
        self._workers.clear()
        self._stop_reader.close()

    def _give_out(self, urgent: int) -> None:
        """Give idle workers what waits: what is needed now at once, the rest while there is room for what they make of it."""
        for place, worker in enumerate(self._workers):
            if worker.task is not None or not self._waiting:
                continue
            if not worker.process.is_alive():
                # It died idle (a leak, the system's killer): no sample's fault.
                fresh = _Worker(self._pickled_reader)
                worker.end()
                worker = self._workers[place] = fresh
            if urgent in self._waiting:
                worker.give(self._waiting.pop(urgent))
            elif self._held_tokens < self._max_held_tokens:
                worker.give(self._waiting.pop(next(iter(self._waiting))))

    def _collect(self, timeout_seconds: float) -> None:
        """Take in what workers have sent, and put new ones in the place of those that died."""
        busy = {worker.connection: worker for worker in self._workers if worker.task is not None}
        for ready in wait([self._stop_reader, *busy], timeout_seconds):
            if ready is self._stop_reader:
                raise ReadingStoppedError
            assert isinstance(ready, Connection)
            worker = busy[ready]
            try:
                record = load(worker.connection.recv_bytes())
            except (EOFError, OSError):
                # (OSError: it died in the middle of a record)
                self._replace(worker, is_late=False)
                continue
            if isinstance(record, Ready):
                worker.is_ready, worker.since, self._num_failed_starts = True, time.monotonic(), 0
            elif isinstance(record, Mistake):
                raise RuntimeError(f"{record.name}: reading it raised what is no InputError\n{record.traceback}")
            else:
                assert worker.task is not None
                self._finish(worker.task, record)
                worker.task = None

    def _finish(self, task: _Task, outcome: Document | BadSample) -> None:
        self._done[task.number] = outcome
        if isinstance(outcome, Document):
            self._held_tokens += outcome.num_tokens

    def _limit_seconds(self, worker: _Worker) -> float:
        return self._max_read_seconds if worker.is_ready else START_SECONDS

    def _seconds_to_deadline(self) -> float:
        deadlines = [worker.since + self._limit_seconds(worker) for worker in self._workers if worker.task is not None]
        return max(0.0, min(deadlines) - time.monotonic())

    def _replace_late(self) -> None:
        """A worker whose time is over hangs, unless its answer is at the pipe already."""
        for worker in list(self._workers):
            is_late = worker.task is not None and time.monotonic() - worker.since >= self._limit_seconds(worker)
            if is_late and not worker.connection.poll():
                self._replace(worker, is_late=True)

    def _replace(self, worker: _Worker, is_late: bool) -> None:
        """Put a fresh worker in the place of one; its sample goes there, or is bad if it has had its tries."""
        task = worker.task
        assert task is not None
        place = self._workers.index(worker)
        self._workers.pop(place)
        how = worker.end(is_dying=not is_late)
        if is_late:
            how = f"it was not done after {self._limit_seconds(worker):g} s"
        if worker.is_ready:
            task.num_tries += 1
        else:
            self._num_failed_starts += 1
            if self._num_failed_starts == MAX_FAILED_STARTS:
                raise RuntimeError(
                    f"{MAX_FAILED_STARTS} worker processes ended before they read a sample, the last one so: {how}. "
                    "What they printed says why; num_workers=0 reads in this process"
                )
        fresh = _Worker(self._pickled_reader)
        self._workers.insert(place, fresh)
        if task.num_tries < MAX_TRIES:
            fresh.give(task)
        else:
            self._finish(task, BadSample(task.draw.name, f"{MAX_TRIES} workers did not come through it; of the last: {how}"))
