"""Goals: what a user wants in one or more turns, and the reference solution, drawn from a domain's schema alone.

A drawer tries calls on a copy of the database until one does what the goal needs (succeeds, or is refused by a rule), so that
every reference solution is one that ran.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from random import Random
from typing import Any

from openkeye.agents.api_domains.database import Database, changes
from openkeye.agents.api_domains.phrases import Phrases
from openkeye.agents.api_domains.schema import CREATES, Action, Domain
from openkeye.agents.api_domains.simulator import Outcome, run_call
from openkeye.agents.api_domains.values import draw, show

NUM_TRIES = 12
# of arguments for one action
MAX_AMOUNT = 12
# of additions, removals and transfers, in whole units, so that many are possible
ORDINALS = ("first", "second", "third", "fourth", "fifth")


@dataclass(frozen=True)
class Call:
    """One call, in the domain's own names."""

    action: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Turn:
    """What the user says, what is to be done, and what the model should say then."""

    request: str
    calls: tuple[Call, ...] = ()
    answer: str = ""
    # what the model must say then; empty where words do not count
    reply: str = "done"
    # the last words of the reference solution where there is no answer

    @property
    def last_words(self) -> str:
        """The last words of the reference solution."""
        return self.answer or self.reply


@dataclass(frozen=True)
class Goal:
    """One goal in one world."""

    kind: str
    # of `goal_kinds.KINDS`
    turns: tuple[Turn, ...]
    evidence: tuple[str, ...] = ()
    # of `evidence_of`: what must have been seen or tried before an answer counts

    @property
    def calls(self) -> tuple[Call, ...]:
        return tuple(call for turn in self.turns for call in turn.calls)


class NoGoal(Exception):
    """This goal cannot be drawn in this state of this world."""


def evidence_of(action: Action, arguments: Mapping[str, Any], outcome: Outcome) -> tuple[str, ...]:
    """What a call lets one know: rows that were seen, a total, or a refusal."""
    told = ", ".join(f"{name}={_number(value)}" for name, value in sorted(arguments.items()))
    if outcome.is_total:
        return (f"{action.name} {told}: {outcome.amount}",)
    if outcome.fault == "refused":
        return (f"{action.name} {told}: refused",)
    return tuple(f"{entity} {key}" for entity, key in outcome.rows)


