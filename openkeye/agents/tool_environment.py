"""What environments of tools share: calls are answered, counted and limited; a message without calls ends the episode."""

import json
import pickle
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from openkeye.agents.environment import Observation, Opening
from openkeye.agents.model_client import Message, ModelReply
from openkeye.agents.tools import MAX_RESULT_CHARACTERS, CallOutcome, Tool, answer_calls
from openkeye.common.checks import InputError


@dataclass
class CallCounts:
    """How the calls of an episode went."""

    turns: int = 0
    calls: int = 0
    wrong: int = 0
    # unknown tools, arguments that do not fit, what cannot be done
    malformed: int = 0
    # pieces that cannot be read as calls
    last_text: str = ""
    # of the model's last message
    is_last_a_call: bool = False
    # the last message called something, so that it is no answer
    outcomes: list[CallOutcome] = field(default_factory=list)

    @property
    def valid_share(self) -> float:
        """Of all attempts to call; 1 where there were none."""
        attempts = self.calls + self.malformed
        return 1.0 if attempts == 0 else (self.calls - self.wrong) / attempts


class ToolEnvironment(ABC):
    """An environment over tools. Those that hold state beside give `begin` and `tools`, and add to `score`.

    Everything it holds can be pickled between two steps: tools are made anew at each of them.
    """

    def __init__(
        self, messages: Sequence[Message], max_turns: int = 30, max_result_characters: int = MAX_RESULT_CHARACTERS
    ) -> None:
        if max_turns < 1 or max_result_characters < 1:
            raise InputError(f"{max_turns} turns, {max_result_characters} characters a result: give 1 or more")
        self.messages = tuple(messages)
        self.max_turns = max_turns
        self.max_result_characters = max_result_characters
        self.counts = CallCounts()
        self.is_done = False

    async def begin(self) -> None:  # noqa: B027 (a hook, which most worlds do without)
        """Make the world's first state."""

    @abstractmethod
    async def tools(self) -> Sequence[Tool]:
        """What the model may call now."""

    async def reset(self) -> Opening:
        self.counts = CallCounts()
        self.is_done = False
        await self.begin()
        return Opening(self.messages, tuple(tool.schema() for tool in await self.tools()))

    async def step(self, reply: ModelReply) -> Observation:
        counts = self.counts
        if self.is_done:
            return Observation(is_done=True, details={"error": "the episode is over"})
        counts.turns += 1
        counts.last_text = reply.text
        counts.is_last_a_call = bool(reply.tool_calls or reply.malformed)
        messages, outcomes = await answer_calls(await self.tools(), reply, self.max_result_characters)
        counts.calls += len(outcomes)
        counts.wrong += sum(not outcome.is_valid for outcome in outcomes)
        counts.malformed += len(reply.malformed)
        counts.outcomes += outcomes
        self.is_done = not messages or counts.turns >= self.max_turns
        return Observation(messages, self.is_done, {"turn": counts.turns, "wrong": counts.wrong})

    async def score(self) -> Mapping[str, float]:
        return {"valid_calls": self.counts.valid_share}

    async def close(self) -> None:  # noqa: B027 (the same)
        """Nothing is held outside."""


async def score_transcript(environment: ToolEnvironment, transcript: Sequence[Message]) -> Mapping[str, float]:
    """Rewards of an episode from what was said in it: a copy of the environment goes through it again.

    An environment that has just been through it answers itself, with the same rewards.
    """
    said = [message for message in transcript if message["role"] == "assistant"]
    if environment.counts.turns == len(said):
        return await environment.score()
    copy: ToolEnvironment = pickle.loads(pickle.dumps(environment))
    try:
        await copy.reset()
        for message in said:
            await copy.step(reply_of(message))
        return await copy.score()
    finally:
        await copy.close()


def reply_of(message: Message) -> ModelReply:
    """The reply behind an assistant's message (the other way round: `ModelReply.message`)."""
    calls = []
    malformed = []
    for call in message.get("tool_calls") or ():
        arguments = call["function"]["arguments"]
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except json.JSONDecodeError:
            malformed.append(arguments)
            continue
        calls.append({"id": call.get("id", ""), "name": call["function"]["name"], "arguments": arguments})
    text = message.get("content") or ""
    return ModelReply(text, message.get("reasoning_content", ""), tuple(calls), malformed=tuple(malformed))


class FixedTools(ToolEnvironment):
    """An environment of given tools and no other state: for applications and evaluation, where only the answer counts."""

    def __init__(self, messages: Sequence[Message], given: Sequence[Tool], **options: Any) -> None:
        super().__init__(messages, **options)
        self.given = tuple(given)

    async def tools(self) -> Sequence[Tool]:
        return self.given
