"""The rows of a world, and what distinguishes two states of it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import permutations, product

from openkeye.agents.api_domains.values import Value

Row = dict[str, Value]
Change = tuple[str, str, str, Value]
# (entity, id, field, value); field "" is the row itself, whose value is "created" or "deleted"


@dataclass
class Database:
    """Tables by entity, rows by id. Plain values, so that it can be pickled and compared."""

    tables: dict[str, dict[str, Row]] = field(default_factory=dict)
    next_number: int = 1
    # of the next created row; ids are unique over all tables

    def copy(self) -> "Database":
        rows = {entity: {key: dict(row) for key, row in table.items()} for entity, table in self.tables.items()}
        return Database(rows, self.next_number)

    def new_id(self, entity: str) -> str:
        """An id that no row has or had."""
        self.next_number += 1
        return f"{entity[0]}{self.next_number - 1}"


def changes(before: Database, after: Database) -> set[Change]:
    """Every cell and row in which `after` differs."""
    found: set[Change] = set()
    for entity, table in after.tables.items():
        old = before.tables[entity]
        for key, row in table.items():
            if key not in old:
                found.add((entity, key, "", "created"))
            found |= {(entity, key, name, value) for name, value in row.items() if key not in old or old[key][name] != value}
        found |= {(entity, key, "", "deleted") for key in old if key not in table}
    return found


def compare_states(first: Database, wanted: Database, got: Database) -> tuple[int, int, bool]:
    """(wanted changes that hold, wanted changes, whether the two states are one), whatever ids the created rows have.

    Args:
        first: the state that both came from.
    """
    demanded = changes(first, wanted)
    best, is_same = 0, False
    for renamed in _renamings(first, wanted, got):
        made = changes(first, renamed)
        is_same = is_same or made == demanded
        best = max(best, len(demanded & made))
    return best, len(demanded), is_same


def _renamings(first: Database, wanted: Database, got: Database) -> Iterator[Database]:
    """`got` with its created rows under the ids of `wanted`'s, in every way that fits; a table with more than four created
    rows is taken in order, which bounds the ways at 24 a table."""
    choices: list[list[dict[str, str]]] = []
    for entity in got.tables:
        ours, theirs = ([key for key in state.tables[entity] if key not in first.tables[entity]] for state in (got, wanted))
        if not ours or not theirs:
            continue
        size = min(len(ours), len(theirs))
        picks = [tuple(ours[:size])] if len(ours) > 4 else list(permutations(ours, size))
        # (names that nothing else has, for created rows without a partner)
        spare = {key: f"+{key}" for key in ours}
        choices.append([{**spare, **dict(zip(pick, theirs, strict=False))} for pick in picks])
    for ways in product(*choices):
        names = {old: new for way in ways for old, new in way.items()}
        yield _renamed(got, names) if any(old != new for old, new in names.items()) else got


def _renamed(state: Database, names: dict[str, str]) -> Database:
    # Ids are unique over all tables, and no other text looks like one.
    tables = {
        entity: {
            names.get(key, key): {
                name: names.get(value, value) if isinstance(value, str) else value for name, value in row.items()
            }
            for key, row in table.items()
        }
        for entity, table in state.tables.items()
    }
    return Database(tables, state.next_number)