@dataclass
class GoalDrawer:
    """The state of drawing one goal: the world as it is after the calls so far."""

    domain: Domain
    first: Database
    # never changed
    phrases: Phrases
    rng: Random
    is_plain: bool = False
    database: Database = field(init=False)
    calls: list[Call] = field(default_factory=list)
    evidence: list[str] = field(default_factory=list)
    touched: list[tuple[str, str]] = field(default_factory=list)
    # rows that calls changed, the newest last
    done: set[tuple[str, str]] = field(default_factory=set)
    # (action, id) of those calls

    def __post_init__(self) -> None:
        self.database = self.first.copy()

    def run(self, action: Action, arguments: Mapping[str, Any]) -> Outcome:
        """Do a call for good and note it."""
        outcome = run_call(self.domain, self.database, action, arguments)
        self.calls.append(Call(action.name, dict(arguments)))
        if action.is_read or not outcome.is_done:
            self.evidence += evidence_of(action, arguments, outcome)
        else:
            self.touched += outcome.rows
            self.done.add((action.name, str(arguments.get("id"))))
        return outcome

    def take_calls(self) -> tuple[Call, ...]:
        """The calls since the last time."""
        calls, self.calls = tuple(self.calls), []
        return calls

    def draw_call(
        self, wants: Callable[[Action, Outcome, bool], bool], is_linked: bool = False
    ) -> tuple[Action, dict[str, Any]]:
        """An action that changes rows and whose outcome is as wanted, not yet done for good.

        Args:
            wants: (action, outcome, whether it changed the database) to whether it will do.
            is_linked: prefer one about a row that earlier calls changed.
        """
        actions = [action for action in self.domain.actions.values() if not action.is_read]
        self.rng.shuffle(actions)
        # Each action has its tries before the next one, so that those that are seldom possible are not crowded out.
        ways = [(action, attempt < NUM_TRIES // 2) for action in actions for attempt in range(NUM_TRIES)]
        for action, is_choosy in ways:
            arguments = self.draw_arguments(action)
            if arguments is not None and "id" in arguments and (action.name, arguments["id"]) in self.done:
                # The same thing to the same row twice would mostly undo or hide the first.
                continue
            if arguments is None or (is_linked and is_choosy and self.touched and not self._is_linked(arguments)):
                continue
            draft = self.database.copy()
            outcome = run_call(self.domain, draft, action, arguments)
            if wants(action, outcome, bool(changes(self.database, draft))):
                return action, arguments
        raise NoGoal

    def draw_doable(self, is_linked: bool = False) -> tuple[Action, dict[str, Any]]:
        return self.draw_call(lambda _, outcome, is_changed: outcome.is_done and is_changed, is_linked)

    def draw_refused(self) -> tuple[Action, dict[str, Any]]:
        return self.draw_call(lambda _, outcome, __: outcome.fault == "refused")

    def lookup(self, entity: str, key: str) -> tuple[Action, dict[str, Any]] | None:
        """A find call whose only answer is this row, now and at the start; None where there is no such call."""
        if key not in self.first.tables[entity]:
            return None
        fields = self.domain.entities[entity].fields
        finders = [action for action in self.domain.actions.values() if action.kind == "find" and action.entity == entity]
        self.rng.shuffle(finders)
        for action in finders:
            names = list(action.filters)
            self.rng.shuffle(names)
            for size in (1, 2, 3):
                for chosen in combinations(names, size):
                    if self._is_only(entity, key, chosen):
                        row = self.first.tables[entity][key]
                        return action, {name: show(fields[name], row[name]) for name in action.filters if name in chosen}
        return None

    def mention(self, num_lookups: int) -> Callable[[str, str], str]:
        """Words for rows: the first `num_lookups` that can be are described, which makes a call to find each one."""
        left = num_lookups

        def words(entity: str, key: str) -> str:
            nonlocal left
            made = [other for other in self.database.tables[entity] if other not in self.first.tables[entity]]
            if key in made:
                which = f"{ORDINALS[made.index(key)]} " if len(made) > 1 else ""
                return f"the {which}new {self.phrases.label(entity)}"
            found = self.lookup(entity, key) if left else None
            if found is None:
                return self.phrases.mention(entity, key)
            left -= 1
            self.run(*found)
            return self.phrases.described(entity, found[1])

        return words

    def act(self, num_lookups: int = 0, is_linked: bool = False) -> str:
        """Draw and do one action; the words that ask for it."""
        action, arguments = self.draw_doable(is_linked)
        return self.do(action, arguments, num_lookups)

    def do(self, action: Action, arguments: Mapping[str, Any], num_lookups: int = 0, hidden: str = "") -> str:
        """Look rows up, do the action, and say it."""
        text = self.phrases.demand(action, arguments, self.mention(num_lookups), hidden)
        self.run(action, arguments)
        return text

    def row_with_field(self, readers: Sequence[str] = ("get",)) -> tuple[str, str, str]:
        """(entity, id, field) of a cell that a read can tell."""
        entities = [action.entity for action in self.domain.actions.values() if action.kind in readers]
        for _ in range(5 * NUM_TRIES if entities else 0):
            entity = self.rng.choice(entities)
            table = self.database.tables[entity]
            if not table:
                continue
            key = self.rng.choice(list(table))
            name = self.rng.choice(list(table[key]))
            if table[key][name] is not None:
                return entity, key, name
        raise NoGoal

    def shown(self, entity: str, key: str, name: str) -> str:
        return str(show(self.domain.entities[entity].fields[name], self.database.tables[entity][key][name]))

    def draw_arguments(self, action: Action) -> dict[str, Any] | None:
        arguments: dict[str, Any] = {}
        for item in self.domain.parameters(action):
            if item.field.target:
                ids = list(self.database.tables[item.field.target])
                near = [key for key in ids if (item.field.target, key) in self.touched]
                if not ids:
                    return None
                arguments[item.name] = self.rng.choice(near if near and self.rng.random() < 0.6 else ids)
                continue
            value = draw(item.field, self.rng, (), self.is_plain)
            if item.name == "amount" and isinstance(value, int):
                unit = 100 if item.field.kind == "money" else 1
                value = min(value, unit * self.rng.randint(1, MAX_AMOUNT))
            arguments[item.name] = show(item.field, value)
        return arguments

    def _is_linked(self, arguments: Mapping[str, Any]) -> bool:
        keys = {key for _, key in self.touched}
        return any(isinstance(value, str) and value in keys for value in arguments.values())

    def _is_only(self, entity: str, key: str, names: Sequence[str]) -> bool:
        for state in (self.first, self.database):
            table = state.tables[entity]
            if key not in table or any(table[key][name] is None for name in names):
                return False
            if any(table[key][name] != self.first.tables[entity][key][name] for name in names):
                return False
            if sum(all(row[name] == table[key][name] for name in names) for row in table.values()) != 1:
                return False
        return True


def _number(value: Any) -> Any:
    """80.0 and 80 are one number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def withheld(domain: Domain, action: Action, rng: Random) -> str:
    """An argument that a user could forget to tell; empty where there is none."""
    if action.kind in CREATES:
        names = [item.name for item in domain.parameters(action)]
        return rng.choice(names) if len(names) > 1 else ""
    if action.kind in ("update", "link"):
        return action.field
    return "amount" if action.kind in ("add", "take", "transfer") else ""
