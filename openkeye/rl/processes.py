"""Roles in processes of their own: started, watched, and started again when they die. Each costs its own calls alone.

`RoleProcess` is one process, or all ranks of one that torchrun starts; `ProcessWorker`, `ProcessScorer` and `ProcessLearner`
are the roles that the orchestrator sees.
"""

import asyncio
import contextlib
import fcntl
import math
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from openkeye.common.checks import InputError
from openkeye.rl.role_calls import RoleClient
from openkeye.rl.role_process import ALIVE, OPENING, PARENT_LOCK, REFUSAL, SOCKET, Opening, OpenRole
from openkeye.rl.roles import (
    OnPartial,
    PartialRollout,
    Publication,
    Record,
    RoleLost,
    RolloutOrder,
    ScoredRollout,
    Update,
)
from openkeye.rl.rollout import Rollout

POLL_SECONDS = 0.02
SILENT_SECONDS = 60.0
# without a sign of life (a stopped process, or one stuck with Python's lock held), after which it is ended
START_SECONDS = 1800.0
# for a role to open: large models load for long
LOSS_SECONDS = 10.0
# after one rank's error, in which another one's death is noticed
FIRST_WAIT_SECONDS = 0.1
# before another start; doubles from one failed start to the next
MAX_FAILED_STARTS = 4
STANDARD_ERROR = 2
# its file descriptor


