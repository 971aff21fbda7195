"""Operations that turn one drawing into another, as short lines; read into a canonical form, so that equal ones are equal.

    add segment(A, B)            remove circle(O)              set angle(A, B, C) = 60         rename point(A) = D
    move point(A, 2, 3.5)        set resistor(n1, n2) = 4.7k   set formula(X) = H2SO4          add bond(C1, C2) = double

One operation is a verb, a kind of thing, names in brackets, numbers among them, and a value behind `=`. Lines or semicolons
part them; `none` is the empty list.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from openkeye.tasks.rewards.boxes import NOTHING
from openkeye.tasks.rewards.reading import bounded, plain_words

VERBS = ("add", "remove", "set", "move", "rename")
MAX_OPERATIONS = 256
MAX_LINE = 512
MAX_ARGUMENTS = 32
LINE = re.compile(r"\s{0,8}[-*]?\s{0,8}(\w{1,16})\s{1,8}(\w{1,32})\s{0,8}\(([^()]{0,400})\)\s{0,8}(?:=\s{0,8}(\S.{0,200}))?$")
NUMBER = re.compile(r"[-+]?\d{1,15}(?:\.\d{1,15})?(?:[eE][-+]?\d{1,2})?$")
QUANTITY = re.compile(r"([-+]?\d{1,15}(?:\.\d{1,15})?)\s{0,4}(p|n|u|µ|m|k|M|G)?\s{0,4}(?:ohms?|Ω|F|H|V|A|Hz|°|degrees?)?$")
SCALES = {"p": 1e-12, "n": 1e-9, "u": 1e-6, "µ": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, None: 1.0}
FORMULA = re.compile(r"([A-Z][a-z]?|\(|\)|\[|\])(\d{0,6})")
BONDS = {"1": "single", "2": "double", "3": "triple", "-": "single", "=": "double", "#": "triple"}
DOMAINS = ("geometry", "coordinates", "chemistry", "circuits")


@dataclass(frozen=True)
class Operation:
    """One operation in canonical form."""

    verb: str
    kind: str
    names: tuple[str, ...]
    # in canonical order
    numbers: tuple[float, ...] = ()
    # coordinates, compared softly
    value: str | tuple[float, ...] | None = None
    # a word, or a number to be compared softly


def parse_operations(text: str, domain: str) -> list[Operation | None] | None:
    """The operations of an answer, None in the place of one that cannot be read; None where there is nothing like an operation.

    Raises:
        ValueError: no such domain.
    """
    if domain not in DOMAINS:
        raise ValueError(f"{domain!r} is no domain of operations; give one of {', '.join(DOMAINS)}")
    text = bounded(text)
    if plain_words(text) in NOTHING or not text.strip("[](){} \n"):
        return [] if text.strip() else None
    lines = [line.strip() for line in re.split(r"[\n;]", text)]
    found = [_operation(line, domain) for line in lines if line][: MAX_OPERATIONS + 1]
    return found if any(operation is not None for operation in found) else None


def _operation(line: str, domain: str) -> Operation | None:
    found = LINE.match(line.rstrip(".")) if len(line) <= MAX_LINE else None
    if found is None or found[1].lower() not in VERBS:
        return None
    parts = [part.strip() for part in found[3].split(",") if part.strip()]
    if len(parts) > MAX_ARGUMENTS:
        return None
    numbers = tuple(float(part) for part in parts if NUMBER.match(part))
    names = tuple(part for part in parts if not NUMBER.match(part))
    kind = found[2].lower()
    value = _value(kind, found[4].strip(), domain) if found[4] else None
    names, numbers = _canonical(kind, names, numbers, domain)
    return Operation(found[1].lower(), kind, names, numbers, value)


def _value(kind: str, text: str, domain: str) -> str | tuple[float, ...]:
    if domain == "chemistry":
        if kind == "bond":
            return BONDS.get(text.lower(), text.lower())
        return canonical_formula(text)
    quantity = QUANTITY.match(text)
    if quantity:
        return (float(quantity[1]) * SCALES[quantity[2]],)
    return " ".join(text.split())


def _canonical(
    kind: str, names: tuple[str, ...], numbers: tuple[float, ...], domain: str
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Names and numbers in the one order that stands for all that mean the same."""
    if domain == "chemistry" and kind in ("formula", "molecule"):
        return tuple(canonical_formula(name) for name in names), numbers
    if domain == "coordinates" and kind == "line" and len(numbers) == 3 and any(numbers[:2]):
        # a x + b y + c = 0 up to a factor: the first coefficient that is not 0 becomes positive, the normal 1 long.
        length = (numbers[0] ** 2 + numbers[1] ** 2) ** 0.5
        sign = 1.0 if (numbers[0] or numbers[1]) > 0 else -1.0
        return names, tuple(sign * number / length for number in numbers)
    order = ORDERS.get(kind)
    return (order(names) if order else names), numbers


