"""Teachers by name, which of them an example goes to, and the pool that lets all of them look at responses with one device.

A pool has one seat. Teachers take it in turn, each once in a step, and a response is scored as soon as it is there and its
teacher has the seat: a teacher keeps it until all responses that the step has for it are scored.
"""

import asyncio
import hashlib
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from openkeye.common.fields import unknown
from openkeye.distill.scored import ModelScorer, ResponseScorer, Scored
from openkeye.distill.teacher_weights import ResidentWeights, WeightFigures, is_delta, weights_hash
from openkeye.inputs.picture_hash import picture_hash
from openkeye.inputs.prompt import Prompt
from openkeye.inputs.video import Frames, VideoRequest
from openkeye.model.keye import KeyeModel

ANY = "*"


class TeacherRoutes:
    """(modality, task) -> name of a teacher."""

    def __init__(self, routes: Mapping[str, str], teachers: Mapping[str, str]) -> None:
        """
        Args:
            routes: names of teachers by "modality/task"; "video/*" is every task of a modality that has no route of its own.
            teachers: folders by name; any name will do.

        Raises:
            InputError: a route to no teacher, or one that is no "modality/task".
        """
        for label, name in routes.items():
            if name not in teachers:
                raise unknown(f"route {label}: teacher", name, teachers)
            if label.count("/") != 1 or not all(label.split("/")):
                raise unknown("route", label, ["MODALITY/TASK", f"MODALITY/{ANY}"])
        self._routes = dict(routes)

    def teacher_of(self, modality: str, task: str) -> str:
        """The teacher of an example.

        Raises:
            InputError: nobody teaches this label; the known ones are named.
        """
        for label in (f"{modality}/{task}", f"{modality}/{ANY}"):
            if label in self._routes:
                return self._routes[label]
        raise unknown("teacher of", f"{modality}/{task}", self._routes)


class Seat(Protocol):
    """A network that one teacher at a time has."""

    @property
    def num_slots(self) -> int:
        """Responses that it scores at once."""
        ...

    @property
    def figures(self) -> WeightFigures:
        """What bringing weights in has cost so far."""
        ...

    async def use(self, folder: str) -> None:
        """Give the seat to a teacher. Nothing is being scored.

        Raises:
            InputError: weights that cannot be loaded; then nobody has it.
        """
        ...

    async def score(self, prompt: Prompt, output_ids: np.ndarray, chosen_ids: np.ndarray | None, top_k: int) -> Scored:
        """See `scored.ResponseScorer.score`."""
        ...


class ModelSeat:
    """`Seat` of a network in this process, on a thread beside the event loop."""

    num_slots = 1

    def __init__(
        self,
        base_dir: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        make_scorer: Callable[[KeyeModel], ResponseScorer] = ModelScorer,
    ) -> None:
        """See `ResidentWeights`. make_scorer: what reads with the network, made anew for every teacher."""
        self._weights = ResidentWeights(base_dir, device, dtype)
        self._make_scorer = make_scorer
        self._scorer: ResponseScorer | None = None

    @property
    def figures(self) -> WeightFigures:
        """See `Seat.figures`."""
        return self._weights.figures

    async def use(self, folder: str) -> None:
        """See `Seat.use`."""
        self._scorer = None
        self._scorer = self._make_scorer(await asyncio.to_thread(self._weights.use, folder))

    async def score(self, prompt: Prompt, output_ids: np.ndarray, chosen_ids: np.ndarray | None, top_k: int) -> Scored:
        """See `Seat.score`."""
        assert self._scorer is not None, "nobody has the seat"
        return await asyncio.to_thread(self._scorer.score, prompt, output_ids, chosen_ids, top_k)


@dataclass
class PoolFigures:
    """Of a step, or since the pool began."""

    num_loads: int = 0
    # whole checkpoints read
    num_swaps: int = 0
    # deltas brought into the resident base
    num_turns: int = 0
    # times that another teacher took over
    num_scored: int = 0
    num_cached: int = 0
    # answers taken from the cache
    load_seconds: float = 0.0
    swap_seconds: float = 0.0
    score_seconds: float = 0.0


