"""`run_agent`: a model by name and an environment, step by step within a budget; for evaluation and applications.

Training samples token by token instead (`openkeye.rl`), from the same environments.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from openkeye.agents.environment import Environment
from openkeye.agents.model_client import Message, ModelClient
from openkeye.agents.tools import MAX_RESULT_CHARACTERS, cut
from openkeye.common.checks import InputError

FINISHES = ("done", "length", "turns", "tool_calls", "tokens", "seconds")


@dataclass(frozen=True)
class AgentBudget:
    """What one episode may take; the first limit that is met ends it."""

    num_turns: int = 30
    num_tool_calls: int = 100
    num_tokens: int | None = None
    # sampled, where the client counts them (`ModelReply.details["num_tokens"]`)
    seconds: float | None = None
    result_characters: int = MAX_RESULT_CHARACTERS
    # of one message of the environment; what is longer loses its middle

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise InputError(f"agent budget {name} is {value}; give a number above 0")


@dataclass(frozen=True)
class AgentEpisode:
    """One finished episode."""

    opening: tuple[Message, ...]
    transcript: tuple[Message, ...]
    # everything behind the opening
    rewards: Mapping[str, float]
    finish: str
    # of FINISHES: "done" by the environment, "length" by the model's own limit, else the part of the budget that was spent
    num_turns: int
    num_tool_calls: int
    num_tokens: int
    seconds: float

    @property
    def answer(self) -> str:
        """What the model said last, outside of calls and reasoning."""
        said = [message["content"] for message in self.transcript if message["role"] == "assistant"]
        return said[-1] if said else ""


async def run_agent(
    client: ModelClient,
    environment: Environment,
    budget: AgentBudget | None = None,
    on_message: Callable[[Message], None] | None = None,
) -> AgentEpisode:
    """Run one episode, score it, and close the environment, also when cancelled.

    Args:
        on_message: told each message behind the opening as it comes.

    Raises:
        InputError: the conversation does not fit the model.
        OSError: the model cannot be reached, or the environment broke.
    """
    episode = _Episode(client, environment, budget or AgentBudget(), on_message)
    try:
        return await episode.run()
    finally:
        await environment.close()


class _Episode:
    """What is counted while an episode runs."""

    def __init__(self, client: ModelClient, environment: Environment, budget: AgentBudget, on_message: Any) -> None:
        self.client = client
        self.environment = environment
        self.budget = budget
        self.on_message = on_message
        self.transcript: list[Message] = []
        self.num_turns = self.num_tool_calls = self.num_tokens = 0
        self.start = time.monotonic()

    async def run(self) -> AgentEpisode:
        opening = await self.environment.reset()
        finish = None
        while finish is None:
            finish = await self._turn(opening.messages, opening.tools)
        return AgentEpisode(
            opening=opening.messages,
            transcript=tuple(self.transcript),
            rewards=dict(await self.environment.score()),
            finish=finish,
            num_turns=self.num_turns,
            num_tool_calls=self.num_tool_calls,
            num_tokens=self.num_tokens,
            seconds=time.monotonic() - self.start,
        )

    async def _turn(self, opening: tuple[Message, ...], tools: tuple[Mapping[str, Any], ...]) -> str | None:
        """One message of the model and the world's answer; how the episode ended, if it did."""
        left = None if self.budget.seconds is None else self.budget.seconds - (time.monotonic() - self.start)
        timer = asyncio.timeout(left)
        try:
            async with timer:
                reply = await self.client.reply([*opening, *self.transcript], tools)
                self._note(reply.message())
                self.num_turns += 1
                self.num_tool_calls += len(reply.tool_calls)
                self.num_tokens += int(reply.details.get("num_tokens", 0))
                if reply.finish_reason == "length":
                    return "length"
                if self.num_tool_calls > self.budget.num_tool_calls:
                    return "tool_calls"
                observation = await self.environment.step(reply)
        except TimeoutError:
            if not timer.expired():
                raise
            return "seconds"
        for message in observation.messages:
            content = message.get("content")
            if isinstance(content, str):
                message = {**message, "content": cut(content, self.budget.result_characters)}
            self._note(message)
        if observation.is_done:
            return "done"
        if self.num_turns >= self.budget.num_turns:
            return "turns"
        return "tokens" if self.budget.num_tokens is not None and self.num_tokens >= self.budget.num_tokens else None

    def _note(self, message: Message) -> None:
        self.transcript.append(message)
        if self.on_message is not None:
            self.on_message(message)
