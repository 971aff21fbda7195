"""Named rewards of an episode, from its database and its calls alone."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openkeye.agents.api_domains.database import Database, changes, compare_states
from openkeye.agents.api_domains.goals import Goal
from openkeye.agents.api_domains.schema import Domain
from openkeye.agents.model_client import ModelClient


@dataclass(frozen=True)
class CallRecord:
    """One call that the model made."""

    domain: str
    action: str
    # empty where there is no such tool
    arguments: Mapping[str, Any]
    # in the domain's own names
    fault: str = ""
    # of `simulator.FAULTS`, or "malformed"
    evidence: tuple[str, ...] = ()

    @property
    def is_valid(self) -> bool:
        """A real tool with arguments that it takes; a rule may still forbid it."""
        return self.fault in ("", "refused")


def rewards(
    domain: Domain,
    goal: Goal,
    first: Database,
    wanted: Database,
    got: Database,
    calls: Sequence[CallRecord],
    answers: Sequence[str],
    is_elsewhere_unchanged: bool,
) -> dict[str, float]:
    """Rewards by name.

    call_validity: share of calls to real tools with arguments of the right names, types and existing rows; 0 without calls.
    argument_consistency: share of the reference's arguments that the model gave to the same tools.
    post_conditions: share of the demanded changes and answers that hold.
    outcome: 1 where all of them hold, nothing else is changed and what had to be seen or tried was, else 0.
    excess_calls: calls beyond the reference's number; a count, to be weighted below zero.

    Args:
        answers: what the model said at the end of each turn.
        is_elsewhere_unchanged: whether other worlds of the episode are as they were.
    """
    held, demanded, is_same = compare_states(first, wanted, got)
    asked = [(number, turn.answer) for number, turn in enumerate(goal.turns) if turn.answer]
    seen = {item for call in calls if call.domain == domain.name for item in call.evidence}
    # Words count only where what they speak of was done, and seen or tried.
    is_known = held == demanded and set(goal.evidence) <= seen
    right = sum(is_known and number < len(answers) and is_answer(answers[number], truth) for number, truth in asked)
    is_outcome = is_same and is_known and right == len(asked) and is_elsewhere_unchanged
    return {
        "outcome": float(is_outcome),
        "post_conditions": (held + right) / max(demanded + len(asked), 1),
        "call_validity": sum(call.is_valid for call in calls) / len(calls) if calls else 0.0,
        "argument_consistency": argument_consistency(domain, goal, calls),
        "excess_calls": float(max(len(calls) - len(goal.calls), 0)),
    }


def argument_consistency(domain: Domain, goal: Goal, calls: Sequence[CallRecord]) -> float:
    """Each reference call takes the best of the model's calls to the same tool that is left; mean share of equal arguments."""
    left = [call for call in calls if call.domain == domain.name and call.is_valid]
    total = 0.0
    for wanted in goal.calls:
        scored = [
            (_agreement(wanted.arguments, call.arguments), -number)
            for number, call in enumerate(left)
            if call.action == wanted.action
        ]
        if scored:
            share, number = max(scored)
            total += share
            del left[-number]
    return total / len(goal.calls)


def is_answer(text: str, truth: str) -> bool:
    """The answer alone, in any case, with or without quotes, a full stop or `Answer:` before it."""
    return _bare(text) == _bare(truth)


def _bare(text: str) -> str:
    last = re.split(r"(?i)\banswer:", text)[-1]
    bare = last.strip().strip("\"'`*. \n").casefold()
    try:
        return f"{float(bare):g}" if re.fullmatch(r"\d+(\.\d+)?", bare) else bare
    except ValueError:
        return bare


def _agreement(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> float:
    names = {*wanted, *given}
    return (
        sum(name in wanted and name in given and wanted[name] == given[name] for name in names) / len(names) if names else 1.0
    )


JUDGE_TASK = (
    "A user of {title} asked:\n{requests}\n\nThese cells of the database were changed:\n{changes}\n\nReference changes:\n"
    "{wanted}\n\nDoes the final state fulfil what was asked, and nothing beyond it? Answer yes or no."
)


async def judged(judge: ModelClient, domain: Domain, goal: Goal, first: Database, wanted: Database, got: Database) -> float:
    """1 where the judge says yes of the final state, 0 where it says anything else.

    Raises:
        OSError: the judge cannot be reached.
    """
    text = JUDGE_TASK.format(
        title=domain.title,
        requests="\n".join(turn.request for turn in goal.turns),
        changes=_listed(first, got),
        wanted=_listed(first, wanted),
    )
    reply = await judge.reply([{"role": "user", "content": text}])
    return float(bool(re.match(r"\W*yes\b", reply.text, re.IGNORECASE)))


def _listed(before: Database, after: Database) -> str:
    lines = sorted(f"{entity} {key} {name}: {value}" for entity, key, name, value in changes(before, after))
    return "\n".join(lines) or "none"
