"""`run_episode`: one example asked, turn by turn, until it is answered: token in, token out.

The policy's ids are never made again from text. What stands between its turns (results of tools, a user's next turn) is the
template's own text, appended as ids and masked. A world that breaks or hangs costs this rollout alone.

Letters: P prompt tokens, T tokens behind the prompt, L layers, K experts a token.
"""

import asyncio
import logging
import pickle
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from openkeye.agents.environment import Environment
from openkeye.agents.model_client import Message, ModelReply
from openkeye.agents.reply_parser import parse_reply
from openkeye.common.checks import InputError
from openkeye.engine.config import SamplingParameters
from openkeye.engine.recorded_answer import Picks
from openkeye.inputs.prompt import Prompt
from openkeye.rl.continuation import Continuation
from openkeye.rl.policy_engine import PartialTurn, PolicyEngine, SampledTurn, TurnInterrupted
from openkeye.rl.rollout import Rollout, RolloutId
from openkeye.tasks.task import Example, Response, Task

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpisodeLimits:
    """Where an episode ends by itself."""

    max_turns: int = 32
    # of the policy
    max_turn_tokens: int = 1024
    # of one of its turns; one that is cut ends the episode
    max_tokens: int = 8192
    # of everything behind the prompt
    step_seconds: float = 120.0
    # that the environment may take for one call
    score_seconds: float = 300.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise InputError(f"EpisodeLimits.{name} is {value}; give a number above 0")


@dataclass(frozen=True)
class EpisodeState:
    """An unfinished episode between two turns or inside one: plain data, with which `run_episode` goes on in any process."""

    id: RolloutId
    messages: tuple[Message, ...] = ()
    # an environment's opening; empty where the example has the messages
    tools: tuple[Mapping[str, Any], ...] = ()
    transcript: tuple[Message, ...] = ()
    # behind the opening
    output_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    # [T] int32, and the same length:
    is_policy: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    versions: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    routes: np.ndarray | None = None
    # [at most P + T, L, K] int16
    picks: Picks | None = None
    num_turns: int = 0
    num_calls: int = 0
    environment: bytes | None = None
    # pickled; None where there is none
    partial: PartialTurn | None = None
    # the turn under way

    @property
    def num_tokens(self) -> int:
        """Behind the prompt so far, those of the turn under way too."""
        return len(self.output_ids) + (0 if self.partial is None else len(self.partial.ids))

    @property
    def oldest_version(self) -> int | None:
        """Of the weights that sampled its oldest token; None before the first."""
        versions = self.versions[self.is_policy]
        if self.partial is not None:
            versions = np.concatenate([versions, self.partial.versions])
        return int(versions.min()) if len(versions) else None


class EpisodeInterrupted(Exception):
    """The policy was interrupted in the middle of a turn or before one; `state` goes on."""

    def __init__(self, state: EpisodeState) -> None:
        super().__init__(f"{state.id}: interrupted in turn {state.num_turns}")
        self.state = state


class _Broken(Exception):
    """An environment or a score raised, or took too long."""


OnTurn = Callable[[EpisodeState], None]


async def run_episode(
    policy: PolicyEngine,
    task: Task,
    example: Example,
    id: RolloutId,
    on_turn: OnTurn | None = None,
    *,
    sampling: SamplingParameters | None = None,
    limits: EpisodeLimits | None = None,
    state: EpisodeState | None = None,
    prompt: Prompt | None = None,
) -> Rollout:
    """Ask an example, answer tools and users until the environment is done, and score it.

    Args:
        on_turn: called after each of the policy's turns that another follows, with what the episode could go on from.
        sampling: default temperature 1; its seed, stop strings and number of tokens are not used.
        state: of an episode that goes on.
        prompt: of the opening messages, where it is laid out already: members of a group share one.

    Returns:
        The rollout with its rewards: of `Task.score` for a single answer, of `Environment.score` for an episode. Where the
        world broke or was too slow `finish_reason` is "failed", and there are no rewards.

    Raises:
        EpisodeInterrupted: by `PolicyEngine.interrupt`.
        InputError: the example cannot be asked: unreadable media, no room, a template without a place for its tools.
    """
    sampling = sampling or SamplingParameters(temperature=1.0)
    episode = _Episode(policy, task, example, sampling, limits or EpisodeLimits(), state or EpisodeState(id))
    try:
        return await episode.run(prompt, on_turn)
    finally:
        await episode.close()


