"""Listening, and running an application until somebody ends it."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from openkeye.common.checks import InputError

KEEP_ALIVE_SECONDS = 30
BACKLOG = 2048
# connections that may wait to be taken


GOODBYE_SECONDS = 5
# in which requests that were ended are told so


class Answering(Protocol):
    """What answers behind the application."""

    @property
    def has_given_up(self) -> bool:
        """Whether it will never answer again."""

    def stop(self) -> None:
        """End what is still under way; blocks for a moment."""


class _Server(uvicorn.Server):
    """uvicorn, whose signals are ours: it would end the process with them, where we have an engine to stop."""

    def __init__(self, config: uvicorn.Config, grace_seconds: int, service: Answering) -> None:
        super().__init__(config)
        self._grace_seconds = grace_seconds
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Let answers go on for a while, then end them in a way that their clients are told."""
        if not self.should_exit:
            loop = asyncio.get_running_loop()
            loop.call_later(self._grace_seconds, loop.run_in_executor, None, self._service.stop)
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second: whether it is to end."""
        return await super().on_tick(counter) or self._service.has_given_up

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


def listen(host: str, port: int) -> socket.socket:
    """A socket on which connections may come in from now on.

    Raises:
        InputError: the port is taken or the address is not ours.
    """
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Two servers may both bind a port that nobody listens on yet; the second to listen is told here.
        listener.listen(BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise InputError(f"cannot listen on {host} port {port} ({error.strerror}); give another --port or --host") from None
    return listener


def run_server(
    application: ASGIApp, listener: socket.socket, grace_seconds: int, service: Answering, log_requests: bool
) -> None:
    """Serve until SIGINT or SIGTERM, or until the service has given up.

    Args:
        grace_seconds: for answers under way when the signal comes. A second SIGINT waits for nothing.
        service: stopped then, in a thread, which ends what is still under way.
        log_requests: a line for every request.
    """
    config = uvicorn.Config(
        application,
        log_level="info" if log_requests else "warning",
        access_log=log_requests,
        server_header=False,
        lifespan="off",
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=grace_seconds + GOODBYE_SECONDS,
    )
    server = _Server(config, grace_seconds, service)
    asyncio.run(server.serve(sockets=[listener]))
