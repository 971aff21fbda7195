"""`/v1/chat/completions`: from a request's bytes to an answer, whole or streamed."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from openkeye.apps.http_api.body import read_json_body
from openkeye.apps.http_api.chat_request import ChatRequest, engine_messages, parse_chat_request
from openkeye.apps.http_api.chat_response import ChatResponse
from openkeye.apps.http_api.errors import CLIENT_HAS_GONE, CRASHED, ENGINE_IS_AWAY, ApiError
from openkeye.apps.http_api.limits import ServerLimits
from openkeye.apps.http_api.media_rules import MediaRules
from openkeye.apps.http_api.metrics import Metrics
from openkeye.engine.events import ErrorEvent, Event, FinishEvent, TokenEvent
from openkeye.inputs.answer_parser import AnswerParser, Piece
from openkeye.inputs.processor import Processor

if TYPE_CHECKING:
    from openkeye.engine.answering import AnsweringService, Ticket

NUM_MEDIA_THREADS = 8
# requests whose files are looked up or fetched at once

PROBE_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
}


class EventQueue:
    """A request's events, carried from the engine's threads to the event loop, with figures taken on the way."""

    def __init__(self, arrived: float, metrics: Metrics) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._metrics = metrics
        self._last_told = arrived
        self._has_tokens = False

    def put(self, event: Event) -> None:
        """Called by the service, from threads of its own."""
        if isinstance(event, TokenEvent):
            now = time.monotonic()
            histogram = self._metrics.token_seconds if self._has_tokens else self._metrics.first_token_seconds
            histogram.observe(now - self._last_told)
            self._last_told, self._has_tokens = now, True
        # (a closed loop: the server has ended and nobody waits)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def next(self) -> Event:
        """The next event; the last one is a FinishEvent or an ErrorEvent."""
        return await self._queue.get()


class ChatEndpoint:
    """An ASGI application for one route, so that what a request holds is given back whatever becomes of its answer."""

    def __init__(
        self,
        service: "AnsweringService",
        processor: Processor,
        model_name: str,
        rules: MediaRules,
        limits: ServerLimits,
        metrics: Metrics,
    ) -> None:
        self.service = service
        self.processor = processor
        self.model_name = model_name
        self.rules = rules
        self.limits = limits
        self.metrics = metrics
        self.num_open = 0
        self.media_threads: CapacityLimiter | None = None
        # made on the event loop that uses it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; ApiError for those that get no answer."""
        if self.num_open >= self.limits.max_concurrent:
            raise ApiError(429, f"{self.num_open} requests are under way, as many as this server takes; try again later")
        self.num_open += 1
        try:
            await self._answer(Request(scope, receive), scope, receive, send)
        finally:
            self.num_open -= 1

    async def _answer(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        arrived = time.monotonic()
        if not self.service.is_alive:
            raise ApiError(503, ENGINE_IS_AWAY)
        body = await read_json_body(request, self.limits)
        chat = await run_sync(parse_chat_request, body)
        del body
        if chat.model != self.model_name:
            raise ApiError(404, f"no model {chat.model!r:.80}; this server has {self.model_name}", "model", "model_not_found")
        sampling = chat.sampling(self.limits.max_answer_tokens, self.limits.default_answer_tokens)
        options = self._template_options(chat)
        messages = await self._messages(chat)
        events = EventQueue(arrived, self.metrics)
        asked = (self.limits.deadline_seconds, options, bool(chat.evidence))
        ticket = self.service.submit(messages, sampling, events.put, *asked)
        # While the answer is written, nobody here needs its data URLs.
        del messages
        chat.messages.clear()
        watcher = asyncio.create_task(_cancel_when_gone(request, ticket))
        try:
            response = await self._response(chat, events)
            await response(scope, receive, send)
        finally:
            watcher.cancel()
            ticket.cancel()

    async def _messages(self, chat: ChatRequest) -> list[dict[str, Any]]:
        if self.media_threads is None:
            self.media_threads = CapacityLimiter(NUM_MEDIA_THREADS)
        factor = self.processor.image_limits.factor
        return await run_sync(engine_messages, chat, self.rules.read, factor * factor, limiter=self.media_threads)

    def _template_options(self, chat: ChatRequest) -> dict[str, Any]:
        """What the chat template is given beside the messages; ApiError for tools that it would leave out without a word."""
        tools = chat.template_tools()
        if tools and not self._can_take_tools:
            message = "the chat template of this model has no place for tools; leave them out or describe them in words"
            raise ApiError(400, f"tools: {message}", "tools")
        return {"tools": tools} if tools else {}

    @cached_property
    def _can_take_tools(self) -> bool:
        """Whether the prompt changes with a tool."""
        render, messages = self.processor.template.render, [{"role": "user", "content": "x"}]
        return render(messages, tools=[PROBE_TOOL]) != render(messages)

    async def _response(self, chat: ChatRequest, events: EventQueue) -> Response:
        """Once the first event is there, since an error has an HTTP status only before the answer begins."""
        parser = AnswerParser(chat.takes_tool_calls)
        writer = ChatResponse(self.model_name, self._token_text)
        first = await events.next()
        if isinstance(first, ErrorEvent):
            raise self._error(first)
        if chat.stream:
            chunks = self._stream(chat, first, events, parser, writer)
            return StreamingResponse(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        pieces: list[Piece] = []
        tokens: list[TokenEvent] = []
        event: Event = first
        while isinstance(event, TokenEvent):
            pieces += parser.feed(event.text)
            tokens.append(event)
            event = await events.next()
        if isinstance(event, ErrorEvent):
            raise self._error(event)
        _check_came_to_something(event)
        pieces += [*parser.feed(event.rest), *parser.finish()]
        return JSONResponse(writer.whole(pieces, tokens if chat.logprobs else None, event))

    async def _stream(
        self, chat: ChatRequest, first: Event, events: EventQueue, parser: AnswerParser, writer: ChatResponse
    ) -> AsyncIterator[bytes]:
        """Server-sent events: a chunk for every piece of the answer, then `[DONE]`."""
        has_usage = chat.stream_options is not None and chat.stream_options.include_usage
        more: dict[str, Any] = {"usage": None} if has_usage else {}
        yield _event(writer.role_chunk() | more)
        event = first
        while isinstance(event, TokenEvent):
            for chunk in writer.piece_chunks(parser.feed(event.text), [event] if chat.logprobs else None):
                yield _event(chunk | more)
            event = await events.next()
        if isinstance(event, ErrorEvent):
            yield _event(self._error(event).body())
            return
        for chunk in writer.piece_chunks([*parser.feed(event.rest), *parser.finish()], None):
            yield _event(chunk | more)
        yield _event(writer.finish_chunk(event) | more)
        if has_usage:
            yield _event(writer.usage_chunk(event))
        yield b"data: [DONE]\n\n"

    def _token_text(self, token_id: int) -> str:
        return self.processor.decode([token_id], skip_special_tokens=False)

    def _error(self, event: ErrorEvent) -> ApiError:
        message = self.rules.public_message(event.message)
        if event.kind == "internal":
            return ApiError(500, CRASHED)
        return ApiError({"input": 400, "full": 429, "stopped": 503}[event.kind], message)


async def _cancel_when_gone(request: Request, ticket: "Ticket") -> None:
    """The body has been read: all that may still come from the client is that it leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    ticket.cancel()


def _check_came_to_something(finish: FinishEvent) -> None:
    if finish.finish_reason == "cancelled":
        raise ApiError(CLIENT_HAS_GONE, "the client closed the connection")
    if finish.finish_reason == "deadline" and finish.num_output_tokens == 0:
        raise ApiError(503, "the answer did not begin within the server's time limit; ask later or about a shorter part")


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'), allow_nan=False)}\n\n".encode()
