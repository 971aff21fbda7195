"""The worker process: an `EngineService` whose callers are at the other end of a pipe.

Started by `worker_service.py` as `python -m openkeye.engine.worker FILE_DESCRIPTOR`. It ends when its engine does, and at once
when the pipe closes: nobody is left to answer then, whether the other process stopped or was killed.
"""

import os
import signal
import sys
import threading
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from openkeye.common.checks import InputError
from openkeye.engine.answering import Ticket
from openkeye.engine.events import Event, TokenEvent
from openkeye.engine.record_pipe import RecordPipe
from openkeye.engine.worker_records import (
    Cancellation,
    Opening,
    Ready,
    Refusal,
    RequestEvent,
    StatsAnswer,
    StatsQuestion,
    Submission,
)

if TYPE_CHECKING:
    from openkeye.engine.service import EngineService

FLUSH_SECONDS = 5.0
# to send the last events of an engine that died
ENDED, REFUSED = 1, 2
# exit statuses


class Worker:
    """Obeys what comes through a pipe."""

    def __init__(self, pipe: RecordPipe) -> None:
        self._pipe = pipe
        self._records = pipe.records()
        self._service: EngineService | None = None
        self._tickets: dict[int, Ticket] = {}

    def run(self) -> int:
        """Serve until the engine ends; returns the exit status."""
        opening = next(self._records, None)
        if opening is None:
            return ENDED
        assert isinstance(opening, Opening)
        # Read from here on: the other process may be gone before a large model is loaded.
        threading.Thread(target=self._obey, name="openkeye-orders", daemon=True).start()
        try:
            engine = opening.open_engine()
        except InputError as error:
            self._pipe.put(Refusal(str(error)))
            return REFUSED
        from openkeye.engine.service import EngineService

        self._service = EngineService(engine, opening.max_queue)
        self._service.start()
        self._pipe.put(Ready())
        self._service.wait()
        return ENDED

    def _obey(self) -> None:
        try:
            for record in self._records:
                self._do(record)
        finally:
            # Should an order fail by a mistake of ours, the other process is to know that none is taken any more.
            self._pipe.close()
        # No goodbye to libraries: one of their threads may be deep in a video, and nobody reads its result.
        os._exit(0)

    def _do(self, record: Submission | Cancellation | StatsQuestion) -> None:
        assert self._service is not None, "requests come after Ready"
        if isinstance(record, Submission):
            self._submit(self._service, record)
        elif isinstance(record, StatsQuestion):
            self._pipe.put(StatsAnswer(record.number, self._service.stats()))
        elif record.number in self._tickets:
            # (else its last event is on the way)
            self._tickets[record.number].cancel()

    def _submit(self, service: "EngineService", record: Submission) -> None:
        ticket = service.submit(record.messages, record.sampling, partial(self._tell, record.number), **record.options)
        self._tickets[record.number] = ticket
        # (its last event may have come already, on another thread)
        if ticket.is_settled:
            self._tickets.pop(record.number, None)

    def _tell(self, number: int, event: Event) -> None:
        if not isinstance(event, TokenEvent):
            self._tickets.pop(number, None)
        self._pipe.put(RequestEvent(number, event))


def main() -> None:
    """Run a worker on the pipe that the command line names."""
    # Signals that end a server (Ctrl-C, or a whole group's SIGTERM) are for the other process, which lets answers finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe = RecordPipe(Connection(int(sys.argv[1])))
    status = Worker(pipe).run()
    pipe.flush(FLUSH_SECONDS)
    os._exit(status)


if __name__ == "__main__":
    main()
