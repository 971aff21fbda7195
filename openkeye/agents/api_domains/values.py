"""Values of cells: how they lie in the database, how tools show them, how arguments are read, and where texts come from.

Money lies in cents and is shown in whole units where it can be; hours are whole and shown as "14:00"; references are row ids.
"""

from collections.abc import Sequence
from random import Random
from typing import Any

from openkeye.agents.api_domains.schema import DAYS, Field

Value = int | str | None

COLOURS = ("red", "blue", "green", "white", "pink", "orange", "yellow", "purple")
PLAIN_WORDS = (
    "king", "chair", "corn", "queen", "dog", "ship", "tree", "boat", "leaf", "snow", "bird", "frog", "cake", "milk", "cloud",
    "flag", "nest", "duck", "apple", "lion", "goat", "cat", "rain", "book", "gold", "lamp", "horse", "fish", "house", "door",
    "bread", "moon",
)  # fmt: skip
# the words of our smallest model, which it reads as one token each

FIRST_NAMES = (
    "Ada", "Bela", "Carl", "Dora", "Emil", "Fay", "Goran", "Hana", "Ivo", "Jana", "Kofi", "Lena", "Milo", "Nora", "Omar",
    "Petra", "Quin", "Rosa", "Sven", "Tara", "Uma", "Viktor", "Wen", "Yara", "Zeno",
)  # fmt: skip
LAST_NAMES = (
    "Adler", "Brook", "Castro", "Dietz", "Evans", "Fuchs", "Garcia", "Holm", "Ito", "Jensen", "Kaya", "Lopez", "Moreau",
    "Novak", "Okafor", "Park", "Rossi", "Silva", "Tanaka", "Weber",
)  # fmt: skip
PLACES = (
    "North Gate", "Mill Lane", "Harbour", "Old Town", "East Hill", "River Side", "Market Square", "West End", "Park Road",
    "Station", "Lake View", "Castle Street", "South Bank", "Bridge Street", "Garden Row", "Tower Court", "Canal Walk",
    "Forest Edge", "Airport", "Abbey Yard",
)  # fmt: skip
ADJECTIVES = ("Silver", "Quiet", "Amber", "Northern", "Little", "Grand", "Hidden", "Bright", "Old", "Summer", "Iron", "Velvet")
NOUNS = (
    "Falcon", "Meadow", "Anchor", "Lantern", "Compass", "Willow", "Harvest", "Orchid", "Beacon", "Comet", "Maple", "Pearl",
    "Raven", "Summit", "Thistle", "Voyage",
)  # fmt: skip


def draw_texts(pool: str, count: int, rng: Random, is_plain: bool) -> list[str]:
    """Different texts of a pool: "person", "place" or "thing". Plain ones are a colour and a word."""
    if is_plain:
        return rng.sample([f"{colour} {word}" for colour in COLOURS for word in PLAIN_WORDS], count)
    if pool == "person":
        return rng.sample([f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES], count)
    if pool == "place":
        return rng.sample(PLACES, count)
    return rng.sample([f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS], count)


def draw(field: Field, rng: Random, ids: Sequence[str], is_plain: bool) -> Value:
    """A value within the field's bounds; `ids` are the rows that a reference can point to."""
    if field.kind == "text":
        return draw_texts(field.options[0], 1, rng, is_plain)[0]
    if field.kind in ("choice", "state"):
        return rng.choice(field.options)
    if field.kind == "day":
        return rng.choice(DAYS)
    if field.kind == "reference":
        return rng.choice(ids) if ids else None
    if field.kind == "money":
        cents = 0 if is_plain else rng.choice((0, 0, 50, 25))
        return min(100 * rng.randint(-(-field.low // 100), max(field.high // 100, 1)) + cents, max(field.high, 100))
    return rng.randint(field.low, field.high)


def show(field: Field, value: Value) -> Any:
    """The value as tools show it."""
    if value is None:
        return "none"
    if field.kind == "money":
        assert isinstance(value, int)
        return value // 100 if value % 100 == 0 else value / 100
    if field.kind == "hour":
        return f"{value}:00"
    return value


def read(field: Field, argument: Any) -> Value:
    """The value of an argument, the inverse of `show`.

    Raises:
        ValueError: it is of another type or out of bounds; the message says what was expected.
    """
    if field.is_quantity:
        return _read_quantity(field, argument)
    if not isinstance(argument, str):
        raise ValueError(f"expected text, got {_short(argument)}")
    if field.kind == "hour":
        digits = argument.removesuffix(":00")
        if digits == argument or not (digits.isascii() and digits.isdigit()) or not field.low <= int(digits[:3]) <= field.high:
            raise ValueError(f"expected an hour from {field.low}:00 to {field.high}:00, got {_short(argument)}")
        return int(digits)
    options = DAYS if field.kind == "day" else field.options if field.kind in ("choice", "state") else ()
    if options and argument not in options:
        raise ValueError(f"expected one of {', '.join(options)}, got {_short(argument)}")
    if not argument.strip() or len(argument) > 200:
        raise ValueError("expected a text of 1 to 200 characters")
    return argument


def _read_quantity(field: Field, argument: Any) -> int:
    if isinstance(argument, bool) or not isinstance(argument, (int, float)):
        raise ValueError(f"expected a number, got {_short(argument)}")
    if not abs(argument) < 1e9:
        raise ValueError(f"expected a number below a billion, got {_short(argument)}")
    if field.kind == "money":
        cents = round(argument * 100)
        if abs(cents - argument * 100) > 1e-6 or cents < 0:
            raise ValueError(f"expected an amount of money from 0 on with at most two decimals, got {_short(argument)}")
        return cents
    if argument != int(argument):
        raise ValueError(f"expected a whole number, got {_short(argument)}")
    if not field.low <= argument <= field.high:
        raise ValueError(f"expected {field.low} to {field.high}, got {_short(argument)}")
    return int(argument)


def _short(argument: Any) -> str:
    return f"{argument!r:.40}"
