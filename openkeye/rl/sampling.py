"""Rollouts under way: hands them to workers, writes down what comes back, has it scored, and begins anew what is too old."""

import asyncio
import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openkeye.rl.data_order import DataOrder
from openkeye.rl.groups import Group, GroupBook
from openkeye.rl.roles import PartialRollout, Publication, RoleLost, RolloutOrder, RolloutWorker, ScoredRollout, ScorerRole
from openkeye.rl.rollout import Rollout, RolloutId
from openkeye.rl.run_config import PostTrainingConfig

CANCEL_SECONDS = 2.0
# for a worker to let go of a rollout that is no longer wanted; after that nobody waits for it
INTERRUPT_SECONDS = 30.0
# for workers to hand out what there is of rollouts under way
NUM_TOLD = 5
# failures that are told in words; later ones are counted
Key = tuple[int, int]
# group and member


class Changed:
    """Wakes everybody who waits for something to be otherwise, to look again."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def tell(self) -> None:
        """Something has changed."""
        self._event.set()
        self._event.clear()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Return when it holds."""
        while not holds():
            await self._event.wait()


@dataclass
class Call:
    """A rollout that a worker has."""

    oldest_version: int
    task: asyncio.Task[Rollout | PartialRollout] | None = None
    is_unwanted: bool = False


@dataclass
class Question:
    """A rollout of an evaluation, and who waits for it."""

    order: RolloutOrder
    answer: asyncio.Future[Rollout]


