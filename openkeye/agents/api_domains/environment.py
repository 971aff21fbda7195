"""`ApiEnvironment`: one episode of a user with a wish, a model with tools, and a world behind them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from openkeye.agents.api_domains.database import Database, changes
from openkeye.agents.api_domains.goal_kinds import draw_goal
from openkeye.agents.api_domains.goals import Goal, evidence_of
from openkeye.agents.api_domains.naming import Naming, draw_naming, own_naming, tool_key
from openkeye.agents.api_domains.phrases import Phrases
from openkeye.agents.api_domains.rows import draw_database
from openkeye.agents.api_domains.schema import Action, Domain
from openkeye.agents.api_domains.scoring import CallRecord, judged, rewards
from openkeye.agents.api_domains.simulator import Outcome, run_call
from openkeye.agents.api_domains.tools import call_in_words, error_text, result_text, tool_schema, tools_in_words
from openkeye.agents.environment import Observation, Opening
from openkeye.agents.model_client import Message, ModelClient, ModelReply

SPARE_REPLIES = 4
# and calls, beyond twice the reference solution's, until an episode is cut off
CALL_PATTERN = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)


@dataclass
class ApiEnvironment:
    """Fulfils `openkeye.agents.environment.Environment`. All of it is plain data and can be pickled between two steps."""

    worlds: tuple[Domain, ...]
    # the first is the one that the goal is about; the tools of others are distractors that work
    firsts: tuple[Database, ...]
    # their first states
    goal: Goal
    tools: tuple[tuple[int, str], ...]
    # (number of the world, action) in the order shown
    naming: Naming
    is_plain: bool = False
    # short wording, tools in words, calls in the text of the reference conversation
    databases: list[Database] = field(default_factory=list)
    calls: list[CallRecord] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    num_replies: int = 0

    def __post_init__(self) -> None:
        self.databases = self.databases or [first.copy() for first in self.firsts]

    async def reset(self) -> Opening:
        """Begin, or begin again, from the same first state."""
        self.databases = [first.copy() for first in self.firsts]
        self.calls, self.answers, self.num_replies = [], [], 0
        return self.opening()

    def opening(self) -> Opening:
        """What the model sees first."""
        shown = [(self.worlds[number], self.worlds[number].actions[name]) for number, name in self.tools]
        request = self.goal.turns[0].request
        if self.is_plain:
            return Opening(({"role": "user", "content": tools_in_words(shown, self.naming) + request},))
        schemas = tuple(tool_schema(domain, action, self.naming) for domain, action in shown)
        return Opening(({"role": "user", "content": request},), schemas)

    async def step(self, reply: ModelReply) -> Observation:
        """Run the reply's calls in order; a reply without any ends the user's turn."""
        self.num_replies += 1
        reply = with_calls_of_text(reply)
        messages: list[Message] = []
        for text in reply.malformed:
            self.calls.append(CallRecord("", "", {}, "malformed"))
            error = error_text("argument", f"a call cannot be read: {text:.60}", self.is_plain)
            messages.append({"role": "user", "content": error})
        limit = 2 * (len(self.goal.calls) + len(self.goal.turns)) + SPARE_REPLIES
        for call in reply.tool_calls[: max(limit - len(self.calls), 0)]:
            content = self._run(str(call["name"]), call["arguments"])
            messages.append({"role": "tool", "tool_call_id": call.get("id", ""), "name": call["name"], "content": content})
        if not reply.tool_calls and not reply.malformed:
            self.answers.append(reply.text)
            if len(self.answers) < len(self.goal.turns):
                messages.append({"role": "user", "content": self.goal.turns[len(self.answers)].request})
        is_done = len(self.answers) == len(self.goal.turns) or max(self.num_replies, len(self.calls)) >= limit
        return Observation(tuple(messages), is_done, {"num_calls": len(self.calls), "turn": len(self.answers)})

    async def score(self) -> Mapping[str, float]:
        """See `scoring.rewards`."""
        is_elsewhere_unchanged = not any(map(changes, self.firsts[1:], self.databases[1:]))
        return rewards(
            self.worlds[0],
            self.goal,
            self.firsts[0],
            self.wanted(),
            self.databases[0],
            self.calls,
            self.answers,
            is_elsewhere_unchanged,
        )

    async def judge(self, judge: ModelClient) -> float:
        """What another model says of the final state, 0 or 1."""
        return await judged(judge, self.worlds[0], self.goal, self.firsts[0], self.wanted(), self.databases[0])

    async def close(self) -> None:
        """Nothing outside was started."""

    def wanted(self) -> Database:
        """The state that the reference solution ends in."""
        state = self.firsts[0].copy()
        for call in self.goal.calls:
            run_call(self.worlds[0], state, self.worlds[0].actions[call.action], call.arguments)
        return state

    def reference_replies(self) -> list[list[ModelReply]]:
        """The reference solution as a model would say it, turn by turn."""
        turns, number = [], 0
        for turn in self.goal.turns:
            replies = []
            for call in turn.calls:
                key = tool_key(self.worlds[0], self.worlds[0].actions[call.action])
                arguments = {self.naming.arguments[key][name]: value for name, value in call.arguments.items()}
                made = {"id": f"call_{number}", "name": self.naming.tools[key], "arguments": arguments}
                replies.append(ModelReply("", tool_calls=(made,), finish_reason="tool_calls"))
                number += 1
            turns.append([*replies, ModelReply(turn.last_words)])
        return turns

    def _run(self, name: str, given: Any) -> str:
        found = next(
            (
                (number, action)
                for number, action_name in self.tools
                for action in [self.worlds[number].actions[action_name]]
                if self.naming.tools[tool_key(self.worlds[number], action)] == name
            ),
            None,
        )
        if found is None:
            self.calls.append(CallRecord("", "", {}, "name"))
            return error_text("name", f"there is no tool {name:.40}", self.is_plain)
        number, action = found
        domain = self.worlds[number]
        outcome, arguments = self._call(number, action, given)
        evidence = evidence_of(action, arguments, outcome) if outcome.fault in ("", "refused") else ()
        self.calls.append(CallRecord(domain.name, action.name, arguments, outcome.fault, evidence))
        labels = self.naming.labels[domain.name]
        return result_text(domain, action, outcome, self.databases[number], labels, self.is_plain)

    def _call(self, number: int, action: Action, given: Any) -> tuple[Outcome, dict[str, Any]]:
        """(what came of it, the arguments in the domain's own names)."""
        domain = self.worlds[number]
        shown = self.naming.arguments[tool_key(domain, action)]
        own = {name: parameter for parameter, name in shown.items()}
        if not isinstance(given, Mapping):
            return Outcome("argument", "arguments must be a JSON object"), {}
        unknown = [name for name in given if name not in own]
        if unknown:
            error = f"no argument {unknown[0]!s:.40}; there are {', '.join(own)}"
            return Outcome("argument", error), {own.get(name, f"?{name}"): value for name, value in given.items()}
        arguments = {own[name]: value for name, value in given.items() if value is not None}
        labels = {**self.naming.labels[domain.name], **shown}
        return run_call(domain, self.databases[number], action, arguments, labels), arguments


def with_calls_of_text(reply: ModelReply) -> ModelReply:
    """The reply with the calls that stand in its text only, as they do where nobody took it apart."""
    if reply.tool_calls or reply.malformed or "<tool_call>" not in reply.text:
        return reply
    calls, malformed = [], []
    for number, text in enumerate(CALL_PATTERN.findall(reply.text)):
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = None
        if isinstance(content, dict) and isinstance(content.get("name"), str):
            calls.append({"id": f"call_{number}", "name": content["name"], "arguments": content.get("arguments", {})})
        else:
            malformed.append(text.strip())
    return replace(reply, text=CALL_PATTERN.sub("", reply.text).strip(), tool_calls=tuple(calls), malformed=tuple(malformed))


def make_environment(
    domain: Domain,
    seed: str,
    num_calls: int,
    kinds: Sequence[str],
    num_distractors: int = 0,
    decoy: Domain | None = None,
    is_renamed: bool = True,
    is_plain: bool = False,
) -> ApiEnvironment:
    """The episode of a seed: the same arguments give the same episode in every process.

    Args:
        num_calls: of the reference solution.
        kinds: of `goal_kinds.KINDS`, of which one is drawn.
        num_distractors: tools beside those that the reference solution uses: of the domain while it has any, then of `decoy`.

    Raises:
        NoGoal: the domain has no such goal at this seed.
    """
    worlds = (domain,) if decoy is None else (domain, decoy)
    firsts = tuple(draw_database(world, Random(f"{seed} rows {world.name}"), is_plain) for world in worlds)
    naming = draw_naming(worlds, Random(f"{seed} names"), is_plain) if is_renamed else own_naming(worlds)
    phrases = Phrases(domain, naming.labels[domain.name])
    goal = draw_goal(domain, firsts[0], phrases, seed, num_calls, tuple(kinds), is_plain)
    rng = Random(f"{seed} tools")
    used = list(dict.fromkeys(call.action for call in goal.calls))
    others = [(0, name) for name in domain.actions if name not in used]
    rng.shuffle(others)
    foreign = [(1, name) for name in decoy.actions] if decoy is not None else []
    rng.shuffle(foreign)
    tools = [*((0, name) for name in used), *[*others, *foreign][:num_distractors]]
    rng.shuffle(tools)
    return ApiEnvironment(worlds, firsts, goal, tuple(tools), naming, is_plain)


def reference_conversation(environment: ApiEnvironment) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(messages of the reference solution with every tool's real results, tools), for learning by imitation.

    In plain wording calls stand in the assistant's text, for chat templates that do not write `tool_calls`.
    """
    opening = environment.opening()
    copy = replace(environment, databases=[], calls=[], answers=[])
    messages = [dict(message) for message in opening.messages]
    for number, replies in enumerate(environment.reference_replies()):
        if number:
            messages.append({"role": "user", "content": environment.goal.turns[number].request})
        for reply in replies:
            message = reply.message()
            if reply.tool_calls and environment.is_plain:
                call = reply.tool_calls[0]
                message = {"role": "assistant", "content": call_in_words(call["name"], call["arguments"])}
            messages.append(message)
            for call in reply.tool_calls:
                content = copy._run(call["name"], call["arguments"])
                messages.append({"role": "tool", "tool_call_id": call["id"], "name": call["name"], "content": content})
    return messages, [dict(tool) for tool in opening.tools]
