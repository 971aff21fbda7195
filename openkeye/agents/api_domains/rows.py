"""First rows of a world, drawn by a seed and true to the world's own rules."""

from random import Random

from openkeye.agents.api_domains.database import Database, Row
from openkeye.agents.api_domains.rules import Condition, Fits, Free, Limit
from openkeye.agents.api_domains.schema import CREATES, Domain, Entity
from openkeye.agents.api_domains.simulator import broken
from openkeye.agents.api_domains.values import draw, draw_texts

NUM_TRIES = 12


def draw_database(domain: Domain, rng: Random, is_plain: bool = False) -> Database:
    """Rows for every table; one that breaks a limit, a capacity or a calendar is drawn again, and left out in the end.

    Args:
        is_plain: texts from few words.
    """
    database = Database({name: {} for name in domain.entities})
    numbers = iter(rng.sample(range(10, 100), 90))
    for entity in domain.entities.values():
        texts = {
            name: draw_texts(field.options[0], entity.num_rows, rng, is_plain)
            for name, field in entity.fields.items()
            if field.kind == "text"
        }
        for number in range(entity.num_rows):
            key = f"{entity.name[0]}{next(numbers)}"
            for _ in range(NUM_TRIES):
                row = _draw_row(database, entity, rng, is_plain)
                row |= {name: values[number] for name, values in texts.items()}
                if _fits_in(domain, database, entity.name, key, row):
                    break
    database.next_number = 100
    return database


def _draw_row(database: Database, entity: Entity, rng: Random, is_plain: bool) -> Row:
    row: Row = {}
    for name, field in entity.fields.items():
        is_empty = field.is_optional and rng.random() < 0.5
        # (a table that refers to itself refers to rows above)
        ids = list(database.tables[field.target]) if field.target else []
        row[name] = None if is_empty else draw(field, rng, ids, is_plain)
    return row


def _fits_in(domain: Domain, database: Database, entity: str, key: str, row: Row) -> bool:
    """Lay the row in its table if it breaks no rule of the actions that make such rows."""
    fields = domain.entities[entity].fields
    if any(row[name] is None and not field.is_optional for name, field in fields.items()):
        return False
    table = database.tables[entity]
    table[key] = row
    for action in domain.actions.values():
        if action.entity != entity or not (action.kind in CREATES or action.kind in ("link", "update")):
            continue
        for rule in action.rules:
            if isinstance(rule, (Limit, Fits, Free)) and _counts(rule, row) and broken(domain, database, entity, rule, key):
                del table[key]
                return False
            # Two ends of one row must differ from the start as well.
            if isinstance(rule, Condition) and rule.comparison == "!=" and _are_equal_ends(rule, row):
                del table[key]
                return False
    return True


def _counts(rule: Limit | Fits | Free, row: Row) -> bool:
    if isinstance(rule, Limit):
        return all(row[name] is not None for name in rule.fields)
    return row[rule.capacity[0] if isinstance(rule, Fits) else rule.resource] is not None


def _are_equal_ends(rule: Condition, row: Row) -> bool:
    operand = rule.operands[0]
    return len(rule.path) == 1 and isinstance(operand, str) and operand in row and row[rule.path[0]] == row[operand]