class _Episode:
    def __init__(
        self,
        policy: PolicyEngine,
        task: Task,
        example: Example,
        sampling: SamplingParameters,
        limits: EpisodeLimits,
        state: EpisodeState,
    ) -> None:
        self.policy, self.task, self.example = policy, task, example
        self.sampling, self.limits, self.state = sampling, limits, state
        self.environment: Environment | None = None
        self.text = ""
        self.num_interruptions = policy.num_interruptions
        # when it began here

    async def run(self, prompt: Prompt | None, on_turn: OnTurn | None) -> Rollout:
        try:
            await self._open()
        except _Broken:
            return self._rollout(np.zeros(0, dtype=np.int32), "failed", {})
        state = self.state
        continuation = Continuation(self.policy.processor, self.policy.stop_ids, state.tools)
        prompt = prompt or await self.policy.lay_out(state.messages or self.example.messages, state.tools)
        prompt_ids = prompt.model_input.input_ids.numpy().astype(np.int32)
        try:
            reason, reply = await self._turns(prompt, continuation, on_turn)
            rewards = await self._score(reply, reason)
        except _Broken:
            return self._rollout(prompt_ids, "failed", {})
        return self._rollout(prompt_ids, reason, rewards)

    async def close(self) -> None:
        """Let the environment go, whatever it says to that."""
        if self.environment is not None:
            try:
                await _within(self.environment.close(), self.limits.step_seconds, self.state.id, "close")
            except _Broken:
                # It is told in the log; the episode's tokens are whole.
                return

    async def _open(self) -> None:
        """An environment of this episode's own, begun or gone on with."""
        state = self.state
        if self.example.environment is None:
            self.state = replace(state, tools=tuple(self.example.tools))
            return
        if state.environment is not None:
            self.environment = pickle.loads(state.environment)
            return
        # Members of a group share the example, and must not share a world.
        environment = self.environment = pickle.loads(pickle.dumps(self.example.environment))
        opening = await _within(environment.reset(), self.limits.step_seconds, state.id, "reset")
        self.state = replace(state, messages=tuple(opening.messages), tools=tuple(opening.tools))

    async def _turns(self, prompt: Prompt, continuation: Continuation, on_turn: OnTurn | None) -> tuple[str, ModelReply]:
        """All turns; returns why the last one ended and what it said."""
        reply = ModelReply("", finish_reason="length")
        while (room := self._room(prompt)) > 0 and self.state.num_turns < self.limits.max_turns:
            if self.policy.was_interrupted(self.state.id, self.num_interruptions):
                raise EpisodeInterrupted(self._with_environment())
            reply = await self._turn(prompt, room)
            if reply.finish_reason == "length":
                return "length", reply
            if self.environment is None:
                return "stop", reply
            before = [*self.state.messages, *self.state.transcript[:-1]]
            step = self.environment.step(reply)
            observation = await _within(step, self.limits.step_seconds, self.state.id, "step")
            transcript = (*self.state.transcript, *observation.messages)
            if observation.is_done:
                self.state = replace(self.state, transcript=transcript)
                return "stop", reply
            if not observation.messages:
                logger.error("%s: the environment is not done and says nothing", self.state.id)
                raise _Broken
            between = continuation.ids_behind(before, reply, observation.messages)
            if len(between) >= self._room(prompt):
                return "length", reply
            self.state = replace(self.state, transcript=transcript)
            self._append(between)
            if on_turn is not None:
                on_turn(self._with_environment())
        return "length", reply

    def _room(self, prompt: Prompt) -> int:
        """Tokens that the next turn may have."""
        num_tokens, context = len(self.state.output_ids), self.policy.processor.max_tokens
        room = min(self.limits.max_turn_tokens, self.limits.max_tokens - num_tokens)
        return room if context is None else min(room, context - prompt.num_tokens - num_tokens)

    async def _turn(self, prompt: Prompt, room: int) -> ModelReply:
        """The policy's next turn, added to the state."""
        state = self.state
        sampling = replace(self.sampling, max_new_tokens=room, stop=())
        try:
            turn = await self.policy.sample(prompt, sampling, state.id, given_ids=state.output_ids, partial=state.partial)
        except TurnInterrupted as interrupted:
            self.state = replace(state, partial=interrupted.partial)
            raise EpisodeInterrupted(self._with_environment()) from None
        said = turn.ids[:-1] if turn.finish_reason == "stop" else turn.ids
        self.text = self.policy.processor.decode(said.tolist())
        reply = parse_reply(self.text, turn.finish_reason, state.num_calls)
        self.state = replace(
            state,
            num_turns=state.num_turns + 1,
            num_calls=state.num_calls + len(reply.tool_calls),
            transcript=(*state.transcript, reply.message()),
            partial=None,
            routes=_joined_routes(state.routes, turn.routes),
            picks=turn.picks if state.picks is None else state.picks.joined(turn.picks),
        )
        self._append(turn.ids, turn)
        return replace(reply, details={"num_tokens": len(turn.ids)})

    def _append(self, ids: "np.ndarray | list[int]", turn: SampledTurn | None = None) -> None:
        """More tokens: the policy's own turn, or what stands behind it."""
        state, count = self.state, len(ids)
        logprobs = np.zeros(count) if turn is None else turn.logprobs
        versions = np.full(count, -1) if turn is None else turn.versions
        self.state = replace(
            state,
            output_ids=np.concatenate([state.output_ids, np.asarray(ids, dtype=np.int32)]),
            is_policy=np.concatenate([state.is_policy, np.full(count, turn is not None)]),
            logprobs=np.concatenate([state.logprobs, logprobs.astype(np.float32)]),
            versions=np.concatenate([state.versions, versions.astype(np.int32)]),
        )

    async def _score(self, reply: ModelReply, reason: str) -> Mapping[str, float]:
        if self.environment is not None:
            score: Awaitable[Mapping[str, float]] = self.environment.score()
        else:
            num_tokens = int(self.state.is_policy.sum())
            score = self.task.score(self.example, Response(reply.text, reply.reasoning, reason, num_tokens))
        rewards = await _within(score, self.limits.score_seconds, self.state.id, "score")
        return {name: float(value) for name, value in rewards.items()}

    def _with_environment(self) -> EpisodeState:
        """The state as it can leave this process."""
        return replace(self.state, environment=None if self.environment is None else pickle.dumps(self.environment))

    def _rollout(self, prompt_ids: np.ndarray, reason: str, rewards: Mapping[str, float]) -> Rollout:
        state, routes = self.state, self.state.routes
        if routes is not None:
            num_unknown = len(prompt_ids) + len(state.output_ids) - len(routes)
            routes = np.concatenate([routes, np.full((num_unknown, *routes.shape[1:]), -1, dtype=np.int16)])
        arrays = (state.output_ids, state.is_policy, state.logprobs, state.versions)
        return Rollout(state.id, prompt_ids, *arrays, routes, reason, rewards, self.text, state.picks)


async def _within(work: Awaitable[Result], seconds: float, id: RolloutId, what: str) -> Result:
    """What an environment or a score says, in time."""
    try:
        return await asyncio.wait_for(work, seconds)
    except TimeoutError:
        logger.warning("%s: %s took more than %g s", id, what, seconds)
    except Exception:
        # Worlds and scores are others' code, which may raise anything; it costs this rollout, and no other.
        logger.exception("%s: %s failed", id, what)
    raise _Broken


def _joined_routes(known: np.ndarray | None, routes: np.ndarray | None) -> np.ndarray | None:
    """Of all tokens so far; those of earlier turns stay, by which their successors were sampled."""
    if known is None or routes is None:
        return routes
    joined = routes.copy()
    joined[: len(known)] = np.where(known >= 0, known, joined[: len(known)])
    return joined