@dataclass
class _Waiting:
    """A response and who waits for its score."""

    key: bytes
    prompt: Prompt
    output_ids: np.ndarray
    chosen_ids: np.ndarray | None
    top_k: int
    answer: asyncio.Future[Scored]


@dataclass
class _Turn:
    """One set of weights, under however many names."""

    folder: str
    waiting: deque[_Waiting] = field(default_factory=deque)
    num_expected: int = 0
    # responses that the step still has for it and that have not come

    @property
    def share_here(self) -> float:
        """How much of what it will have to score has come."""
        return len(self.waiting) / max(1, len(self.waiting) + self.num_expected)


class ScoreCache:
    """Scores by key, the latest used ones, up to so many bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, Scored] = OrderedDict()

    def find(self, key: bytes) -> Scored | None:
        """What was kept under a key."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def keep(self, key: bytes, scored: Scored) -> None:
        """Remember; what was not used for longest goes."""
        if key in self._kept or scored.num_bytes > self._max_bytes:
            return
        self._kept[key] = scored
        self.num_bytes += scored.num_bytes
        while self.num_bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= oldest.num_bytes


class TeacherPool:
    """See the top of this file. Used from one event loop."""

    def __init__(self, teachers: Mapping[str, str], seat: Seat, cache_bytes: int = 256 << 20) -> None:
        """
        Args:
            teachers: folders by name: checkpoints, or deltas of the seat's base (`teacher_weights.write_delta`).
            seat: what scores.
            cache_bytes: of scores that are kept.

        Raises:
            InputError: a folder that is none, or unreadable weights.
        """
        self.cache = ScoreCache(cache_bytes)
        self.hashes = {name: weights_hash(folder) for name, folder in teachers.items()}
        # by the weights themselves, so that names that share some are one teacher
        # Deltas last, since of several folders with the same weights a delta is the one that is soonest there.
        folders = sorted(teachers, key=lambda name: is_delta(teachers[name]))
        self._turns = {self.hashes[name]: _Turn(teachers[name]) for name in folders}
        self._seat = seat
        self._current = ""
        # hash of the weights that have the seat
        self._own, self._told = PoolFigures(), WeightFigures()
        self._changed = asyncio.Event()
        self._work: asyncio.Task[None] | None = None
        self._running: set[asyncio.Task[None]] = set()

    def begin_step(self, num_expected: Mapping[str, int]) -> None:
        """Say how many responses each teacher will have to score, so that none has to be loaded twice.

        Raises:
            InputError: an unknown name.
        """
        counts: Counter[str] = Counter()
        for name, number in num_expected.items():
            counts[self._hash(name)] += number
        for key, turn in self._turns.items():
            turn.num_expected = counts[key]
        self._changed.set()

    def withdraw(self, name: str) -> None:
        """One response that was expected will not come."""
        turn = self._turns[self._hash(name)]
        turn.num_expected = max(0, turn.num_expected - 1)
        self._changed.set()

    async def score(
        self, name: str, prompt: Prompt, output_ids: np.ndarray, chosen_ids: np.ndarray | None, top_k: int
    ) -> Scored:
        """What a teacher says of a response (`ResponseScorer.score`), when its turn has come; at once where that is known.

        Raises:
            InputError: an unknown name, or weights that cannot be loaded.
        """
        weights = self._hash(name)
        turn = self._turns[weights]
        turn.num_expected = max(0, turn.num_expected - 1)
        key = score_key(weights, prompt, output_ids, chosen_ids, top_k)
        known = self.cache.find(key)
        if known is not None:
            self._own.num_cached += 1
            self._changed.set()
            return known
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._run())
        answer = asyncio.get_running_loop().create_future()
        turn.waiting.append(_Waiting(key, prompt, output_ids, chosen_ids, top_k, answer))
        self._changed.set()
        return await answer

    def take_figures(self) -> PoolFigures:
        """Everything since the last call."""
        told, self._own = self._own, PoolFigures()
        now = WeightFigures(**vars(self._seat.figures))
        for name, value in vars(now).items():
            setattr(told, name, value - getattr(self._told, name))
        self._told = now
        return told

    async def close(self) -> None:
        """Stop working; nobody may wait any longer."""
        tasks = {*self._running, *([] if self._work is None else [self._work])}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _hash(self, name: str) -> str:
        if name not in self.hashes:
            raise unknown("teacher", name, self.hashes)
        return self.hashes[name]

    def _next(self) -> str | None:
        """Whose turn it is; None to wait."""
        current = self._turns.get(self._current)
        if current is not None and (current.waiting or current.num_expected):
            return self._current if current.waiting else None
        ready = [key for key, turn in self._turns.items() if turn.waiting]
        return max(ready, key=lambda key: (self._turns[key].share_here, len(self._turns[key].waiting)), default=None)

    async def _run(self) -> None:
        while True:
            self._running = {task for task in self._running if not task.done()}
            chosen = self._next()
            is_free = chosen == self._current or not self._running
            if chosen is not None and is_free and len(self._running) < self._seat.num_slots:
                one = self._turns[chosen].waiting.popleft()
                if chosen == self._current or await self._take_seat(chosen, one):
                    self._running.add(asyncio.create_task(self._answer(one)))
                continue
            self._changed.clear()
            change = asyncio.create_task(self._changed.wait())
            await asyncio.wait({change, *self._running}, return_when=asyncio.FIRST_COMPLETED)
            change.cancel()

    async def _take_seat(self, chosen: str, one: _Waiting) -> bool:
        """Give the seat to somebody else; False where that failed, which is told to whoever waits."""
        self._current = ""
        task = asyncio.create_task(self._seat.use(self._turns[chosen].folder))
        await asyncio.wait({task})
        error = task.exception()
        if error is None:
            self._current = chosen
            self._own.num_turns += 1
        elif not one.answer.done():
            one.answer.set_exception(error)
        return error is None

    async def _answer(self, one: _Waiting) -> None:
        """Score one response with whoever has the seat."""
        known = self.cache.find(one.key)
        if known is not None and not one.answer.done():
            # Asked for twice, and answered in between.
            self._own.num_cached += 1
            one.answer.set_result(known)
        if one.answer.done():
            # Whoever asked has it, or has gone.
            return
        began = time.monotonic()
        task = asyncio.create_task(self._seat.score(one.prompt, one.output_ids, one.chosen_ids, one.top_k))
        await asyncio.wait({task})
        self._own.score_seconds += time.monotonic() - began
        error = task.exception()
        if error is None:
            self._own.num_scored += 1
            self.cache.keep(one.key, task.result())
        if one.answer.done():
            return
        if error is None:
            one.answer.set_result(task.result())
        else:
            one.answer.set_exception(error)


def score_key(weights: str, prompt: Prompt, output_ids: np.ndarray, chosen_ids: np.ndarray | None, top_k: int) -> bytes:
    """Names a score: the teacher's weights, all ids, the pictures, and what is asked for."""
    content = hashlib.blake2b(f"{weights} {top_k}".encode(), digest_size=16)
    arrays = [prompt.model_input.input_ids.numpy(), np.asarray(output_ids, np.int64)]
    arrays += [] if chosen_ids is None else [np.asarray(chosen_ids, np.int64)]
    for array in arrays:
        content.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    for medium in prompt.media:
        if isinstance(medium, VideoRequest):
            content.update(f"{medium.source} {medium.plan}".encode() + medium.frame_numbers.tobytes())
        else:
            for name in medium.hashes if isinstance(medium, Frames) else [picture_hash(medium)]:
                content.update(name.encode())
    return content.digest()
