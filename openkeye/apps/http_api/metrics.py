"""What `/metrics` tells Prometheus."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from openkeye.engine.answering import AnsweringService


FIRST_TOKEN_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
# upper bounds, seconds


class _ServiceFigures(Collector):
    """Reads the engine's own counts at the moment somebody asks."""

    def __init__(self, service: "AnsweringService") -> None:
        self.service = service

    def collect(self) -> Iterator[Metric]:
        stats = self.service.stats()
        yield GaugeMetricFamily("openkeye_alive", "1 while the engine runs", float(self.service.is_alive))
        yield GaugeMetricFamily("openkeye_requests_waiting", "Requests that wait for the engine", stats.num_waiting)
        yield GaugeMetricFamily("openkeye_requests_running", "Requests that the engine works on", stats.num_running)
        yield GaugeMetricFamily("openkeye_pages", "Cache pages in all", stats.num_pages)
        yield GaugeMetricFamily("openkeye_pages_free", "Cache pages that nobody holds", stats.num_free_pages)
        yield CounterMetricFamily("openkeye_requests_finished", "Requests that the engine answered", stats.num_finished)
        yield CounterMetricFamily("openkeye_requests_failed", "Requests that the engine gave an error", stats.num_failed)
        yield CounterMetricFamily(
            "openkeye_engine_restarts", "How often the engine's process was started again", stats.num_restarts
        )
        yield CounterMetricFamily("openkeye_prompt_tokens", "Tokens of all prompts", stats.num_prompt_tokens)
        yield CounterMetricFamily("openkeye_output_tokens", "Tokens of all answers", stats.num_output_tokens)


class Metrics:
    """Counts of one server."""

    def __init__(self, service: "AnsweringService") -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_ServiceFigures(service))
        self.requests = Counter(
            "openkeye_http_requests", "HTTP requests by route and status", ["route", "status"], registry=self.registry
        )
        self.first_token_seconds = Histogram(
            "openkeye_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.token_seconds = Histogram(
            "openkeye_time_per_output_token_seconds",
            "From one token of an answer to the next",
            buckets=TOKEN_BUCKETS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """Everything in Prometheus' text format. Asks the engine's process, so it may block for a moment."""
        return generate_latest(self.registry)


class RequestCount:
    """Counts every answer of the application within."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str]) -> None:
        self.app = app
        self.metrics = metrics
        self.routes = routes
        # Other paths count as one: strangers must not be able to make up labels.

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in self.routes else "other"

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counting_send)
