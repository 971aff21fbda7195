"""What a domain is made of: entities with typed fields, and actions on them. Data only; `simulator` gives it a life.

Worlds are written with the functions at the end of this file. Rules are short texts (`rules`): what must hold, and what else
changes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

from openkeye.agents.api_domains.rules import Effect, Fits, Free, Limit, Rule, parse_rule

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
FIELD_KINDS = ("text", "choice", "state", "number", "money", "day", "hour", "reference")
ACTION_KINDS = (
    "find", "get", "total", "create", "reserve", "schedule", "update", "add", "take", "move", "delete", "transfer", "link",
    "unlink",
)  # fmt: skip
READS = ("find", "get", "total")
CREATES = ("create", "reserve", "schedule")
FUNCTIONS = ("count", "sum", "highest", "lowest")


@dataclass(frozen=True)
class Field:
    """One typed cell of every row of an entity."""

    kind: str
    # of FIELD_KINDS
    options: tuple[str, ...] = ()
    # of a choice or state, the first state being where rows begin; of a text its pool (`values.POOLS`)
    low: int = 0
    high: int = 0
    # bounds of numbers and hours, both inside; for money those of generated rows, in cents
    target: str = ""
    # entity of a reference
    is_optional: bool = False
    # a reference that may be empty, set by link and unlink
    moves: tuple[tuple[str, str], ...] = ()
    # (from, to) that a state allows

    @property
    def is_quantity(self) -> bool:
        return self.kind in ("number", "money")


@dataclass(frozen=True)
class Entity:
    """A table."""

    name: str
    fields: Mapping[str, Field]
    num_rows: int = 5

    @cached_property
    def state(self) -> str:
        """Name of its state field; empty where it has none."""
        return next((name for name, field in self.fields.items() if field.kind == "state"), "")


@dataclass(frozen=True)
class Action:
    """What a tool does, of ACTION_KINDS."""

    kind: str
    entity: str
    verb: str
    # plain words: "check in"
    field: str = ""
    # the one that it changes, adds to or sums
    filters: tuple[str, ...] = ()
    # fields that find and total choose rows by
    source: str = ""
    target: str = ""
    # states of a move
    rules: tuple[Rule, ...] = ()

    @cached_property
    def name(self) -> str:
        """Unique in a domain."""
        words = [self.verb, self.entity]
        if self.kind in ("update", "total") and self.field:
            words.insert(1, self.field)
        if self.kind == "find":
            words += ["by", self.filters[0]]
        return "_".join(words).replace(" ", "_")

    @property
    def is_read(self) -> bool:
        return self.kind in READS


@dataclass(frozen=True)
class Parameter:
    """One argument of a tool."""

    name: str
    field: Field
    is_required: bool = True


@dataclass(frozen=True)
class Domain:
    """A world: what there is, and what can be done. Checked where it is made."""

    name: str
    title: str
    entities: Mapping[str, Entity]
    actions: Mapping[str, Action]
    _parameters: dict[str, tuple[Parameter, ...]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for entity in self.entities.values():
            for name, cell in entity.fields.items():
                assert cell.kind in FIELD_KINDS, f"{self.name}: {entity.name}.{name}"
                assert not cell.target or cell.target in self.entities, f"{self.name}: {entity.name}.{name}: {cell.target}"
        for action in self.actions.values():
            where = f"{self.name}: {action.name}"
            assert action.entity in self.entities, where
            cells = self.entities[action.entity].fields
            assert not action.field or action.field in cells, where
            assert set(action.filters) <= set(cells), where
            if action.kind == "move":
                assert (action.source, action.target) in cells[self.entities[action.entity].state].moves, where
            self._parameters[action.name] = self._parameters_of(action)
            for rule in action.rules:
                self._check_rule(action, rule, where)

    def parameters(self, action: Action) -> tuple[Parameter, ...]:
        """What a call of the action takes, in order."""
        return self._parameters[action.name]

    @cached_property
    def signature(self) -> tuple:
        """Its structure without names: entities with their field kinds and state machines, actions with their rules' kinds."""
        order = {name: number for number, name in enumerate(self.entities)}
        entities = []
        for entity in self.entities.values():
            kinds = sorted(
                (cell.kind, order.get(cell.target, -1), len(cell.options), _shape(cell), cell.is_optional)
                for cell in entity.fields.values()
            )
            entities.append(tuple(kinds))
        actions = sorted(
            (
                action.kind,
                order[action.entity],
                len(action.filters),
                tuple(sorted(type(rule).__name__ for rule in action.rules)),
            )
            for action in self.actions.values()
        )
        return tuple(entities), tuple(actions)

    def cell_of(self, action: Action, path: tuple[str, ...]) -> Field | None:
        """The field that a rule's path leads to; None where the first word is no field and no argument."""
        cells: Mapping[str, Field] = self.entities[action.entity].fields
        extra = {parameter.name: parameter.field for parameter in self._parameters.get(action.name, ())}
        found = extra.get(path[0]) or cells.get(path[0])
        for name in path[1:]:
            if found is None or found.kind != "reference":
                return None
            found = self.entities[found.target].fields.get(name)
        return found

    def _parameters_of(self, action: Action) -> tuple[Parameter, ...]:
        entity = self.entities[action.entity]
        row = Field("reference", target=action.entity)
        if action.kind in ("find", "total"):
            return tuple(Parameter(name, entity.fields[name], False) for name in action.filters)
        if action.kind in CREATES:
            assigned = {rule.path[0] for rule in action.rules if isinstance(rule, Effect) and len(rule.path) == 1}
            return tuple(
                Parameter(name, cell)
                for name, cell in entity.fields.items()
                if cell.kind != "state" and not cell.is_optional and name not in assigned
            )
        parameters = [Parameter("id", row)]
        if action.kind in ("update", "link"):
            parameters.append(Parameter(action.field, replace(entity.fields[action.field], is_optional=False)))
        if action.kind in ("add", "take", "transfer"):
            cell = entity.fields[action.field]
            amount = Parameter("amount", replace(cell, low=1, high=max(cell.high, 1)))
            if action.kind == "transfer":
                return (Parameter("source", row), Parameter("target", row), amount)
            parameters.append(amount)
        return tuple(parameters)

    def _check_rule(self, action: Action, rule: Rule, where: str) -> None:
        cells = self.entities[action.entity].fields
        if isinstance(rule, Limit):
            assert set(rule.fields) <= set(cells), f"{where}: {rule}"
        elif isinstance(rule, Fits):
            assert rule.amount in cells and self.cell_of(action, rule.capacity) is not None, f"{where}: {rule}"
        elif isinstance(rule, Free):
            kinds = [cell.kind for cell in cells.values()]
            assert rule.resource in cells and "hour" in kinds and cells["hours"].kind == "number", f"{where}: {rule}"
        else:
            cell = self.cell_of(action, rule.path)
            assert cell is not None, f"{where}: {rule}"
            for operand in rule.operands:
                path = (operand,) if isinstance(operand, str) else operand
                is_word = isinstance(operand, str) and operand in (*cell.options, *(DAYS if cell.kind == "day" else ()))
                is_known = isinstance(path, int) or self.cell_of(action, path) is not None
                assert is_word or is_known, f"{where}: {operand!r} in {rule}"


