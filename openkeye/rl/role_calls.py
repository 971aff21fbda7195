"""Calls to a role in another process of this machine: pickled records over a Unix socket in a folder that only we can enter.

    client: (number, method, arguments, label) ──> server: a task named `label` that awaits role.method(*arguments)
    server: (number, TOLD | DONE | REFUSED | FAILED, value) ──> client

An argument that is a callback stays with the client: what the role tells it travels back as TOLD, before the result.
"""

import asyncio
import functools
import itertools
import pickle
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openkeye.common.checks import InputError
from openkeye.rl.roles import RoleLost

TOLD, DONE, REFUSED, FAILED = "told", "done", "refused", "failed"
CANCEL = "cancel"
# in the place of a method: the task with that number is to end
LENGTH_BYTES = 8
_label: ContextVar[str] = ContextVar("label", default="")


class RoleError(Exception):
    """What a role raised, in words: one of its own errors, which this process cannot know."""


@dataclass(frozen=True)
class Callback:
    """Stands for a function of the client's."""


async def send(writer: asyncio.StreamWriter, record: Any) -> None:
    """One record."""
    writer.write(_framed(record))
    await writer.drain()


async def receive(reader: asyncio.StreamReader) -> Any:
    """The next record.

    Raises:
        EOFError, OSError: the other side is gone.
    """
    num_bytes = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "little")
    return pickle.loads(await reader.readexactly(num_bytes))


class RoleClient:
    """One connection to a role."""

    def __init__(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.name = name
        self._reader, self._writer = reader, writer
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._callbacks: dict[int, Callable[[Any], None]] = {}
        self._lost: RoleLost | None = None
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def connect(cls, path: Path) -> "RoleClient":
        """
        Raises:
            OSError: nobody serves there yet, or any more.
        """
        return cls(path.stem, *await asyncio.open_unix_connection(str(path)))

    async def call(self, method: str, *arguments: Any, label: str = "") -> Any:
        """What role.method(*arguments) returns; a cancelled call is cancelled there too.

        Args:
            label: by which the call is told from others where it hangs.

        Raises:
            RoleLost: the process is gone, or goes before it answers.
            InputError: as the role raised it.
            RoleError: whatever else it raised.
        """
        if self._lost is not None:
            raise self._lost
        number = next(self._numbers)
        sent = []
        for argument in arguments:
            if callable(argument):
                self._callbacks[number] = argument
            sent.append(Callback() if callable(argument) else argument)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            await self._send((number, method, sent, label))
            return await answer
        except asyncio.CancelledError:
            if self._lost is None:
                self._writer.write(_framed((number, CANCEL, [], "")))
            raise
        finally:
            self._answers.pop(number, None)
            self._callbacks.pop(number, None)

    def lose(self, lost: RoleLost) -> None:
        """The process is gone, and this is how: calls under way and later ones raise it."""
        self._lost = self._lost or lost
        self._listening.cancel()
        self._writer.close()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(self._lost)

    async def _send(self, record: Any) -> None:
        try:
            await send(self._writer, record)
        except OSError:
            # Whoever watches over the process knows more, and says so by `lose`; else the listener does.
            return

    async def _listen(self) -> None:
        try:
            while True:
                self._note(*await receive(self._reader))
        except (EOFError, OSError):
            await asyncio.sleep(LOSS_SECONDS)
            self.lose(RoleLost(self.name, "the connection broke"))

    def _note(self, number: int, kind: str, value: Any) -> None:
        answer = self._answers.get(number)
        if answer is None or answer.done():
            return
        if kind == TOLD:
            self._callbacks[number](value)
        elif kind == DONE:
            answer.set_result(value)
        else:
            answer.set_exception(InputError(value) if kind == REFUSED else RoleError(value))


LOSS_SECONDS = 5.0
# for whoever watches over a process to say how it ended, before a broken connection is all that is known


class RoleServer:
    """Answers calls with a role's methods, in this process."""

    def __init__(self, role: Any) -> None:
        self._role = role
        self._answering: set[asyncio.Task[None]] = set()

    async def serve(self, path: Path) -> None:
        """Until cancelled. The path appears once calls are answered."""
        asyncio.get_running_loop().set_task_factory(_labelled_task)
        unfinished = path.with_suffix(".unfinished")
        unfinished.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._connect, str(unfinished))
        unfinished.replace(path)
        async with server:
            await server.serve_forever()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks: dict[int, asyncio.Task[Any]] = {}
        try:
            while True:
                number, method, arguments, label = await receive(reader)
                if method == CANCEL:
                    if number in tasks:
                        tasks[number].cancel()
                    continue
                token = _label.set(label)
                tasks[number] = asyncio.create_task(self._call(writer, number, method, arguments), name=label)
                _label.reset(token)
                answering = asyncio.create_task(self._answer(writer, number, tasks[number]))
                self._answering.add(answering)
                answering.add_done_callback(self._answering.discard)
                tasks[number].add_done_callback(functools.partial(_forget, tasks, number))
        except (EOFError, OSError):
            for task in tasks.values():
                task.cancel()

    async def _call(self, writer: asyncio.StreamWriter, number: int, method: str, arguments: list[Any]) -> Any:
        def tell(value: Any) -> None:
            writer.write(_framed((number, TOLD, value)))

        given = [tell if isinstance(argument, Callback) else argument for argument in arguments]
        return await getattr(self._role, method)(*given)

    async def _answer(self, writer: asyncio.StreamWriter, number: int, task: asyncio.Task[Any]) -> None:
        await asyncio.wait({task})
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            answer = (number, DONE, task.result())
        elif isinstance(error, InputError):
            answer = (number, REFUSED, str(error))
        else:
            answer = (number, FAILED, f"{type(error).__name__}: {error}")
        try:
            await send(writer, answer)
        except OSError:
            # The client has gone, and the answer is nobody's.
            return


def _forget(tasks: dict[int, asyncio.Task[Any]], number: int, task: asyncio.Task[Any]) -> None:
    del tasks[number]


def _framed(record: Any) -> bytes:
    content = pickle.dumps(record, pickle.HIGHEST_PROTOCOL)
    return len(content).to_bytes(LENGTH_BYTES, "little") + content


def _labelled_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    """Tasks that a call starts bear its label, so that it is known who holds up the loop."""
    options["name"] = options.get("name") or _label.get() or None
    return asyncio.Task(coroutine, loop=loop, **options)
