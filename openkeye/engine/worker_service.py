"""`WorkerService`: an engine in a process of its own, which is started again when it dies.

submit ── pipe ──> worker process (`worker.py`): an `EngineService` ── pipe ──> on_event
Whatever happens there (a crash in a library, the system's out-of-memory killer), this process lives: the requests that were
open end with an ErrorEvent of kind "stopped", new ones too until a new worker is ready.
"""

import contextlib
import itertools
import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Pipe
from typing import Any

from openkeye.common.checks import InputError
from openkeye.engine.answering import Message, OnEvent, ServiceStats, Ticket
from openkeye.engine.config import SamplingParameters
from openkeye.engine.events import ErrorEvent, FinishEvent, TokenEvent
from openkeye.engine.record_pipe import RecordPipe
from openkeye.engine.worker_records import (
    Cancellation,
    OpenEngine,
    Opening,
    Ready,
    Refusal,
    RequestEvent,
    StatsAnswer,
    StatsQuestion,
    Submission,
)

FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
# before another start; doubles from one death to the next
STEADY_SECONDS = 60.0
# a worker that lived so long did not die of what its predecessor died of
MAX_FAILED_STARTS = 5
LATE_SECONDS = 120.0
# behind a request's deadline, after which a worker that has not ended it hangs
WATCH_SECONDS = 1.0
STATS_SECONDS = 2.0
# in which a worker is to say how it is
END_SECONDS = 5.0
# for a process to be gone after its pipe closed, before it is killed

NO_STATS = ServiceStats(0, 0, 0, 0, 0, 0, 0, 0)

logger = logging.getLogger(__name__)


