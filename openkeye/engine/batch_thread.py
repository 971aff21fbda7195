"""`BatchThread`: one engine on a thread of its own, for policies and scorers: requests in, finished ones back.

Unlike `EngineService` it takes prompts that are laid out already, and runs other work (new weights, interruptions) between two
batches. What goes wrong in a batch ends the requests of that batch.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

from openkeye.engine.batch import Batch
from openkeye.engine.loop import Engine
from openkeye.engine.ranks import RanksError
from openkeye.engine.request import Request

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class StoppedError(RuntimeError):
    """The thread has ended, and with it what was asked of it."""


class BatchThread:
    """Steps an engine, which nobody else may use between start and stop."""

    def __init__(self, engine: Engine, run_batch: Callable[[Batch], list[Request]], name: str) -> None:
        """run_batch: runs one batch of the scheduler's and returns the requests that are finished; called on the thread."""
        self.engine = engine
        self._run_batch = run_batch
        self._changed = threading.Condition()
        self._orders: deque[tuple[Callable[[], object], Future]] = deque()
        self._futures: dict[Request, Future[Request]] = {}
        # of the requests that the scheduler holds; the thread's own
        self._is_stopping = False
        self.is_held = False
        # no batch runs meanwhile; the thread's own
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        engine.scheduler.on_news = self._wake
        self._thread.start()

    def submit(self, request: Request, check: Callable[[], None] = lambda: None) -> "Future[Request]":
        """Run a request; its future has it when it is finished, or what ended it. Safe on any thread.

        check: called on the thread before it is queued; what it raises ends the request.
        """
        finished: Future[Request] = Future()
        # From here on nobody can cancel it behind the thread's back.
        finished.set_running_or_notify_cancel()
        self.call(lambda: self._add(request, check, finished)).add_done_callback(lambda order: _pass_error(order, finished))
        return finished

    def call(self, order: Callable[[], Result]) -> "Future[Result]":
        """Run something on the thread, between two batches, in the order of the calls. Safe on any thread."""
        future: Future[Result] = Future()
        future.set_running_or_notify_cancel()
        with self._changed:
            if self._is_stopping or not self._thread.is_alive():
                future.set_exception(StoppedError("the engine's thread has ended"))
                return future
            self._orders.append((order, future))
            self._changed.notify_all()
        return future

    @property
    def requests(self) -> list[Request]:
        """Those that are not finished. On the thread."""
        return list(self._futures)

    def end(self, request: Request, error: BaseException) -> None:
        """Let a request go before its end. On the thread; a request that has ended stays as it is."""
        if request in self._futures:
            self._fail(request, error)

    def stop(self, timeout_seconds: float = 60.0) -> None:
        """End the thread after the batch under way; what is open fails with `StoppedError`."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_seconds)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # On the thread.

    def _serve(self) -> None:
        try:
            while self._wait():
                self._carry_out_orders()
                self._end_broken()
                if self.engine.scheduler.has_due_work and not self.is_held:
                    self._run()
        finally:
            with self._changed:
                self._is_stopping = True
                orders, self._orders = list(self._orders), deque()
            self.engine.scheduler.clear()
            for future in [*self._futures.values(), *(future for _, future in orders)]:
                if not future.done():
                    future.set_exception(StoppedError("the engine's thread has ended"))

    def _wait(self) -> bool:
        with self._changed:
            while not self._is_stopping and not self._orders and not self._has_due_work():
                self._changed.wait()
            return not self._is_stopping

    def _has_due_work(self) -> bool:
        is_broken = any(request.media.error is not None for request in self._futures)
        return is_broken or (self.engine.scheduler.has_due_work and not self.is_held)

    def _carry_out_orders(self) -> None:
        while True:
            with self._changed:
                if not self._orders:
                    return
                order, future = self._orders.popleft()
            try:
                result = order()
            except Exception as error:
                # Whoever ordered it is told; an order may be refused in many ways, and the others' requests go on.
                logger.debug("an order was refused", exc_info=True)
                future.set_exception(error)
            else:
                future.set_result(result)

    def _add(self, request: Request, check: Callable[[], None], finished: "Future[Request]") -> None:
        check()
        self.engine.scheduler.add(request)
        self._futures[request] = finished

    def _end_broken(self) -> None:
        """Requests whose video cannot be decoded."""
        for request in [request for request in self._futures if request.media.error is not None]:
            error = request.media.error
            assert error is not None
            self._fail(request, error)

    def _run(self) -> None:
        batch: Batch | None = None
        try:
            batch = self.engine.scheduler.next_batch()
            if batch is None:
                return
            finished = self._run_batch(batch)
        except (torch.AcceleratorError, RanksError):
            # No call to the device succeeds after that.
            raise
        except Exception as error:
            # Whatever it was, the requests of other batches had no part in it.
            logger.exception("a batch failed")
            for request in [s.request for s in batch.segments] if batch is not None else list(self._futures):
                self._fail(request, error)
            return
        for request in finished:
            self._futures.pop(request).set_result(request)

    def _fail(self, request: Request, error: BaseException) -> None:
        self.engine.scheduler.remove(request)
        self._futures.pop(request).set_exception(error)


def _pass_error(order: "Future[None]", finished: "Future[Request]") -> None:
    """A request that was not taken has its future's end already."""
    error = order.exception()
    if error is not None and not finished.done():
        finished.set_exception(error)