class Sampling:
    """Keeps the workers busy with the rollouts that the next updates need."""

    def __init__(
        self,
        config: PostTrainingConfig,
        book: GroupBook,
        data_order: DataOrder,
        workers: Sequence[RolloutWorker],
        scorers: Sequence[ScorerRole],
        say: Callable[[str], None],
    ) -> None:
        self.changed = Changed()
        self.is_stopping = False
        self.version = -1
        # of the weights that workers have; -1: none yet
        self.num_lost = 0
        # rollouts whose worker died under them
        self.score_seconds = 0.0
        # spent by scorers, added up over calls
        self._config, self._book, self._data_order, self._say = config, book, data_order, say
        self._workers, self._scorers = workers, scorers
        self._calls: dict[Key, Call] = {}
        self._scoring: set[Key] = set()
        self._questions: deque[Question] = deque()
        self._losses: Counter[Key] = Counter()
        self._num_told = 0
        self._is_held = False

    async def run(self) -> None:
        """Play and score until cancelled."""
        slots = [self._serve(worker) for worker in self._workers for _ in range(worker.num_slots)]
        scoring = [self._serve_scorer(scorer) for scorer in self._scorers for _ in range(self._config.num_slots)]
        await first_end(*slots, *scoring)

    async def publish(self, weights: Publication) -> None:
        """Workers sample with these weights when this returns."""
        if not self._config.keeps_partial:
            self._is_held = True
            await self.changed.until(lambda: not self._calls)
        await asyncio.gather(*(worker.publish(weights) for worker in self._workers))
        self.version, self._is_held = weights.version, False
        self.changed.tell()

    def discard_stale(self) -> None:
        """Begin anew whatever the next update may no longer learn from."""
        oldest = self._book.next_update - self._config.max_age
        stale: dict[int, set[int]] = {}
        for (group_number, number), call in self._calls.items():
            if call.oldest_version < oldest:
                stale.setdefault(group_number, set()).add(number)
                call.is_unwanted = True
                if call.task is not None:
                    call.task.cancel()
        for group in self._book.groups.values():
            for number, member in enumerate(group.members):
                if member.oldest_version is not None and member.oldest_version < oldest:
                    stale.setdefault(group.number, set()).add(number)
        for group_number, numbers in stale.items():
            self._book.record("stale", {"group": group_number, "members": sorted(numbers)})
        self.changed.tell()

    async def evaluate(self, ids: Sequence[RolloutId]) -> list[Rollout]:
        """Play these with the evaluation's settings, before anything else; those that ended before a stop."""
        loop = asyncio.get_running_loop()
        questions = [Question(RolloutOrder(id, is_evaluation=True), loop.create_future()) for id in ids]
        self._questions.extend(questions)
        self.changed.tell()
        answers = [question.answer for question in questions]
        await self.changed.until(lambda: self.is_stopping or all(answer.done() for answer in answers))
        return [answer.result() for answer in answers if answer.done()]

    async def interrupt(self) -> None:
        """Stop playing; what there is of rollouts under way is written down, where somebody can go on from it."""
        self.is_stopping = True
        self.changed.tell()
        if self._config.keeps_partial:
            await asyncio.wait([asyncio.create_task(_interrupted(worker)) for worker in self._workers], timeout=CANCEL_SECONDS)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.until(lambda: not self._calls), INTERRUPT_SECONDS)

    async def _serve(self, worker: RolloutWorker) -> None:
        """One slot of a worker."""
        while True:
            await self.changed.until(self._has_order)
            await worker.ready()
            if not self._has_order():
                continue
            if self._questions:
                await self._ask(worker, self._questions.popleft())
                self.changed.tell()
            else:
                await self._play(worker, self._next_order())

    def _has_order(self) -> bool:
        if self.is_stopping or self.version < 0:
            return False
        if self._questions:
            return True
        # Rollouts that begin now are as old as the weights, and the next update learns from them at the soonest.
        is_fresh = self._book.next_update - self.version <= self._config.max_age
        return is_fresh and not self._is_held and (self._waiting() is not None or self._has_room())

    def _has_room(self) -> bool:
        return len(self._book.groups) < self._config.max_open_groups

    def _waiting(self) -> Key | None:
        """The first rollout of an open group that nobody has yet."""
        for group in self._book.groups.values():
            if not group.completed_at:
                for number, member in enumerate(group.members):
                    if member.finished is None and (group.number, number) not in self._calls:
                        return group.number, number
        return None

    def _next_order(self) -> RolloutOrder:
        key = self._waiting()
        if key is None:
            number = self._book.next_group
            task, example = self._data_order.example(number)
            facts = {"group": number, "task": task, "number": example, "size": self._config.group_size}
            self._book.record("opened", facts)
            key = number, 0
        order = self._book.order(*key)
        oldest = self.version if order.partial is None else order.partial.oldest_version
        self._calls[key] = Call(oldest)
        return order

    async def _play(self, worker: RolloutWorker, order: RolloutOrder) -> None:
        key = order.id.group, order.id.member
        call = self._calls[key]
        call.task = asyncio.create_task(worker.roll(order, lambda partial: self._note_partial(order, partial)))
        try:
            is_over = await _ends(call.task, self._config.rollout_seconds)
        finally:
            call.task.cancel()
            del self._calls[key]
            self.changed.tell()
        if call.is_unwanted or not self._is_wanted(order):
            return
        if not is_over:
            self._fail(order, f"nothing after {self._config.rollout_seconds:g} s")
            return
        error = None if call.task.cancelled() else call.task.exception()
        if isinstance(error, RoleLost):
            self._note_loss(order, error)
        elif error is not None:
            self._fail(order, f"{type(error).__name__}: {error}")
        elif not call.task.cancelled():
            self._note_result(order, call.task.result())

    def _is_wanted(self, order: RolloutOrder) -> bool:
        """Whether the rollout has not been begun anew, nor given up, in the meantime."""
        id = order.id
        return self._book.is_current(id, order.attempt) and self._book.groups[id.group].members[id.member].finished is None

    def _note_result(self, order: RolloutOrder, result: Rollout | PartialRollout) -> None:
        if isinstance(result, PartialRollout):
            self._note_partial(order, result)
        else:
            self._book.record_finished(order, result)
            if result.finish_reason == "failed":
                self._tell(f"rollout {order.id} failed: {result.text}")
        self.changed.tell()

    def _note_partial(self, order: RolloutOrder, partial: PartialRollout) -> None:
        if self._config.keeps_partial and self._is_wanted(order):
            self._book.record_partial(order, partial)

    def _note_loss(self, order: RolloutOrder, lost: RoleLost) -> None:
        """Its process died: the rollout is given out again, unless it is the one that processes die of."""
        key = order.id.group, order.id.member
        self.num_lost += 1
        self._losses[key] += not lost.culprit
        if lost.culprit == order.label or self._losses[key] >= self._config.max_losses:
            self._fail(order, str(lost))

    def _fail(self, order: RolloutOrder, why: str) -> None:
        self._tell(f"rollout {order.id} failed: {why}")
        self._book.record_finished(order, failed_rollout(order.id, why))
        self.changed.tell()

    def _tell(self, text: str) -> None:
        self._num_told += 1
        if self._num_told <= NUM_TOLD:
            self._say(text if self._num_told < NUM_TOLD else f"{text} (later failures are only counted)")

    async def _ask(self, worker: RolloutWorker, question: Question) -> None:
        """A rollout of an evaluation; one that fails scores nothing."""
        id = question.order.id
        task = asyncio.create_task(worker.roll(question.order, lambda partial: None))
        try:
            is_over = await _ends(task, self._config.rollout_seconds)
        finally:
            task.cancel()
        if not is_over:
            question.answer.set_result(failed_rollout(id, "out of time"))
            return
        error = task.exception()
        key = id.group, id.member
        if isinstance(error, RoleLost):
            self._losses[key] += not error.culprit
            if error.culprit != question.order.label and self._losses[key] < self._config.max_losses:
                self._questions.append(question)
            else:
                question.answer.set_result(failed_rollout(id, str(error)))
        elif error is not None:
            self._tell(f"evaluation {id} failed: {type(error).__name__}: {error}")
            question.answer.set_result(failed_rollout(id, str(error)))
        else:
            result = task.result()
            # (interrupted: the run ends, and nobody waits any longer)
            question.answer.set_result(result if isinstance(result, Rollout) else failed_rollout(id, "interrupted"))

    async def _serve_scorer(self, scorer: ScorerRole) -> None:
        """One of the calls that a scorer answers at once."""
        while True:
            await self.changed.until(lambda: self._unscored() is not None)
            await scorer.ready()
            unscored = self._unscored()
            if unscored is None:
                continue
            group, number = unscored
            key = group.number, number
            self._scoring.add(key)
            began = time.monotonic()
            try:
                await self._score(scorer, key, group.members[number].attempt)
            finally:
                self.score_seconds += time.monotonic() - began
                self._scoring.discard(key)
                self.changed.tell()

    def _unscored(self) -> tuple[Group, int] | None:
        for group in self._book.groups.values():
            for number, member in enumerate(group.members):
                is_due = member.finished is not None and not group.is_done(member)
                if is_due and (group.number, number) not in self._scoring:
                    return group, number
        return None

    async def _score(self, scorer: ScorerRole, key: Key, attempt: int) -> None:
        rollout = self._book.rollout(self._book.groups[key[0]], key[1]).rollout
        task = asyncio.create_task(scorer.score(rollout))
        try:
            is_over = await _ends(task, self._config.rollout_seconds)
        finally:
            task.cancel()
        error = task.exception() if is_over else TimeoutError(f"no score after {self._config.rollout_seconds:g} s")
        if isinstance(error, RoleLost):
            self._losses[key] += 1
            if self._losses[key] < self._config.max_losses:
                return
        if not self._book.is_current(rollout.id, attempt):
            # Begun anew in the meantime.
            return
        if error is None:
            self._book.record_scored(*key, task.result())
        else:
            self._tell(f"rollout {rollout.id} could not be scored: {type(error).__name__}: {error}")
            self._book.record_scored(*key, ScoredRollout(failed_rollout(rollout.id, str(error))))


def failed_rollout(id: RolloutId, why: str) -> Rollout:
    """What stands for a rollout that came to nothing."""
    empty = np.zeros(0, np.int32)
    return Rollout(id, empty, empty, np.zeros(0, bool), np.zeros(0, np.float32), empty, finish_reason="failed", text=why)


async def first_end(*parts: Coroutine[Any, Any, Any]) -> Any:
    """Run them side by side until one ends, by an error or not; the others are cancelled."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(iter(done)).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _ends(task: asyncio.Task, seconds: float) -> bool:
    """Whether a call ends in time; one that does not is cancelled."""
    done, _ = await asyncio.wait({task}, timeout=seconds if math.isfinite(seconds) else None)
    if not done:
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_SECONDS)
    return bool(done)


async def _interrupted(worker: RolloutWorker) -> None:
    try:
        await worker.interrupt()
    except RoleLost:
        # What it had is lost with it, and asked for again later.
        return