class _Process:
    """One worker: its process, and our end of its pipe."""

    def __init__(self, opening: Opening) -> None:
        ours, theirs = Pipe()
        command = [sys.executable, "-P", "-m", "openkeye.engine.worker", str(theirs.fileno())]
        # The same code as here, wherever it was imported from.
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": paths},
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            # A terminal's Ctrl-C goes to a whole group; the worker ends when we say so.
            process_group=0,
        )
        theirs.close()
        self.pipe = RecordPipe(ours)
        self.pipe.put(opening)

    def end(self) -> str:
        """Make sure that it is gone; returns how it ended, in words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        if self.process.poll() is None:
            self.process.kill()
        status = self.process.wait()
        self.pipe.close()
        return f"signal {-status}" if status < 0 else f"exit status {status}"


class _RemoteTicket(Ticket):
    """A request whose number the worker knows."""

    def __init__(self, on_event: OnEvent, on_cancel: Callable[[Ticket], None], number: int, deadline: float) -> None:
        """deadline: on the monotonic clock, seconds."""
        super().__init__(on_event, on_cancel)
        self.number = number
        self.deadline = deadline


class WorkerService:
    """Requests to an engine in a worker process, with the calls of `EngineService`."""

    def __init__(self, open_engine: OpenEngine, max_queue: int = 256) -> None:
        """
        Args:
            open_engine: makes the engine, in the worker; what pickles by name (a function of a module, or a `partial` of one).
            max_queue: as for `EngineService`.
        """
        self._opening = Opening(open_engine, max_queue)
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        # guards all below
        self._worker: _Process | None = None
        self._is_ready = False
        self._is_stopping = False
        self._has_given_up = False
        self._refusal = ""
        self._open: dict[int, _RemoteTicket] = {}
        self._answers: dict[int, ServiceStats | None] = {}
        # to questions about stats: None while they are awaited
        self._totals = NO_STATS
        self._thread = threading.Thread(target=self._supervise, name="openkeye-worker", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="openkeye-watch", daemon=True)

    def start(self) -> None:
        """Start the worker and wait until its engine is open; once in a service's life.

        Raises:
            InputError: the engine cannot be opened; the worker's own words, or how it ended.
        """
        self._thread.start()
        self._watcher.start()
        with self._changed:
            self._changed.wait_for(lambda: self._is_ready or self._has_given_up)
            if self._has_given_up:
                raise InputError(self._refusal)

    def stop(self, timeout_seconds: float = 2 * END_SECONDS) -> None:
        """Fail what is open and end the worker; returns when it is gone, or after the timeout."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
            if self._worker is not None:
                # It holds nothing that outlives it, and may be busy for long. The supervising thread sees its pipe close.
                self._worker.process.kill()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_seconds)

    @property
    def is_alive(self) -> bool:
        """Whether requests are served: False while a worker starts, and after the stop."""
        return self._is_ready and not self._is_stopping

    @property
    def has_given_up(self) -> bool:
        """Whether the worker failed to start so often that no other is tried."""
        return self._has_given_up

    def submit(
        self,
        messages: Sequence[Message],
        sampling: SamplingParameters,
        on_event: OnEvent,
        deadline_seconds: float | None = None,
        template_options: Mapping[str, Any] | None = None,
        evidence: bool = False,
    ) -> Ticket:
        """Ask for an answer, as `EngineService.submit` does; messages must hold what can be pickled.

        on_event is called from a thread that all requests share.
        """
        if deadline_seconds is not None and not deadline_seconds >= 0:
            raise InputError(f"deadline_seconds is {deadline_seconds}; give seconds from 0 on, or None")
        options = {"deadline_seconds": deadline_seconds, "template_options": template_options, "evidence": evidence}
        deadline = math.inf if deadline_seconds is None else time.monotonic() + deadline_seconds
        ticket = _RemoteTicket(on_event, self._cancel, next(self._numbers), deadline)
        submission = Submission(ticket.number, messages, sampling, options)
        with self._changed:
            if self.is_alive and self._worker is not None:
                self._worker.pipe.put(submission)
                self._open[ticket.number] = ticket
                return ticket
            self._totals = replace(self._totals, num_failed=self._totals.num_failed + 1)
        ticket.is_settled = True
        ticket.tell(ErrorEvent("stopped", "the engine is not running"))
        return ticket

    def stats(self) -> ServiceStats:
        """Totals of all workers so far, and what the present one says of this moment: nothing where it does not answer soon."""
        number = next(self._numbers)
        with self._changed:
            worker = self._worker if self.is_alive else None
            if worker is not None:
                self._answers[number] = None
                worker.pipe.put(StatsQuestion(number))
                self._changed.wait_for(lambda: self._answers[number] is not None or self._worker is not worker, STATS_SECONDS)
            now = self._answers.pop(number, None) or NO_STATS
            totals = self._totals
        return replace(
            totals,
            num_waiting=now.num_waiting,
            num_running=now.num_running,
            num_free_pages=now.num_free_pages,
            num_pages=now.num_pages,
        )

    def _cancel(self, ticket: Ticket) -> None:
        assert isinstance(ticket, _RemoteTicket)
        with self._changed:
            if ticket.number in self._open and self._worker is not None:
                self._worker.pipe.put(Cancellation(ticket.number))

    def _watch(self) -> None:
        """On a thread of its own: kill a worker that hangs, which is known from requests that it does not end in time."""
        with self._changed:
            while not self._is_stopping and not self._has_given_up:
                self._changed.wait(WATCH_SECONDS)
                latest = time.monotonic() - LATE_SECONDS
                if self._worker is not None and any(ticket.deadline < latest for ticket in self._open.values()):
                    logger.error("the engine hangs: a request is open %g s after its deadline", LATE_SECONDS)
                    self._worker.process.kill()

    # On the supervising thread.

    def _supervise(self) -> None:
        """One worker after the other, until the stop or too many failed starts."""
        num_deaths = num_failed_starts = 0
        while not self._is_stopping:
            started = time.monotonic()
            how, was_ready = self._run_worker()
            num_failed_starts = 0 if was_ready else num_failed_starts + 1
            num_deaths = 1 if time.monotonic() - started > STEADY_SECONDS else num_deaths + 1
            if self._is_stopping or self._is_over(how, num_failed_starts):
                return
            wait_seconds = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (num_deaths - 1))
            logger.error("the engine's process ended (%s); it is started again in %g s", how, wait_seconds)
            with self._changed:
                self._changed.wait_for(lambda: self._is_stopping, wait_seconds)
                self._totals = replace(self._totals, num_restarts=self._totals.num_restarts + 1)

    def _is_over(self, how: str, num_failed_starts: int) -> bool:
        """Whether another start makes no sense: the very first one failed, or many in a row did."""
        is_first = num_failed_starts == 1 and not self._totals.num_restarts
        if not is_first and num_failed_starts < MAX_FAILED_STARTS:
            return False
        with self._changed:
            if not is_first:
                logger.error("the engine could not be started %d times in a row, the server ends: %s", num_failed_starts, how)
            self._refusal = (
                self._refusal or f"the engine's process ended before it was ready ({how}); its own words stand above"
            )
            self._has_given_up = True
            self._changed.notify_all()
        return True

    def _run_worker(self) -> tuple[str, bool]:
        """From a worker's start to its end: (how it ended, whether it was ready)."""
        try:
            worker = _Process(self._opening)
        except OSError as error:
            return f"it cannot be started: {error.strerror}", False
        with self._changed:
            self._worker, self._refusal = worker, ""
            if self._is_stopping:
                # (the stop found no worker to end)
                worker.process.kill()
        for record in worker.pipe.records():
            self._take(record)
        with self._changed:
            was_ready, self._is_ready, self._worker = self._is_ready, False, None
            self._changed.notify_all()
        self._fail_open("the engine is shutting down" if self._is_stopping else "the engine died; ask again in a moment")
        how = worker.end()
        return self._refusal or how, was_ready

    def _take(self, record: Ready | Refusal | RequestEvent | StatsAnswer) -> None:
        if isinstance(record, RequestEvent):
            self._tell(record)
            return
        with self._changed:
            if isinstance(record, StatsAnswer):
                # (nobody waits any longer where the answer came late)
                if record.number in self._answers:
                    self._answers[record.number] = record.stats
            elif isinstance(record, Refusal):
                self._refusal = record.message
            else:
                self._is_ready = True
            self._changed.notify_all()

    def _tell(self, record: RequestEvent) -> None:
        event = record.event
        with self._changed:
            ticket = self._open[record.number]
            if isinstance(event, TokenEvent):
                self._totals = replace(self._totals, num_output_tokens=self._totals.num_output_tokens + 1)
            else:
                if ticket.has_failed:
                    event = ErrorEvent("internal", "the callback of the request raised an exception")
                del self._open[record.number]
                self._count_end(event)
                ticket.is_settled = True
        if not isinstance(event, TokenEvent):
            ticket.tell(event)
        elif not ticket.has_failed:
            ticket.tell(event)
            if ticket.has_failed:
                ticket.cancel()

    def _count_end(self, event: FinishEvent | ErrorEvent) -> None:
        totals = self._totals
        if isinstance(event, ErrorEvent):
            self._totals = replace(totals, num_failed=totals.num_failed + 1)
        else:
            num_prompt_tokens = totals.num_prompt_tokens + event.num_prompt_tokens
            self._totals = replace(totals, num_finished=totals.num_finished + 1, num_prompt_tokens=num_prompt_tokens)

    def _fail_open(self, message: str) -> None:
        with self._changed:
            failed, self._open = list(self._open.values()), {}
            self._totals = replace(self._totals, num_failed=self._totals.num_failed + len(failed))
        for ticket in failed:
            ticket.is_settled = True
            ticket.tell(ErrorEvent("stopped", message))
