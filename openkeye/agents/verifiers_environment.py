"""Environments of the `verifiers` package (0.4) as ours.

There an environment runs a whole episode and asks a model over HTTP, as OpenAI's chat API has it. Here it runs beside us, and
the model that it asks is a small server of this process: each question waits there until `step` brings the answer.
"""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from openkeye.agents.environment import Observation, Opening
from openkeye.agents.model_client import Message, ModelReply
from openkeye.common.checks import InputError

MODEL = "policy"


class VerifiersError(OSError):
    """The environment broke, or does what cannot be learnt from, such as rewriting what was said."""


def check_verifiers_is_installed() -> None:
    """InputError that says how to install the package where it is missing."""
    try:
        import verifiers.v1  # noqa: F401
    except ImportError as error:
        raise InputError("these environments need the package verifiers, 0.4: pip install 'verifiers>=0.4,<0.5'") from error


class _Endpoint:
    """The model that the environment asks: questions wait for answers."""

    def __init__(self) -> None:
        self.questions: asyncio.Queue[tuple[dict[str, Any], asyncio.Future[dict[str, Any]]]] = asyncio.Queue()
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"

    async def serve(self) -> None:
        """Until cancelled."""
        import uvicorn
        from starlette.applications import Starlette
        from starlette.requests import Request
        from starlette.responses import JSONResponse
        from starlette.routing import Route

        async def answer(request: Request) -> JSONResponse:
            body = await request.json()
            if body.get("stream"):
                message = "this model answers whole, not in a stream"
                return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, 400)
            waiting: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
            self.questions.put_nowait((body, waiting))
            return JSONResponse(await waiting)

        class Quiet(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                # Signals are the process's own affair.
                yield

        app = Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])
        await Quiet(uvicorn.Config(app, log_config=None, log_level="critical", lifespan="off")).serve([self.socket])


class VerifiersEnvironment:
    """One episode of one task of a `verifiers` environment.

    Pickled, it is how the environment is made, the task's number and the replies so far: elsewhere the episode is played again
    up to there, which an environment that answers differently each time does not stand.

    Attributes:
        make: makes the `verifiers.v1.Env`; a function that can be pickled.
        number: of the task in its taskset.
        seconds: that the environment may take for its part of one turn.
    """

    def __init__(self, make: Callable[[], Any], number: int = 0, seconds: float = 600.0) -> None:
        check_verifiers_is_installed()
        self.make = make
        self.number = number
        self.seconds = seconds
        self.replies: list[ModelReply] = []
        self.rewards: dict[str, float] | None = None
        # once the episode is over
        self._forget()

    def _forget(self) -> None:
        self._messages: list[Message] = []
        self._endpoint: _Endpoint | None = None
        self._waiting: asyncio.Future[dict[str, Any]] | None = None
        self._tasks: list[asyncio.Task[Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_messages": [], "_endpoint": None, "_waiting": None, "_tasks": []}

    async def reset(self) -> Opening:
        await self.close()
        self.replies, self.rewards = [], None
        body = await self._begin()
        if body is None:
            raise VerifiersError("verifiers: the episode ended before the model was asked")
        return Opening(tuple(self._messages), tuple(body.get("tools") or ()))

    async def step(self, reply: ModelReply) -> Observation:
        if self.rewards is not None:
            return Observation(is_done=True, details={"error": "the episode is over"})
        if self._waiting is None:
            replies = self.replies
            await self._begin()
            for earlier in replies:
                await self._answer(earlier)
        before = len(self._messages) + 1
        self.replies = [*self.replies, reply]
        body = await self._answer(reply)
        return Observation(tuple(self._messages[before:]) if body else (), is_done=body is None)

    async def score(self) -> Mapping[str, float]:
        """The environment's own rewards by name, and their weighted sum, cut to 0..1, as "outcome"."""
        return self.rewards if self.rewards is not None else {"outcome": 0.0}

    async def close(self) -> None:
        tasks = self._tasks
        self._forget()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _begin(self) -> dict[str, Any] | None:
        endpoint = self._endpoint = _Endpoint()
        self._tasks = [asyncio.create_task(endpoint.serve()), asyncio.create_task(self._play(endpoint.url))]
        return await self._next()

    async def _play(self, url: str) -> Any:
        """The whole episode, as verifiers runs it."""
        import itertools

        from verifiers.v1 import EvalClientConfig, ModelContext

        env = self.make()
        task = next(itertools.islice(iter(env.taskset), self.number, None), None)
        if task is None:
            raise InputError(f"verifiers: there is no task {self.number} in this taskset")
        # A variable that nobody has: the key is for this process's own server.
        client = EvalClientConfig(base_url=url, api_key_var="OPENKEYE_NO_KEY")
        try:
            async with env.serving():
                return await env.run_episode(task, ModelContext(model=MODEL, client=client))
        except SystemExit as error:
            # So it ends where a service of its makers is asked for without an account.
            raise VerifiersError(f"verifiers: {error}") from error

    async def _answer(self, reply: ModelReply) -> dict[str, Any] | None:
        assert self._waiting is not None
        message = reply.message()
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        finish = "tool_calls" if reply.tool_calls else reply.finish_reason
        usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        self._waiting.set_result(
            {
                "id": f"turn-{len(self._messages)}",
                "object": "chat.completion",
                "created": int(time.time()),
                "model": MODEL,
                "choices": [{"index": 0, "message": message, "finish_reason": finish}],
                "usage": usage,
            }
        )
        return await self._next()

    async def _next(self) -> dict[str, Any] | None:
        """The next question to the model, or None at the end of the episode, which then has its rewards.

        Raises:
            VerifiersError: the episode broke, took too long, or rewrote what was said.
        """
        assert self._endpoint is not None
        episode = self._tasks[1]
        question = asyncio.create_task(self._endpoint.questions.get())
        self._tasks.append(question)
        await asyncio.wait({question, *self._tasks[:2]}, timeout=self.seconds, return_when=asyncio.FIRST_COMPLETED)
        self._tasks.remove(question)
        if question.done():
            body, self._waiting = question.result()
            messages = body["messages"]
            known = len(self._messages)
            if [message["role"] for message in messages[:known]] != [message["role"] for message in self._messages]:
                raise VerifiersError("verifiers: the environment rewrites what was said, which cannot be learnt by token")
            self._messages = messages
            return dict(body)
        question.cancel()
        if not episode.done():
            raise VerifiersError(f"verifiers: no turn within {self.seconds:g} s")
        self.rewards = _rewards(episode.result())
        return None


def _rewards(episode: Any) -> dict[str, float]:
    errors = [error for trace in episode.traces for error in trace.errors] + list(episode.errors)
    if errors:
        raise VerifiersError(f"verifiers: {errors[-1].type} {errors[-1].message:.500}")
    trace = episode.traces[0]
    named = {name: float(reward.score) for name, reward in trace.rewards.items() if reward is not None}
    return {**named, "outcome": min(1.0, max(0.0, float(trace.reward)))}
