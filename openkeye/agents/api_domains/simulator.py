"""Runs calls on a database. Every call is a transaction: it does all of what its action says, or nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

from openkeye.agents.api_domains.database import Database, Row
from openkeye.agents.api_domains.rules import Condition, Effect, Fits, Free, Limit, Operand, Rule
from openkeye.agents.api_domains.schema import CREATES, Action, Domain, Entity, Field
from openkeye.agents.api_domains.values import Value, read, show

FAULTS = ("name", "argument", "reference", "refused")
# of a call: no such tool, an argument missing, unknown or of another type, a row that does not exist, against a rule


@dataclass(frozen=True)
class Outcome:
    """What came of one call."""

    fault: str = ""
    # empty, or one of FAULTS
    error: str = ""
    rows: tuple[tuple[str, str], ...] = ()
    # (entity, id) that the call found, made or changed, in order
    amount: Value = None
    # what a total comes to, as it lies in the database
    is_total: bool = False

    @property
    def is_done(self) -> bool:
        return not self.fault


class CallFault(Exception):
    """Ends a transaction; becomes an `Outcome`."""

    def __init__(self, fault: str, error: str) -> None:
        super().__init__(error)
        self.fault, self.error = fault, error


def run_call(
    domain: Domain, database: Database, action: Action, arguments: Mapping[str, Any], labels: Mapping[str, str] | None = None
) -> Outcome:
    """Do it, or say why not and leave the database as it was.

    Args:
        arguments: as tools take them, by the parameters' own names.
        labels: names under which errors speak of entities and fields; their own by default.
    """
    draft = database.copy()
    try:
        values = _Arguments(domain, draft, action, labels or {}).read(arguments)
        outcome = _Transaction(domain, draft, action, values, labels or {}).run()
    except CallFault as fault:
        return Outcome(fault.fault, fault.error)
    database.tables, database.next_number = draft.tables, draft.next_number
    return outcome


@dataclass(frozen=True)
class _Speaker:
    domain: Domain
    database: Database
    action: Action

    def refuse(self, fault: str, error: str) -> NoReturn:
        raise CallFault(fault, error)


@dataclass(frozen=True)
class _Arguments(_Speaker):
    """Reads and checks the arguments of a call."""

    labels: Mapping[str, str]

    def read(self, arguments: Mapping[str, Any]) -> dict[str, Value]:
        parameters = self.domain.parameters(self.action)
        names = [parameter.name for parameter in parameters]
        for name in arguments:
            if name not in names:
                self.refuse("argument", f"no argument {name}; there are {', '.join(self._label(other) for other in names)}")
        values: dict[str, Value] = {}
        for parameter in parameters:
            name = parameter.name
            if arguments.get(name) is None:
                if parameter.is_required:
                    self.refuse("argument", f"{self._label(name)} is missing")
                continue
            try:
                values[name] = read(parameter.field, arguments[name])
            except ValueError as error:
                self.refuse("argument", f"{self._label(name)}: {error}")
            target = parameter.field.target
            if target and values[name] not in self.database.tables[target]:
                self.refuse("reference", f"{self._label(name)}: there is no {self._label(target)} {values[name]}")
        if self.action.kind == "find" and not values:
            self.refuse("argument", f"give at least one of {', '.join(self._label(name) for name in names)}")
        return values

    def _label(self, name: str) -> str:
        return self.labels.get(name, name)


@dataclass(frozen=True)
class _Transaction(_Speaker):
    """One call with its values read, on a draft of the database."""

    values: dict[str, Value]
    labels: Mapping[str, str]

    def run(self) -> Outcome:
        action = self.action
        if action.is_read:
            return self._read()
        if action.kind in CREATES:
            keys = [self._create()]
        elif action.kind == "transfer":
            keys = [str(self.values["source"]), str(self.values["target"])]
            self._transfer(*keys)
        else:
            keys = [str(self.values["id"])]
            self._change(keys[0])
        for rule in action.rules:
            if isinstance(rule, Condition):
                self._check(rule, keys)
        for rule in action.rules:
            if isinstance(rule, Effect):
                self._apply(rule, keys)
        for rule in action.rules:
            if isinstance(rule, (Limit, Fits, Free)):
                error = broken(self.domain, self.database, action.entity, rule, keys[0], self.labels)
                if error:
                    self.refuse("refused", error)
        if action.kind == "delete":
            self._delete(keys[0])
        return Outcome(rows=tuple((action.entity, key) for key in keys))

    @property
    def _table(self) -> dict[str, Row]:
        return self.database.tables[self.action.entity]

    @property
    def _entity(self) -> Entity:
        return self.domain.entities[self.action.entity]

    def _label(self, name: str) -> str:
        return self.labels.get(name, name)

    def _read(self) -> Outcome:
        action = self.action
        if action.kind == "get":
            return Outcome(rows=((action.entity, str(self.values["id"])),))
        chosen = [key for key, row in self._table.items() if all(row[name] == value for name, value in self.values.items())]
        if action.kind == "find":
            return Outcome(rows=tuple((action.entity, key) for key in chosen))
        cells = [value for key in chosen if isinstance(value := self._table[key].get(action.field), int)]
        if action.verb == "count":
            return Outcome(amount=len(chosen), is_total=True)
        if action.verb == "sum":
            return Outcome(amount=sum(cells), is_total=True)
        return Outcome(amount=(max if action.verb == "highest" else min)(cells, default=None), is_total=True)

    def _create(self) -> str:
        row: Row = {}
        for name, field in self._entity.fields.items():
            row[name] = field.options[0] if field.kind == "state" else self.values.get(name)
            if row[name] is None and field.is_quantity:
                row[name] = 0
                # (set by an effect)
        key = self.database.new_id(self.action.entity)
        self._table[key] = row
        return key

    def _transfer(self, source: str, target: str) -> None:
        if source == target:
            self.refuse("refused", "the two must differ")
        amount = self.values["amount"]
        assert isinstance(amount, int)
        self._step(self.action.entity, source, self.action.field, -amount)
        self._step(self.action.entity, target, self.action.field, amount)

    def _change(self, key: str) -> None:
        action, row = self.action, self._table[key]
        if action.kind == "move":
            state = self._entity.state
            if row[state] != action.source:
                self.refuse("refused", f"{self._label(state)} is {row[state]}, not {action.source}")
            row[state] = action.target
        elif action.kind in ("add", "take"):
            amount = self.values["amount"]
            assert isinstance(amount, int)
            self._step(action.entity, key, action.field, amount if action.kind == "add" else -amount)
        elif action.kind == "update":
            row[action.field] = self.values[action.field]
        elif action.kind == "link":
            if row[action.field] is not None:
                self.refuse("refused", f"{self._label(action.field)} is {row[action.field]} already")
            row[action.field] = self.values[action.field]
        elif action.kind == "unlink":
            if row[action.field] is None:
                self.refuse("refused", f"{self._label(action.field)} is none already")
            row[action.field] = None

    def _delete(self, key: str) -> None:
        for entity in self.domain.entities.values():
            for name, field in entity.fields.items():
                if field.target == self.action.entity and any(
                    row[name] == key for row in self.database.tables[entity.name].values()
                ):
                    self.refuse("refused", f"a {self._label(entity.name)} still refers to it")
        del self._table[key]

    def _step(self, entity: str, key: str, name: str, amount: int) -> None:
        """Raise or lower a quantity within its bounds."""
        field, row = self.domain.entities[entity].fields[name], self.database.tables[entity][key]
        old = row[name]
        assert isinstance(old, int), f"{self.domain.name}: {entity}.{name} is {old!r}"
        new = old + amount
        low = 0 if field.kind == "money" else field.low
        if new < low:
            self.refuse("refused", f"{self._label(name)} is {show(field, old)} and cannot fall below {show(field, low)}")
        if field.kind == "number" and new > field.high:
            self.refuse("refused", f"{self._label(name)} is {old} and cannot rise above {field.high}")
        row[name] = new

    def _place(self, path: tuple[str, ...], keys: list[str]) -> tuple[str, str, str]:
        """(entity, row, field) that a path leads to."""
        entity, key = self.action.entity, keys[0]
        if path[0] in ("source", "target") and self.action.kind == "transfer":
            key, path = keys[path[0] == "target"], path[1:]
        for name in path[:-1]:
            following = self.database.tables[entity][key][name]
            if following is None:
                self.refuse("refused", f"{self._label(name)} is none")
            entity, key = self.domain.entities[entity].fields[name].target, str(following)
        return entity, key, path[-1]

    def _value(self, operand: Operand, keys: list[str]) -> Value:
        if isinstance(operand, int):
            return operand
        path = operand if isinstance(operand, tuple) else (operand,)
        if path[0] == "amount" and "amount" in self.values:
            return self.values["amount"]
        if isinstance(operand, str) and operand not in self._entity.fields:
            return operand
        entity, key, name = self._place(path, keys)
        return self.database.tables[entity][key][name]

    def _product(self, operands: tuple[Operand, ...], keys: list[str]) -> Value:
        values = [self._value(operand, keys) for operand in operands]
        if len(values) == 1:
            return values[0]
        return prod(value for value in values if isinstance(value, int))

    def _check(self, rule: Condition, keys: list[str]) -> None:
        got = self._value(rule.path if len(rule.path) > 1 else rule.path[0], keys)
        wanted = self._product(rule.operands, keys)
        field = self.domain.cell_of(self.action, rule.path)
        assert field is not None
        if not _holds(got, rule.comparison, wanted):
            place = " of ".join(self._label(name) for name in reversed(rule.path))
            needed = {"==": "", "!=": "not ", "<=": "at most ", ">=": "at least ", "<": "below ", ">": "above "}
            shown = (show(field, got), show(field, wanted))
            self.refuse("refused", f"{place} is {shown[0]} and must be {needed[rule.comparison]}{shown[1]}")

    def _apply(self, rule: Effect, keys: list[str]) -> None:
        entity, key, name = self._place(rule.path, keys)
        value = self._product(rule.operands, keys)
        if rule.change == "=":
            self.database.tables[entity][key][name] = value
            return
        assert isinstance(value, int), f"{self.domain.name}: {rule}"
        self._step(entity, key, name, value if rule.change == "+=" else -value)


def _holds(got: Value, comparison: str, wanted: Value) -> bool:
    if comparison in ("==", "!="):
        return (got == wanted) is (comparison == "==")
    if not isinstance(got, int) or not isinstance(wanted, int):
        return False
    return {"<=": got <= wanted, ">=": got >= wanted, "<": got < wanted, ">": got > wanted}[comparison]


def broken(
    domain: Domain, database: Database, entity: str, rule: Rule, key: str, labels: Mapping[str, str] | None = None
) -> str:
    """How a row breaks a rule that counts rows; empty where it does not."""
    if not isinstance(rule, (Limit, Fits, Free)):
        return ""
    table, row = database.tables[entity], database.tables[entity][key]
    labels, state = labels or {}, domain.entities[entity].state
    counted = [other for other in table.values() if not (state and other[state] in rule.unless)]
    if state and row[state] in rule.unless:
        return ""
    names = {"place": labels.get(entity, entity)}
    if isinstance(rule, Limit):
        same = [other for other in counted if all(other[name] == row[name] for name in rule.fields)]
        what = " and ".join(labels.get(name, name) for name in rule.fields)
        return f"at most {rule.most} {names['place']} with one {what} is allowed" if len(same) > rule.most else ""
    if isinstance(rule, Fits):
        return _overfull(domain, database, entity, rule, row, counted, labels)
    return _overlap(domain.entities[entity].fields, rule, row, counted, labels)


def _overfull(
    domain: Domain,
    database: Database,
    entity: str,
    rule: Fits,
    row: Row,
    counted: list[Row],
    labels: Mapping[str, str],
) -> str:
    holder, name = rule.capacity[0], rule.capacity[-1]
    key, at = row[holder], domain.entities[entity].fields[holder].target
    for step in rule.capacity[1:-1]:
        key, at = database.tables[at][str(key)][step], domain.entities[at].fields[step].target
    room = database.tables[at][str(key)][name] if key is not None else 0
    used = sum(value for other in counted if other[holder] == row[holder] and isinstance(value := other[rule.amount], int))
    assert isinstance(room, int)
    if used <= room:
        return ""
    amount = row[rule.amount]
    assert isinstance(amount, int)
    left = show(domain.entities[at].fields[name], max(room - used + amount, 0))
    return f"{labels.get(name, name)} of {labels.get(holder, holder)} {row[holder]} leaves only {left}"


def _overlap(fields: Mapping[str, Field], rule: Free, row: Row, counted: list[Row], labels: Mapping[str, str]) -> str:
    hour = next(name for name, field in fields.items() if field.kind == "hour")
    same = [rule.resource, *(name for name, field in fields.items() if field.kind == "day")]
    for other in counted:
        if other is row or any(other[name] != row[name] for name in same):
            continue
        first, second = (row, other) if _number(row[hour]) <= _number(other[hour]) else (other, row)
        if _number(second[hour]) < _number(first[hour]) + _number(first["hours"]):
            return f"{labels.get(rule.resource, rule.resource)} {row[rule.resource]} is taken at that time"
    return ""


def _number(value: Value) -> int:
    assert isinstance(value, int)
    return value