def _unordered(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(names))


def _either_way(names: tuple[str, ...]) -> tuple[str, ...]:
    return min(names, names[::-1])


def _around(names: tuple[str, ...]) -> tuple[str, ...]:
    """A polygon from its smallest corner on, the way round that is smaller."""
    turns = [way[start:] + way[:start] for way in (names, names[::-1]) for start in range(len(names))]
    return min(turns, default=())


def _pairs(names: tuple[str, ...]) -> tuple[str, ...]:
    """Segments by their two ends (`AB`): neither order matters."""
    return tuple(sorted("".join(sorted(name)) if re.fullmatch(r"[A-Z]{2}", name) else name for name in names))


ORDERS: dict[str, Callable[[tuple[str, ...]], tuple[str, ...]]] = {
    "segment": _unordered, "line": _unordered, "length": _unordered, "distance": _unordered,
    "angle": _either_way, "arc": _either_way,
    "triangle": _around, "quadrilateral": _around, "polygon": _around, "square": _around, "rectangle": _around,
    "parallel": _pairs, "perpendicular": _pairs, "equal": _pairs,
    "bond": _unordered,
    "resistor": _unordered, "capacitor": _unordered, "inductor": _unordered, "wire": _unordered, "lamp": _unordered,
    "switch": _unordered,
}  # fmt: skip
# (a diode's and a battery's ends are no two of a kind: their order stays)


def canonical_formula(text: str) -> str:
    """A chemical formula by its elements' counts (Hill's order), a reaction by its terms; text that is neither stays as it is.

    `Ca(OH)2` and `CaO2H2` are the same; charges stand behind `^`.
    """
    text = text[:MAX_LINE].replace("→", "->")
    if "->" in text:
        return "->".join("+".join(sorted(canonical_formula(term) for term in side.split("+"))) for side in text.split("->"))
    formula, _, charge = "".join(text.split()).partition("^")
    factor, rest = re.match(r"(\d{0,6})(.*)", formula, re.DOTALL).groups()  # type: ignore[union-attr]
    counts = _element_counts(rest)
    if not counts:
        return " ".join(text.split())
    organic = [element for element in ("C", "H") if "C" in counts and element in counts]
    order = organic + sorted(element for element in counts if element not in organic)
    said = "".join(f"{element}{counts[element] if counts[element] > 1 else ''}" for element in order)
    return (factor if factor not in ("", "1") else "") + said + (f"^{charge}" if charge else "")


def _element_counts(formula: str) -> Counter[str]:
    """Atoms by element; empty where the text is no formula."""
    stack: list[Counter[str]] = [Counter()]
    place = 0
    for piece in FORMULA.finditer(formula):
        if piece.start() != place:
            return Counter()
        place, times = piece.end(), int(piece[2] or 1)
        if piece[1] in "([":
            if piece[2]:
                return Counter()
            stack.append(Counter())
        elif piece[1] in ")]":
            if len(stack) == 1:
                return Counter()
            for element, count in stack.pop().items():
                stack[-1][element] += count * times
        else:
            stack[-1][piece[1]] += times
    return stack[0] if len(stack) == 1 and place == len(formula) else Counter()


def similarity(predicted: Operation, gold: Operation, tolerance: float) -> float:
    """1 for the same operation, less as its coordinates and numbers lie apart, 0 where anything else differs.

    A number behind `=` is compared relative to its size, coordinates absolutely: 0 at a distance of `tolerance`.
    """
    if (predicted.verb, predicted.kind, predicted.names) != (gold.verb, gold.kind, gold.names):
        return 0.0
    if len(predicted.numbers) != len(gold.numbers) or type(predicted.value) is not type(gold.value):
        return 0.0
    worth = 1.0
    if isinstance(gold.value, tuple) and isinstance(predicted.value, tuple):
        largest = max(abs(gold.value[0]), abs(predicted.value[0]))
        # Values of a drawing are printed figures: a tenth off is wrong.
        off = abs(predicted.value[0] - gold.value[0]) / largest if largest else 0.0
        worth = max(0.0, 1.0 - 10.0 * off)
    elif predicted.value != gold.value:
        return 0.0
    distance = sum((a - b) ** 2 for a, b in zip(predicted.numbers, gold.numbers, strict=True)) ** 0.5
    return worth * max(0.0, 1.0 - distance / tolerance)
