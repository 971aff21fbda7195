"""The process that reads and converts samples for `reading_pool.py`, and the records that cross its pipe.

Records are pickled as they stand, with arrays for tensors: torch would hand tensors over through shared memory and several
handshakes, and what a killed process left in shared memory would stay there.
"""

import os
import pickle
import signal
import threading
import traceback
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openkeye.data.document import Document
from openkeye.data.mixture import Draw
from openkeye.data.reading import BadSample

OUT_OF_MEMORY = 3
ORPHANED = 4
# exit statuses


@dataclass(frozen=True)
class Ready:
    """The worker has imported everything and waits for draws."""


@dataclass(frozen=True)
class Mistake:
    """Source or convert raised what is no InputError: a mistake in code, and not a bad sample."""

    name: str
    traceback: str


Record = Ready | Mistake | BadSample | Document


def dump(record: Record) -> bytes:
    """A record for the pipe."""
    if not isinstance(record, Document):
        return pickle.dumps(record, pickle.HIGHEST_PROTOCOL)
    arrays = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in vars(record).items()}
    return pickle.dumps(arrays, pickle.HIGHEST_PROTOCOL)


def load(content: bytes) -> Record:
    """What `dump` made."""
    record: Any = pickle.loads(content)
    if not isinstance(record, dict):
        return record
    fields: dict[str, Any] = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in record.items()
    }
    return Document(**fields)


def run(connection: Connection, pickled_reader: bytes) -> None:
    """Read draws until the pool closes its end or is gone."""
    # A terminal's Ctrl-C goes to the whole group; the pool says when a worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, name="openkeye-parent", daemon=True).start()
    # Workers share the cores with one another; threads of each would only wait for theirs.
    torch.set_num_threads(1)
    reader = pickle.loads(pickled_reader)
    connection.send_bytes(dump(Ready()))
    while True:
        try:
            draw: Draw = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            content = dump(reader(draw))
        except MemoryError:
            # As the system's killer would have it: the sample is tried once more, on a process with memory to spare.
            os._exit(OUT_OF_MEMORY)
        except BaseException:
            connection.send_bytes(dump(Mistake(draw.name, traceback.format_exc())))
            raise
        connection.send_bytes(content)


def _leave_with_parent() -> None:
    """End at once when the process that asks is gone, also in the middle of a video."""
    parent = parent_process()
    assert parent is not None, "a worker is started by a pool"
    parent.join()
    os._exit(ORPHANED)
