"""The processes that answer together (torchrun): rank 0 leads, the others follow its orders, and none outlives the others.

Orders go through a socket from rank 0 to each follower, tensors through torch.distributed. On either side a thread reads the
socket, so that a process knows at once when another has ended, whatever it waits for just then.
"""

import functools
import os
import queue
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from openkeye.common.checks import InputError
from openkeye.common.launch import local_rank, num_local_ranks, num_ranks, rank
from openkeye.model.sharding import Shard

STEP_SECONDS = 300
# in which all ranks must come to a sum: kernels may have to be compiled first, and not equally fast
GOODBYE_SECONDS = 10


class RanksError(RuntimeError):
    """The ranks do not work in step any more; only a new start helps."""


@dataclass(frozen=True)
class End:
    """The last order."""

    is_now: bool
    # the leader left a step unfinished, and nobody will finish it


class Ranks:
    """This process's line to the others: a leader's to every follower, a follower's to its leader."""

    def __init__(self, shard: Shard, connections: dict[int, Connection]) -> None:
        """connections: by the rank at the other end."""
        self.shard = shard
        self._connections = connections
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._postponed: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._is_apart = False
        self._is_closing = False
        self._reader = threading.Thread(target=self._read, name="openkeye-ranks", daemon=True)
        self._reader.start()

    def tell(self, message: Any) -> None:
        """Send a message to everyone at the other ends. Tensors do not belong into it, arrays may.

        Raises:
            RanksError: somebody has gone.
        """
        while not self._postponed.empty():
            self._send(self._postponed.get())
        self._send(message)

    def tell_later(self, message: Any) -> None:
        """Send a message before the next one. Safe at any moment on any thread, as when garbage is collected."""
        self._postponed.put(message)

    def hear(self) -> Any:
        """The next message, whenever it comes."""
        return self._inbox.get()

    def _send(self, message: Any) -> None:
        for other, connection in self._connections.items():
            try:
                connection.send(message)
            except OSError:
                raise RanksError(f"rank {other} has ended; start all ranks again") from None

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Around what all ranks do together on a leader's order. Where an exception leaves it, the ranks have parted for good.

        Raises:
            RanksError: they had parted before.
        """
        if self._is_apart:
            raise RanksError("a step over several ranks failed before; start all ranks again")
        self._is_apart = True
        yield
        self._is_apart = False

    def end(self) -> None:
        """The leader's goodbye: followers leave their loop, or stop where they are if a step was left unfinished."""
        self._is_closing = True
        for connection in self._connections.values():
            try:
                connection.send(End(self._is_apart))
            except OSError:
                # It has ended already, which is all that was asked of it.
                continue
        self._reader.join(GOODBYE_SECONDS)

    def close(self) -> None:
        """A follower's goodbye."""
        for connection in self._connections.values():
            connection.close()

    def _read(self) -> None:
        """The thread: messages to the inbox; whoever is gone without a goodbye takes this process along."""
        rank_of = {connection: other for other, connection in self._connections.items()}
        while rank_of:
            for connection in wait(list(rank_of)):
                assert isinstance(connection, Connection)
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    if not self._is_closing:
                        self._fail(rank_of[connection])
                    del rank_of[connection]
                    continue
                if isinstance(message, End):
                    if message.is_now:
                        os._exit(0)
                    # What follows is the leader's end of the line.
                    del rank_of[connection]
                self._inbox.put(message)

    def _fail(self, other: int) -> None:
        print(f"openkeye: rank {other} has ended, and so does rank {self.shard.rank}", file=sys.stderr, flush=True)
        # The main thread may wait for a GPU that waits for the other one: nothing gentler would end it.
        os._exit(1)


@functools.cache
def join() -> Ranks:
    """Meet the other ranks, once in a process's life. A leader says goodbye when its interpreter ends.

    Raises:
        InputError: the ranks are on several machines.
    """
    if num_local_ranks() != num_ranks():
        raise InputError(f"{num_ranks()} ranks were started on several machines; start all of them on one")
    has_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    if has_gpus and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpus else "gloo", timeout=timedelta(seconds=STEP_SECONDS))
    shard = Shard(rank(), num_ranks())
    if shard.rank:
        return Ranks(shard, {0: _call_leader(shard)})
    ranks = Ranks(shard, _await_followers(shard))
    # Unlike atexit, at the end of a child of multiprocessing too.
    Finalize(ranks, ranks.end, exitpriority=0)
    return ranks


def _await_followers(shard: Shard) -> dict[int, Connection]:
    # Nobody else on this machine may open the folder.
    with tempfile.TemporaryDirectory(prefix="openkeye-") as folder, socket.socket(socket.AF_UNIX) as listener:
        address = str(Path(folder) / "orders")
        listener.bind(address)
        listener.listen(shard.size)
        listener.settimeout(STEP_SECONDS)
        dist.broadcast_object_list([address], src=0, device=torch.device("cpu"))
        connections: dict[int, Connection] = {}
        while len(connections) < shard.size - 1:
            line, _ = listener.accept()
            line.setblocking(True)
            connection = Connection(line.detach())
            connections[connection.recv()] = connection
    return connections


def _call_leader(shard: Shard) -> Connection:
    addresses: list[Any] = [None]
    dist.broadcast_object_list(addresses, src=0, device=torch.device("cpu"))
    line = socket.socket(socket.AF_UNIX)
    line.connect(addresses[0])
    connection = Connection(line.detach())
    connection.send(shard.rank)
    return connection
