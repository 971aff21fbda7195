"""What callers of an engine hold, wherever it runs: on a thread here (`service.py`) or in a worker (`worker_service.py`).

Nothing here imports PyTorch: a process that only passes requests on stays small.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from openkeye.engine.config import SamplingParameters
from openkeye.engine.events import Event

Message = Mapping[str, Any]
OnEvent = Callable[[Event], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServiceStats:
    """What a service does now, and totals since its start."""

    num_waiting: int
    # encoding, or in the queue
    num_running: int
    num_finished: int
    # ended with a FinishEvent, cancelled ones too
    num_failed: int
    # ended with an ErrorEvent
    num_prompt_tokens: int
    num_output_tokens: int
    num_free_pages: int
    # those that the prefix cache would give up too
    num_pages: int
    # 0 while there is no engine
    num_restarts: int = 0
    # how often the engine's process was started again


class Ticket:
    """One submitted request, in its caller's hands."""

    def __init__(self, on_event: OnEvent, on_cancel: Callable[["Ticket"], None]) -> None:
        self.is_cancelled = False
        self.is_settled = False
        # its last event is out
        self.has_failed = False
        # its callback raised
        self._on_event = on_event
        self._on_cancel = on_cancel

    def cancel(self) -> None:
        """End the request wherever it stands, with a FinishEvent unless it has ended before. Safe on any thread.

        Its pages are free before the next batch.
        """
        self.is_cancelled = True
        self._on_cancel(self)

    def tell(self, event: Event) -> None:
        """Call the caller; what the call raises is logged and ends this request alone."""
        try:
            self._on_event(event)
        except Exception:
            # A caller's own code may raise anything, and must not end what others wait for.
            logger.exception("the callback of a request raised")
            self.has_failed = True


class AnsweringService(Protocol):
    """An engine that many callers share."""

    @property
    def is_alive(self) -> bool:
        """Whether requests are served at this moment."""

    def submit(
        self,
        messages: Sequence[Message],
        sampling: SamplingParameters,
        on_event: OnEvent,
        deadline_seconds: float | None = None,
        template_options: Mapping[str, Any] | None = None,
        evidence: bool = False,
    ) -> Ticket:
        """Ask for an answer; see `EngineService.submit`."""

    def stats(self) -> ServiceStats:
        """A view of this moment; may take a second where the engine is in another process."""
