"""`EngineService`: the engine on a thread of its own, for many callers at once.

submit ── encoding threads: messages to a prompt ──> engine thread: batches ──> on_event
                                          decoding threads: frames ──┘
Requests share batches and pages and nothing else: what goes wrong with one ends that one. They run in the order in which they
are encoded, so that a line of text does not wait for an hour of video.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from openkeye.common.checks import InputError
from openkeye.engine.answer import Answer
from openkeye.engine.answering import Message, OnEvent, ServiceStats, Ticket
from openkeye.engine.batch import Batch
from openkeye.engine.config import SamplingParameters
from openkeye.engine.events import ErrorEvent, Event, FinishEvent, TokenEvent
from openkeye.engine.loop import Engine
from openkeye.engine.ranks import RanksError
from openkeye.engine.request import STAGES, Request

__all__ = ["EngineService", "ErrorEvent", "Event", "FinishEvent", "OnEvent", "ServiceStats", "Ticket", "TokenEvent"]

NUM_ENCODING_THREADS = 2
MAX_ENCODED_AHEAD = 8
# requests that are being encoded or are encoded and wait: pictures and uploads are in memory from then on

logger = logging.getLogger(__name__)


class Abandoned(Exception):
    """Nobody waits for this encoding any more."""


class EngineTicket(Ticket):
    """A submitted request, as the service itself knows it."""

    def __init__(
        self,
        sampling: SamplingParameters,
        on_event: OnEvent,
        deadline: float,
        on_cancel: Callable[[Ticket], None],
        template_options: Mapping[str, Any],
        keeps_evidence: bool = False,
    ) -> None:
        """deadline: on the monotonic clock, seconds."""
        super().__init__(on_event, on_cancel)
        self.sampling = sampling
        self.keeps_evidence = keeps_evidence
        self.deadline = deadline
        self.template_options = template_options
        self.request: Request | None = None
        # from the end of its encoding on


class EngineService:
    """An engine on a thread of its own, for many callers at once. Nobody else may use that engine between start and stop."""

    def __init__(self, engine: Engine, max_queue: int = 256) -> None:
        """max_queue: requests that are being encoded or wait for their first batch; more are refused."""
        self._engine = engine
        self._max_queue = max_queue
        self._changed = threading.Condition()
        self._open: dict[EngineTicket, None] = {}
        # tickets whose last event is not out, in the order of their coming
        self._pending: deque[tuple[EngineTicket, Sequence[Message]]] = deque()
        # to be encoded
        self._encoded: deque[tuple[EngineTicket, Request | ErrorEvent]] = deque()
        # for the engine thread
        self._ticket_of: dict[Request, EngineTicket] = {}
        # of what the scheduler holds; the engine thread's own
        self._is_stopping = False
        self._is_closed = False
        self._encoders = ThreadPoolExecutor(NUM_ENCODING_THREADS, "openkeye-encode")
        self._thread = threading.Thread(target=self._serve, name="openkeye-engine", daemon=True)
        self._num_finished = self._num_failed = self._num_prompt_tokens = self._num_output_tokens = 0

    def start(self) -> None:
        """Begin to serve; once in a service's life."""
        self._engine.scheduler.on_news = self._wake
        self._thread.start()

    def stop(self, timeout_seconds: float = 10.0) -> None:
        """Fail what is open and end the threads; returns when the batch under way is done, or after the timeout."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._encoders.shutdown(wait=False, cancel_futures=True)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_seconds)

    def wait(self) -> None:
        """Until the engine thread has ended: after a stop, or after an error that ends the engine."""
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether requests are served: False before the start, after the stop and after the engine thread died."""
        return self._thread.is_alive() and not self._is_stopping and not self._is_closed

    @property
    def has_given_up(self) -> bool:
        """Whether the engine thread died by itself, and with it the service."""
        return self._is_closed and not self._is_stopping

    def submit(
        self,
        messages: Sequence[Message],
        sampling: SamplingParameters,
        on_event: OnEvent,
        deadline_seconds: float | None = None,
        template_options: Mapping[str, Any] | None = None,
        evidence: bool = False,
    ) -> Ticket:
        """Ask for an answer; returns at once.

        Args:
            messages: as for `Engine.generate`.
            sampling: how to choose tokens.
            on_event: called in order with a TokenEvent for each token and then exactly one FinishEvent or ErrorEvent, from the
                engine's thread: it must be quick, and may cancel or submit. Only where the service is not alive, the one
                ErrorEvent comes from within this call.
            deadline_seconds: from now on; an answer that is not whole by then ends as it is, finish_reason "deadline".
            template_options: what the chat template is given beside the messages: tools.
            evidence: whether the answer tells what it rests on (`Answer.evidence`).

        Raises:
            InputError: a deadline that is no time from now on.
        """
        if deadline_seconds is not None and not deadline_seconds >= 0:
            raise InputError(f"deadline_seconds is {deadline_seconds}; give seconds from 0 on, or None")
        deadline = math.inf if deadline_seconds is None else time.monotonic() + deadline_seconds
        ticket = EngineTicket(sampling, on_event, deadline, self._wake, template_options or {}, evidence)
        with self._changed:
            if self.is_alive:
                is_full = len(self._open) - len(self._engine.scheduler.running) >= self._max_queue
                self._open[ticket] = None
                if is_full:
                    message = f"the queue holds {self._max_queue} requests already; try again later"
                    self._encoded.append((ticket, ErrorEvent("full", message)))
                else:
                    self._pending.append((ticket, messages))
                    self._start_encodings()
                # Even before it is encoded, the engine thread has to know its deadline.
                self._changed.notify_all()
                return ticket
            self._num_failed += 1
        ticket.is_settled = True
        ticket.tell(ErrorEvent("stopped", "the engine is not running"))
        return ticket

    def stats(self) -> ServiceStats:
        """A view of this moment; safe on any thread."""
        scheduler = self._engine.scheduler
        num_running = len(scheduler.running)
        return ServiceStats(
            max(0, len(self._open) - num_running),
            num_running,
            self._num_finished,
            self._num_failed,
            self._num_prompt_tokens,
            self._num_output_tokens,
            scheduler.pool.num_available,
            scheduler.pool.num_pages,
        )

    def _wake(self, _ticket: Ticket | None = None) -> None:
        with self._changed:
            self._changed.notify_all()

    def _start_encodings(self) -> None:
        """Encode the next requests, a few ahead of those that run."""
        with self._changed:
            num_ahead = len(self._open) - len(self._engine.scheduler.running) - len(self._pending)
            while self._pending and num_ahead < MAX_ENCODED_AHEAD and not self._is_stopping:
                ticket, messages = self._pending.popleft()
                encoding = self._encoders.submit(self._encode, ticket, messages)
                encoding.add_done_callback(partial(self._take_encoded, ticket))
                num_ahead += 1

    # On the encoding threads.

    def _encode(self, ticket: EngineTicket, messages: Sequence[Message]) -> Request:
        if ticket.is_settled or ticket.is_cancelled:
            raise Abandoned
        options = {"evidence": ticket.keeps_evidence, **ticket.template_options}
        return self._engine.prepare(messages, ticket.sampling, **options)

    def _take_encoded(self, ticket: EngineTicket, future: "Future[Request]") -> None:
        """Hand an encoding's outcome to the engine thread, whatever it is."""
        if future.cancelled():
            return
        error = future.exception()
        outcome: Request | ErrorEvent
        if error is None:
            outcome = future.result()
        elif isinstance(error, Abandoned):
            return
        else:
            outcome = _event_of(error, "encoded")
        with self._changed:
            self._encoded.append((ticket, outcome))
            self._changed.notify_all()

    # On the engine thread.

    def _serve(self) -> None:
        message = "the engine died"
        try:
            while self._wait():
                self._take_requests()
                self._end_requests()
                if self._engine.scheduler.has_work:
                    self._run_batch()
                self._start_encodings()
            message = "the engine is shutting down"
        finally:
            with self._changed:
                self._is_closed = True
            for ticket in list(self._open):
                self._settle(ticket, ErrorEvent("stopped", message))
            self._engine.scheduler.clear()

    def _wait(self) -> bool:
        """Until there is something to do; False where that is to stop."""

        def is_due() -> bool:
            now = time.monotonic()
            is_asked = any(t.is_cancelled or t.has_failed or t.deadline <= now for t in self._open)
            return self._is_stopping or bool(self._encoded) or is_asked or self._engine.scheduler.has_due_work

        with self._changed:
            while not is_due():
                nearest = min((ticket.deadline for ticket in self._open), default=math.inf)
                seconds = min(max(0.0, nearest - time.monotonic()), threading.TIMEOUT_MAX)
                self._changed.wait(None if nearest == math.inf else seconds)
            return not self._is_stopping

    def _take_requests(self) -> None:
        """Queue what is encoded; refuse what cannot be."""
        while self._encoded:
            ticket, outcome = self._encoded.popleft()
            if ticket.is_settled:
                continue
            if isinstance(outcome, ErrorEvent):
                self._settle(ticket, outcome)
                continue
            try:
                self._engine.scheduler.add(outcome)
            except InputError as error:
                self._settle(ticket, ErrorEvent("input", one_line(error)))
                continue
            outcome.on_token = partial(self._tell_token, ticket)
            ticket.request = outcome
            self._ticket_of[outcome] = ticket
            self._num_prompt_tokens += outcome.num_prompt

    def _end_requests(self) -> None:
        """Before the next batch: requests whose callback raised, whose caller left, whose time is up, or whose video is bad."""
        now = time.monotonic()
        with self._changed:
            tickets = list(self._open)
        for ticket in tickets:
            if ticket.has_failed:
                self._settle(ticket, ErrorEvent("internal", "the callback of the request raised an exception"))
            elif ticket.is_cancelled or ticket.deadline <= now:
                self._finish(ticket, "cancelled" if ticket.is_cancelled else "deadline")
            elif ticket.request is not None and (error := ticket.request.media.error) is not None:
                self._settle(ticket, _event_of(error, "decoded"))

    def _run_batch(self) -> None:
        scheduler = self._engine.scheduler
        batch: Batch | None = None
        try:
            batch = scheduler.next_batch()
            if batch is None:
                return
            finished = self._engine.run_batch(batch)
        except (torch.AcceleratorError, RanksError):
            # After an error of the device no call to it succeeds, and ranks that have parted do not meet again: this process is
            # done with answering.
            raise
        except Exception as error:
            # Whatever it was, the requests of other batches had no part in it.
            logger.exception("a batch failed")
            failed = [s.request for s in batch.segments] if batch is not None else [*scheduler.running, *scheduler.waiting]
            message = f"the batch of this request failed: {type(error).__name__}: {one_line(error)}"
            for request in failed:
                self._settle(self._ticket_of[request], ErrorEvent("internal", message))
            return
        for request in finished:
            assert request.finish_reason is not None
            self._finish(self._ticket_of[request], request.finish_reason)

    def _tell_token(self, ticket: EngineTicket, event: TokenEvent) -> None:
        self._num_output_tokens += 1
        if not ticket.has_failed:
            ticket.tell(event)

    def _finish(self, ticket: EngineTicket, reason: str) -> None:
        """End an answer where it stands; a request that is not encoded yet has an empty one."""
        request = ticket.request
        if request is None:
            answer = Answer("", [], 0, 0, 0, 0, 0.0, dict.fromkeys(STAGES, 0.0), reason)
            self._settle(ticket, FinishEvent("", reason, 0, 0, 0, answer))
            return
        try:
            if request.finish_reason is None:
                request.finish(reason)
            answer = self._engine.answer(request)
        except Exception as error:
            # What a model writes may surprise whoever reads it; the others in the batch have answers of their own.
            logger.exception("an answer could not be read")
            message = f"the answer could not be read: {type(error).__name__}: {one_line(error)}"
            self._settle(ticket, ErrorEvent("internal", message))
            return
        counts = (answer.num_prompt_tokens, answer.num_cached_tokens, answer.num_generated_tokens)
        self._settle(ticket, FinishEvent(answer.text, reason, *counts, answer, request.rest))

    def _settle(self, ticket: EngineTicket, event: FinishEvent | ErrorEvent) -> None:
        """A ticket's last event; its request leaves the engine."""
        if ticket.request is not None:
            self._engine.scheduler.remove(ticket.request)
            del self._ticket_of[ticket.request]
            # The two know each other. Cut apart, it goes now with its megabytes of pixels, and not when the circle is found.
            ticket.request.on_token, ticket.request = None, None
        with self._changed:
            del self._open[ticket]
            self._pending = deque(item for item in self._pending if item[0] is not ticket)
        ticket.is_settled = True
        if isinstance(event, FinishEvent):
            self._num_finished += 1
        else:
            self._num_failed += 1
        ticket.tell(event)


def _event_of(error: BaseException, what: str) -> ErrorEvent:
    """The end of a request that could not be encoded or decoded; what is not its own fault is logged."""
    if isinstance(error, InputError):
        return ErrorEvent("input", one_line(error))
    logger.error("a request could not be %s", what, exc_info=error)
    return ErrorEvent("internal", f"the request could not be {what}: {type(error).__name__}: {one_line(error)}")


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks."""
    return " ".join(str(error).split())
