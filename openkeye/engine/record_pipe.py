"""Records between two processes over a pipe, as pickles: both ends are ours, started by one another."""

import contextlib
import pickle
import queue
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any


class RecordPipe:
    """One end. Records go out in order on a thread of its own, so that nobody waits for the other side to read."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send, name="openkeye-pipe", daemon=True)
        self._sender.start()

    def put(self, record: Any) -> None:
        """Send a record as it is now; returns at once, and says nothing where the other side has gone. Safe on any thread."""
        self._outgoing.put(pickle.dumps(record, pickle.HIGHEST_PROTOCOL))

    def records(self) -> Iterator[Any]:
        """What comes in, until the other side closes its end or its process is gone. For one thread."""
        while True:
            try:
                content = self._connection.recv_bytes()
            except (EOFError, OSError):
                # (OSError: the other side ended with something of ours unread)
                return
            yield pickle.loads(content)

    def flush(self, timeout_seconds: float) -> None:
        """Wait until what was put is sent; nothing is sent behind it."""
        self._outgoing.put(None)
        self._sender.join(timeout_seconds)

    def close(self) -> None:
        """Close this end; the other side's `records` stop."""
        self._connection.close()

    def _send(self) -> None:
        with contextlib.suppress(OSError):
            # (the other side has gone: whoever reads from it finds out)
            while (content := self._outgoing.get()) is not None:
                self._connection.send_bytes(content)
