"""What crosses the pipe between a `WorkerService` and its worker process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openkeye.engine.answering import Message, ServiceStats
from openkeye.engine.config import SamplingParameters
from openkeye.engine.events import Event

if TYPE_CHECKING:
    from openkeye.engine.loop import Engine

OpenEngine = Callable[[], "Engine"]

# To the worker:


@dataclass(frozen=True)
class Opening:
    """The first record: which engine."""

    open_engine: OpenEngine
    max_queue: int


@dataclass(frozen=True)
class Submission:
    """A request; numbers are never used twice."""

    number: int
    messages: Sequence[Message]
    sampling: SamplingParameters
    options: dict[str, Any]
    # others of `EngineService.submit`


@dataclass(frozen=True)
class Cancellation:
    """Its caller lost interest."""

    number: int


@dataclass(frozen=True)
class StatsQuestion:
    """Asks for `StatsAnswer`."""

    number: int


# From the worker:


@dataclass(frozen=True)
class Ready:
    """The engine is open; requests may come."""


@dataclass(frozen=True)
class Refusal:
    """The engine cannot be opened, by the user's fault: the one line of the `InputError`."""

    message: str


@dataclass(frozen=True)
class RequestEvent:
    """An event of one request."""

    number: int
    event: Event


@dataclass(frozen=True)
class StatsAnswer:
    """Answers the question of the same number."""

    number: int
    stats: ServiceStats