def _shape(cell: Field) -> tuple[tuple[int, int], ...]:
    """A state machine without its words."""
    return tuple((cell.options.index(start), cell.options.index(end)) for start, end in cell.moves)


person, place, thing = (Field("text", (pool,)) for pool in ("person", "place", "thing"))
day = Field("day")


def one_of(*options: str) -> Field:
    return Field("choice", options)


def number(low: int, high: int) -> Field:
    return Field("number", low=low, high=high)


def money(low: int, high: int) -> Field:
    return Field("money", low=100 * low, high=100 * high)


def hour(low: int = 8, high: int = 20) -> Field:
    return Field("hour", low=low, high=high)


def ref(target: str) -> Field:
    return Field("reference", target=target)


def maybe(target: str) -> Field:
    """A reference that may be empty."""
    return Field("reference", target=target, is_optional=True)


def states(*roads: str) -> Field:
    """A state that moves along roads such as "booked>paid>used"; rows are created in the first state of the first road."""
    moves: list[tuple[str, str]] = []
    for road in roads:
        steps = road.split(">")
        moves += [pair for pair in pairwise(steps) if pair not in moves]
    return Field("state", tuple(dict.fromkeys(step for road in roads for step in road.split(">"))), moves=tuple(moves))


def table(_name: str, _num_rows: int = 5, /, **fields: Field) -> Entity:
    return Entity(_name, fields, _num_rows)


def _rules(texts: tuple[str, ...]) -> tuple[Rule, ...]:
    return tuple(parse_rule(text) for text in texts)


def find(entity: str, *filters: str) -> Action:
    return Action("find", entity, "find", filters=filters)


def get(entity: str) -> Action:
    return Action("get", entity, "get")


def total(entity: str, function: str, field: str = "", *filters: str) -> Action:
    """`function` of FUNCTIONS over a quantity of the rows that the filters leave; count takes no field."""
    assert function in FUNCTIONS, function
    return Action("total", entity, function, field, filters)


def create(entity: str, verb: str, *rules: str) -> Action:
    """A new row. With a `fits` rule it reserves, with a `free` rule it schedules."""
    parsed = _rules(rules)
    kinds = {type(rule) for rule in parsed}
    return Action("reserve" if Fits in kinds else "schedule" if Free in kinds else "create", entity, verb, rules=parsed)


def update(entity: str, field: str, *rules: str) -> Action:
    return Action("update", entity, "set", field, rules=_rules(rules))


def add(entity: str, verb: str, field: str, *rules: str) -> Action:
    return Action("add", entity, verb, field, rules=_rules(rules))


def take(entity: str, verb: str, field: str, *rules: str) -> Action:
    return Action("take", entity, verb, field, rules=_rules(rules))


def move(entity: str, verb: str, road: str, *rules: str) -> Action:
    source, target = road.split(">")
    return Action("move", entity, verb, source=source, target=target, rules=_rules(rules))


def delete(entity: str, verb: str, *rules: str) -> Action:
    return Action("delete", entity, verb, rules=_rules(rules))


def transfer(entity: str, verb: str, field: str, *rules: str) -> Action:
    return Action("transfer", entity, verb, field, rules=_rules(rules))


def link(entity: str, verb: str, field: str, *rules: str) -> Action:
    return Action("link", entity, verb, field, rules=_rules(rules))


def unlink(entity: str, verb: str, field: str, *rules: str) -> Action:
    return Action("unlink", entity, verb, field, rules=_rules(rules))


def domain(name: str, title: str, *parts: Entity | Action) -> Domain:
    """A world of tables and actions, in the order in which rows are made: a table stands behind those that it refers to."""
    entities = {part.name: part for part in parts if isinstance(part, Entity)}
    actions = {part.name: part for part in parts if isinstance(part, Action)}
    assert len(entities) + len(actions) == len(parts), f"{name}: two parts have one name"
    return Domain(name, title, entities, actions)
