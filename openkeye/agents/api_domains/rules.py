"""Rules of actions: conditions and effects as short texts, read into records.

    room.state == clean            a condition on the row, on what it refers to, or on an argument
    balance >= item.price * amount the same with a product
    room.state = dirty             an effect; also += and -=
    once room day unless cancelled no second row with the same room and day (rows in the named states do not count)
    most 3 member unless returned  at most three rows with the same member
    fits seats in trip.places      the seats of all rows with the same trip stay within its places
    free court unless cancelled    no two rows overlap on one court: same day, `hours` from the hour on

Conditions are read when the action itself is done, effects follow, and all of it is one transaction.
"""

from dataclasses import dataclass

COMPARISONS = ("==", "!=", "<=", ">=", "<", ">")
CHANGES = ("+=", "-=", "=")

Operand = int | str | tuple[str, ...]
# a number, a word (a field, an argument or a value), or a path such as ("room", "state")


@dataclass(frozen=True)
class Condition:
    """The cell at `path` compares so with the product of `operands`."""

    path: tuple[str, ...]
    comparison: str
    operands: tuple[Operand, ...]


@dataclass(frozen=True)
class Effect:
    """The cell at `path` is set, raised or lowered by the product of `operands`."""

    path: tuple[str, ...]
    change: str
    operands: tuple[Operand, ...]


@dataclass(frozen=True)
class Limit:
    """At most `most` rows agree in `fields`; rows in a state of `unless` do not count."""

    most: int
    fields: tuple[str, ...]
    unless: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fits:
    """The sum of `amount` over rows with one holder (first word of `capacity`) stays within `capacity`."""

    amount: str
    capacity: tuple[str, ...]
    unless: tuple[str, ...] = ()


@dataclass(frozen=True)
class Free:
    """No two rows overlap on one `resource`."""

    resource: str
    unless: tuple[str, ...] = ()


Rule = Condition | Effect | Limit | Fits | Free


def parse_rule(text: str) -> Rule:
    """The record of one rule; an assertion fails where it is none."""
    text, _, tail = text.partition(" unless ")
    unless = tuple(tail.split())
    words = text.split()
    if words[0] == "once":
        return Limit(1, tuple(words[1:]), unless)
    if words[0] == "most":
        return Limit(int(words[1]), tuple(words[2:]), unless)
    if words[0] == "fits":
        assert words[2] == "in", text
        return Fits(words[1], _path(words[3]), unless)
    if words[0] == "free":
        return Free(words[1], unless)
    assert not unless and len(words) in (3, 5), text
    assert len(words) == 3 or words[3] == "*", text
    operands = tuple(_operand(word) for word in words[2::2])
    if words[1] in COMPARISONS:
        return Condition(_path(words[0]), words[1], operands)
    assert words[1] in CHANGES, text
    return Effect(_path(words[0]), words[1], operands)


def _path(word: str) -> tuple[str, ...]:
    return tuple(word.split("."))


def _operand(word: str) -> Operand:
    """`$20` is money, `a.b` a path, anything else a number or a word: a field of the row itself, an argument, or a value."""
    if word.startswith("$"):
        return 100 * int(word[1:])
    if word.lstrip("-").isdigit():
        return int(word)
    return _path(word) if "." in word else word