@asynccontextmanager
async def role_folder(inside: Path | None = None) -> AsyncIterator[Path]:
    """Where roles and whoever starts them meet; roles end when this process does, however it ends.

    inside: another such folder, which takes this one along; None: the system's for temporary files.
    """
    folder = Path(tempfile.mkdtemp(prefix="openkeye-", dir=inside))
    # (0700, and short: a socket's path may have 107 letters)
    with (folder / PARENT_LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class RoleProcess:
    """One role, kept alive."""

    def __init__(
        self,
        folder: Path,
        name: str,
        open_role: OpenRole,
        num_ranks: int = 0,
        blocked_seconds: float = math.inf,
        environment: Mapping[str, str] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """
        Args:
            folder: of `role_folder`.
            open_role: makes the role, in its process; what pickles by name.
            num_ranks: processes under torchrun, each of which is asked everything; 0: one process without it.
            blocked_seconds: for which a call may hold up the others.
            environment: variables besides this process' own, such as which GPUs are to be seen.
            say: told of deaths.
        """
        self.name = name
        self.num_starts = 0
        # processes so far
        self._folder, self._num_ranks, self._say = folder, num_ranks, say
        # The same code as here, wherever it was imported from.
        paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        self._environment = {**os.environ, "PYTHONPATH": paths, **(environment or {})}
        self._after_start: Callable[[], Awaitable[None]] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._clients: list[RoleClient] = []
        self._is_ready = asyncio.Event()
        self._refusal = ""
        (folder / f"{name}{OPENING}").write_bytes(pickle.dumps(Opening(open_role, blocked_seconds)))
        self._keeping = asyncio.create_task(self._keep())

    @property
    def pid(self) -> int | None:
        """Of the process, or of torchrun; None where none runs."""
        return None if self._process is None else self._process.pid

    def after_start(self, function: Callable[[], Awaitable[None]]) -> None:
        """What is to be done with every new process before others may call it."""
        self._after_start = function

    async def ready(self) -> None:
        """See `RolloutWorker.ready`."""
        waiting = asyncio.ensure_future(self._is_ready.wait())
        await asyncio.wait({waiting, self._keeping}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            error = None if self._keeping.cancelled() else self._keeping.exception()
            raise InputError(self._refusal or f"{self.name} cannot be kept running ({error or 'it was stopped'})") from error

    async def call(self, method: str, *arguments: Any, label: str = "") -> Any:
        """Ask all ranks; the first one's answer. Errors as of `RoleClient.call`."""
        if not self._clients:
            raise RoleLost(self.name, "it is not running")
        calls = [asyncio.ensure_future(client.call(method, *arguments, label=label)) for client in self._clients]
        try:
            _, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
            if waiting:
                # Those who survive a rank fail on its connection, often before it is known that it died.
                await asyncio.wait(waiting, timeout=LOSS_SECONDS)
            errors = [error for call in calls if call.done() and (error := call.exception()) is not None]
            if errors:
                raise next((error for error in errors if isinstance(error, RoleLost)), errors[0])
            return calls[0].result()
        finally:
            for call in calls:
                call.cancel()

    async def stop(self) -> None:
        """End the process, and keep it ended."""
        self._keeping.cancel()
        await asyncio.gather(self._keeping, return_exceptions=True)

    async def _keep(self) -> None:
        """Start, wait for the end, start again."""
        num_failed = 0
        while num_failed < MAX_FAILED_STARTS:
            if num_failed:
                await asyncio.sleep(FIRST_WAIT_SECONDS * 2 ** (num_failed - 1))
            try:
                self._process = await self._started()
                is_up = await self._connected(self._process)
                if is_up:
                    num_failed = 0
                    await self._watch(self._process)
            finally:
                why = await self._end()
            num_failed += not is_up
            self._say(f"{self.name} ended ({why}){'' if num_failed >= MAX_FAILED_STARTS else '; it is started again'}")
            refusal = self._folder / f"{self.name}{REFUSAL}"
            if refusal.is_file():
                self._refusal = refusal.read_text()
                return
        self._refusal = f"{self.name} ended {num_failed} times before it was open ({why}); its own words are above"

    async def _started(self) -> asyncio.subprocess.Process:
        self.num_starts += 1
        for rest in self._folder.glob(f"{self.name}.*"):
            if not rest.name.endswith(OPENING):
                rest.unlink()
        module = ["-m", "openkeye.rl.role_process", str(self._folder), self.name]
        command = [sys.executable, *module]
        if self._num_ranks:
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self._num_ranks}", "--max-restarts=0"]
            command = [sys.executable, *launch, *module]
        # A session of its own: a terminal's Ctrl-C is not for it, and whatever it starts can be ended with it.
        return await asyncio.create_subprocess_exec(
            *command,
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            # What it prints is no result of ours.
            stdout=STANDARD_ERROR,
            start_new_session=True,
        )

    def _places(self) -> list[str]:
        return [f"{self.name}.{number}" for number in range(max(1, self._num_ranks))]

    async def _connected(self, process: asyncio.subprocess.Process) -> bool:
        """Whether all ranks answer; False where one ends or hangs before it does."""
        paths = [self._folder / f"{place}{SOCKET}" for place in self._places()]
        deadline = time.monotonic() + START_SECONDS
        while not all(path.exists() for path in paths):
            if process.returncode is not None or time.monotonic() > deadline or self._silent_seconds() > SILENT_SECONDS:
                return False
            await asyncio.sleep(POLL_SECONDS)
        try:
            self._clients = [await RoleClient.connect(path) for path in paths]
            if self._after_start is not None:
                await self._after_start()
        except (OSError, RoleLost):
            return False
        self._is_ready.set()
        return True

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        ended = asyncio.ensure_future(process.wait())
        while not ended.done() and self._silent_seconds() < SILENT_SECONDS:
            await asyncio.wait({ended}, timeout=SILENT_SECONDS / 10)
        ended.cancel()

    def _silent_seconds(self) -> float:
        """Since the rank that was silent longest gave a sign of life; 0 before its first one."""
        paths = [path for place in self._places() if (path := self._folder / f"{place}{ALIVE}").exists()]
        return max((time.time() - path.stat().st_mtime for path in paths), default=0.0)

    async def _end(self) -> str:
        """Make sure that it is gone, with all that it has started; tells how it ended."""
        self._is_ready.clear()
        process = self._process
        if process is None:
            return "it could not be started"
        is_hanging = process.returncode is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        status = await process.wait()
        why = f"signal {-status}" if status < 0 else f"exit status {status}"
        if is_hanging:
            why = "it gave no sign of life"
        culprit = next((text for place in self._places() if (text := self._last_words(place))), "")
        if culprit:
            why = f"{culprit} held it up"
        for client in self._clients:
            client.lose(RoleLost(self.name, why, culprit))
        self._clients, self._process = [], None
        return why

    def _last_words(self, place: str) -> str:
        path = self._folder / f"{place}{ALIVE}"
        return path.read_text() if path.is_file() else ""


class ProcessWorker:
    """A `RolloutWorker` in another process; a new process is given the weights that the old one had."""

    def __init__(self, process: RoleProcess, num_slots: int) -> None:
        self.process = process
        self._num_slots = num_slots
        self._weights: Publication | None = None
        process.after_start(self._give_weights)

    @property
    def num_slots(self) -> int:
        """See `RolloutWorker.num_slots`."""
        return self._num_slots

    async def ready(self) -> None:
        """See `RolloutWorker.ready`."""
        await self.process.ready()

    async def publish(self, weights: Publication) -> None:
        """See `RolloutWorker.publish`."""
        self._weights = weights
        await self.process.ready()
        with contextlib.suppress(RoleLost):
            # (the next process is given them before anything else)
            await self.process.call("publish", weights)
        await self.process.ready()

    async def roll(self, order: RolloutOrder, on_partial: OnPartial) -> Rollout | PartialRollout:
        """See `RolloutWorker.roll`."""
        return await self.process.call("roll", order, on_partial, label=order.label)

    async def interrupt(self) -> None:
        """See `RolloutWorker.interrupt`."""
        await self.process.call("interrupt")

    async def _give_weights(self) -> None:
        if self._weights is not None:
            await self.process.call("publish", self._weights)


class ProcessScorer:
    """A `ScorerRole` in another process."""

    def __init__(self, process: RoleProcess) -> None:
        self.process = process

    async def ready(self) -> None:
        """See `ScorerRole.ready`."""
        await self.process.ready()

    async def score(self, rollout: Rollout) -> ScoredRollout:
        """See `ScorerRole.score`."""
        return await self.process.call("score", rollout, label=str(rollout.id))


class ProcessLearner:
    """A `LearnerRole` in other processes: all ranks are asked the same, and the first one answers."""

    def __init__(self, process: RoleProcess) -> None:
        self.process = process
        self._opened_start = 0

    async def ready(self) -> None:
        """See `LearnerRole.ready`."""
        await self.process.ready()

    async def open(self) -> int:
        """See `LearnerRole.open`."""
        await self.process.ready()
        self._opened_start = self.process.num_starts
        return await self._call("open")

    async def step(self, update: Update) -> Record:
        """See `LearnerRole.step`."""
        return await self._call("step", update)

    async def save(self) -> None:
        """See `LearnerRole.save`."""
        await self._call("save")

    async def publish(self, path: Path) -> Publication:
        """See `LearnerRole.publish`."""
        return await self._call("publish", path)

    async def write_model(self, out_dir: Path) -> None:
        """See `LearnerRole.write_model`."""
        await self._call("write_model", out_dir)

    async def _call(self, method: str, *arguments: Any) -> Any:
        if self.process.num_starts != self._opened_start:
            # It died between two calls: the new process has nothing of what the old one had learnt.
            raise RoleLost(self.process.name, "it was started again")
        return await self.process.call(method, *arguments)
