"""Diagrams as sets of facts, and the operations between two of them: geometry, coordinate geometry, chemistry, circuits.

A diagram is a set of lines such as `segment(A, B)` or `resistor(n1, n2) = 4.7k`: a fact's key is what stands before `=`, and
coordinates are part of it as `point(A, 2, 3)`. Names and their places on paper stand beside the facts and are no facts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from openkeye.common.checks import InputError

DOMAINS = ("geometry", "coordinates", "chemistry", "circuits")
DISTURBANCES = ("colour_jitter", "layout_change", "slot_shuffle", "semantic_no_op", "viewpoint")
EXTENT = 6
# coordinates run from minus to plus it
MAX_TRIES = 400
OHMS = ("100", "220", "470", "1k", "2.2k", "4.7k", "10k", "47k")
VOLTS = ("3", "5", "9", "12")
FORMULAS = (
    "H2O", "H2SO4", "HNO3", "NaCl", "NaOH", "Ca(OH)2", "CaCO3", "CO2", "NH3", "CH4", "C2H5OH", "C6H12O6", "Fe2O3", "Al2O3",
    "KMnO4", "CuSO4", "MgCl2", "H2O2", "SO2", "SO3", "N2O4", "Mg(OH)2", "K2CO3", "Na2SO4",
)  # fmt: skip
BONDS = ("single", "double", "triple")

Place = tuple[float, float]


@dataclass(frozen=True)
class Fact:
    """One thing of a diagram."""

    kind: str
    names: tuple[str, ...]
    numbers: tuple[float, ...] = ()
    # coordinates, where they say what it is
    value: str = ""

    @property
    def head(self) -> str:
        """`segment(A, B)`, `point(A, 2, 3)`."""
        return f"{self.kind}({', '.join((*self.names, *(f'{number:g}' for number in self.numbers)))})"

    @property
    def text(self) -> str:
        return self.head + (f" = {self.value}" if self.value else "")


@dataclass(frozen=True)
class Diagram:
    """Facts, and where their names lie on paper."""

    domain: str
    facts: tuple[Fact, ...]
    places: dict[str, Place]
    # by name, 0 to 1 from the top left; of coordinates, theirs


@dataclass(frozen=True)
class DiagramPair:
    """Two diagrams and the operations that turn the first into the second."""

    first: Diagram
    second: Diagram
    operations: tuple[str, ...]
    # in the language of `add`, `remove`, `set`, `move` and `rename`; empty for a negative
    disturbances: tuple[str, ...]
    # of DISTURBANCES; those of layout are in `second`, the rest are the drawing's
    seed: int
    # of the drawing

    @property
    def answer(self) -> str:
        """The operations, one a line; `none` where there is none."""
        return "\n".join(self.operations) or "none"


def make_diagram_pair(
    rng: np.random.Generator, domain: str, max_edits: int = 3, negative_share: float = 0.2, max_disturbances: int = 2
) -> DiagramPair:
    """Draw a diagram of one of DOMAINS, and edit it. Each edit touches another fact, so that none undoes or joins another.

    Raises:
        InputError: no such domain, or bounds that leave nothing.
    """
    if domain not in DOMAINS:
        raise InputError(f"domain is {domain!r}; give one of {', '.join(DOMAINS)}")
    if max_edits < 1 or not 0.0 <= negative_share <= 1.0 or not 0 <= max_disturbances <= len(DISTURBANCES):
        raise InputError(
            f"max_edits {max_edits}, negative_share {negative_share:g}, max_disturbances {max_disturbances}; "
            f"give 1 or more, 0 to 1, and 0 to {len(DISTURBANCES)}"
        )
    first = _MAKERS[domain](rng)
    is_negative = rng.random() < negative_share
    least = 1 if is_negative and max_disturbances else 0
    names = rng.permutation(DISTURBANCES).tolist()[: int(rng.integers(least, max_disturbances + 1))]
    second = first
    operations: list[str] = []
    touched: set[str] = set()
    wanted = 0 if is_negative else int(rng.integers(1, max_edits + 1))
    for _ in range(MAX_TRIES):
        if len(operations) == wanted:
            break
        edited = _EDITORS[domain](rng, second, touched)
        if edited is not None:
            second, operation = edited
            operations.append(operation)
    assert operations or is_negative, domain
    if "slot_shuffle" in names:
        second = replace(second, facts=tuple(second.facts[n] for n in rng.permutation(len(second.facts))))
    if "layout_change" in names and domain != "coordinates":
        way = int(rng.integers(1, 4))
        mirrored = {name: (1 - x if way & 1 else x, 1 - y if way & 2 else y) for name, (x, y) in second.places.items()}
        second = replace(second, places=mirrored)
    return DiagramPair(first, second, tuple(operations), tuple(sorted(names)), int(rng.integers(1 << 31)))


Edited = tuple[Diagram, str] | None


def _with(diagram: Diagram, gone: Fact | None, come: Fact | None) -> Diagram:
    """One fact taken away, or put, or one in the place of another."""
    if gone is None:
        facts = diagram.facts
        return diagram if come is None else replace(diagram, facts=(*facts, come))
    place = next(number for number, fact in enumerate(diagram.facts) if fact is gone)
    there = () if come is None else (come,)
    return replace(diagram, facts=(*diagram.facts[:place], *there, *diagram.facts[place + 1 :]))


def _touch(touched: set[str], *keys: str) -> bool:
    """Whether none of these was touched before; they are from now on."""
    if touched & set(keys):
        return False
    touched.update(keys)
    return True


def _removed(rng: np.random.Generator, diagram: Diagram, touched: set[str], kinds: tuple[str, ...], least: int) -> Edited:
    """Take a fact of some kinds away, where so many stay."""
    found = [fact for fact in diagram.facts if fact.kind in kinds]
    if len(found) <= least:
        return None
    fact = found[int(rng.integers(len(found)))]
    return (_with(diagram, fact, None), f"remove {fact.head}") if _touch(touched, fact.head) else None


def _set(diagram: Diagram, touched: set[str], fact: Fact, value: str) -> Edited:
    if value == fact.value or not _touch(touched, fact.head):
        return None
    changed = replace(fact, value=value)
    return _with(diagram, fact, changed), f"set {changed.text}"


def _put(diagram: Diagram, touched: set[str], fact: Fact) -> Edited:
    if fact.head in {other.head for other in diagram.facts} or not _touch(touched, fact.head):
        return None
    return _with(diagram, None, fact), f"add {fact.text}"


def _pairs(names: list[str]) -> list[tuple[str, str]]:
    return [(a, b) for place, a in enumerate(names) for b in names[place + 1 :]]


def _geometry(rng: np.random.Generator) -> Diagram:
    """Points on a loose circle, segments between them, some with their lengths, some points with a circle around."""
    names = list("ABCDEF")[: int(rng.integers(4, 7))]
    turns = 2 * np.pi * (np.arange(len(names)) + rng.uniform(-0.2, 0.2, len(names))) / len(names)
    radii = rng.uniform(0.27, 0.36, len(names))
    spots = zip(names, turns.tolist(), radii.tolist(), strict=True)
    places = {name: (0.5 + r * float(np.cos(t)), 0.5 + r * float(np.sin(t))) for name, t, r in spots}
    pairs = _pairs(names)
    chosen = [pairs[n] for n in rng.permutation(len(pairs))[: int(rng.integers(4, 7))]]
    facts = [Fact("segment", pair) for pair in sorted(chosen)]
    facts += [Fact("length", pair, (), str(int(rng.integers(2, 20)))) for pair in sorted(chosen[:2])]
    facts.append(Fact("circle", (names[int(rng.integers(len(names)))],)))
    return Diagram("geometry", tuple(facts), places)


def _edit_geometry(rng: np.random.Generator, diagram: Diagram, touched: set[str]) -> Edited:
    names, kind = sorted(diagram.places), int(rng.integers(5))
    if kind == 0:
        pairs = _pairs(names)
        return _put(diagram, touched, Fact("segment", pairs[int(rng.integers(len(pairs)))]))
    if kind == 1:
        # A segment that is measured stays.
        measured = {fact.names for fact in diagram.facts if fact.kind == "length"}
        touched.update(Fact("segment", pair).head for pair in measured)
        return _removed(rng, diagram, touched, ("segment",), 3)
    if kind == 2:
        lengths = [fact for fact in diagram.facts if fact.kind == "length"]
        return _set(diagram, touched, lengths[int(rng.integers(len(lengths)))], str(int(rng.integers(2, 20))))
    if kind == 3:
        return _put(diagram, touched, Fact("circle", (names[int(rng.integers(len(names)))],)))
    return _removed(rng, diagram, touched, ("circle",), 0)


def _coordinates(rng: np.random.Generator) -> Diagram:
    """Points of a grid, segments between some of them."""
    names = list("ABCDEF")[: int(rng.integers(3, 6))]
    spots = rng.permutation((2 * EXTENT - 1) ** 2)[: len(names)].tolist()
    side = 2 * EXTENT - 1
    places = {name: (float(s % side - EXTENT + 1), float(s // side - EXTENT + 1)) for name, s in zip(names, spots, strict=True)}
    pairs = _pairs(names)
    chosen = [pairs[n] for n in rng.permutation(len(pairs))[: int(rng.integers(1, 4))]]
    facts = [Fact("point", (name,), places[name]) for name in names] + [Fact("segment", pair) for pair in sorted(chosen)]
    return Diagram("coordinates", tuple(facts), places)


def _edit_coordinates(rng: np.random.Generator, diagram: Diagram, touched: set[str]) -> Edited:
    points = {fact.names[0]: fact for fact in diagram.facts if fact.kind == "point"}
    taken = set(diagram.places.values())
    spot = (float(rng.integers(1 - EXTENT, EXTENT)), float(rng.integers(1 - EXTENT, EXTENT)))
    kind = int(rng.integers(5))
    if kind == 0 and spot not in taken:
        name = sorted(points)[int(rng.integers(len(points)))]
        if not _touch(touched, name):
            return None
        moved = _with(diagram, points[name], Fact("point", (name,), spot))
        return replace(moved, places=diagram.places | {name: spot}), f"move {Fact('point', (name,), spot).head}"
    if kind == 1 and spot not in taken:
        name = next(letter for letter in "ABCDEFGHIJ" if letter not in diagram.places)
        touched.add(name)
        come = _with(diagram, None, Fact("point", (name,), spot))
        return replace(come, places=diagram.places | {name: spot}), f"add {Fact('point', (name,), spot).head}"
    if kind == 2:
        joined = {name for fact in diagram.facts if fact.kind == "segment" for name in fact.names}
        alone = sorted(set(points) - joined)
        if not alone or len(points) < 3 or not _touch(touched, alone[0]):
            return None
        # (its place stays taken, so that no new point comes to lie where one went)
        return _with(diagram, points[alone[0]], None), f"remove {points[alone[0]].head}"
    if kind == 3:
        pairs = _pairs(sorted(name for name in points))
        pair = pairs[int(rng.integers(len(pairs)))]
        return _put(diagram, touched, Fact("segment", pair)) if _touch(touched, *(f"end {name}" for name in pair)) else None
    return _removed(rng, diagram, touched, ("segment",), 0)


def _chemistry(rng: np.random.Generator) -> Diagram:
    """Either formulas by a letter, or a ring or chain of atoms and the bonds between them."""
    if rng.random() < 0.5:
        letters = list("XYZQRT")[: int(rng.integers(3, 6))]
        chosen = [FORMULAS[n] for n in rng.permutation(len(FORMULAS))[: len(letters)]]
        facts = tuple(Fact("formula", (name,), (), formula) for name, formula in zip(letters, chosen, strict=True))
        return Diagram("chemistry", facts, {})
    atoms = [f"C{n}" for n in range(1, int(rng.integers(5, 8)))]
    turns = 2 * np.pi * np.arange(len(atoms)) / len(atoms)
    spots = zip(atoms, turns.tolist(), strict=True)
    places = {name: (0.5 + 0.33 * float(np.cos(turn)), 0.5 + 0.33 * float(np.sin(turn))) for name, turn in spots}
    ring = [(atoms[n], atoms[(n + 1) % len(atoms)]) for n in range(len(atoms) - int(rng.integers(2)))]
    bonds = tuple(Fact("bond", pair, (), BONDS[int(rng.integers(2))]) for pair in ring)
    return Diagram("chemistry", bonds, places)


def _edit_chemistry(rng: np.random.Generator, diagram: Diagram, touched: set[str]) -> Edited:
    kind, fact = int(rng.integers(3)), diagram.facts[int(rng.integers(len(diagram.facts)))]
    if not diagram.places:
        fresh = [formula for formula in FORMULAS if formula not in {other.value for other in diagram.facts}]
        formula = fresh[int(rng.integers(len(fresh)))]
        if kind == 0:
            free = [letter for letter in "XYZQRTUVW" if Fact("formula", (letter,)).head not in {f.head for f in diagram.facts}]
            return _put(diagram, touched, Fact("formula", (free[0],), (), formula)) if free else None
        if kind == 1:
            return _removed(rng, diagram, touched, ("formula",), 2)
        return _set(diagram, touched, fact, formula)
    if kind == 0:
        bonded = {frozenset(other.names) for other in diagram.facts}
        pairs = [pair for pair in _pairs(sorted(diagram.places)) if frozenset(pair) not in bonded]
        if not pairs:
            return None
        return _put(diagram, touched, Fact("bond", pairs[int(rng.integers(len(pairs)))], (), BONDS[int(rng.integers(2))]))
    if kind == 1:
        return _removed(rng, diagram, touched, ("bond",), 3)
    return _set(diagram, touched, fact, BONDS[int(rng.integers(3))])


def _part(rng: np.random.Generator, pair: tuple[str, str]) -> Fact:
    """One part of a circuit between two nodes."""
    kind = ("resistor", "lamp", "switch", "battery", "capacitor", "wire")[int(rng.integers(6))]
    value = {"resistor": OHMS, "battery": VOLTS, "capacitor": ("1u", "10u", "22n", "47n")}.get(kind)
    return Fact(kind, pair, (), "" if value is None else value[int(rng.integers(len(value)))])


def _neighbours() -> list[tuple[str, str]]:
    """Pairs of nodes of a lattice of three by three, numbered by rows, that stand side by side."""
    across = [(3 * row + column, 3 * row + column + 1) for row in range(3) for column in range(2)]
    down = [(3 * row + column, 3 * row + column + 3) for row in range(2) for column in range(3)]
    return [(f"n{a + 1}", f"n{b + 1}") for a, b in across + down]


def _circuits(rng: np.random.Generator) -> Diagram:
    """Parts between neighbouring nodes of a lattice of three by three."""
    pairs = _neighbours()
    chosen = [pairs[n] for n in rng.permutation(len(pairs))[: int(rng.integers(5, 9))]]
    facts = [_part(rng, pair) for pair in chosen]
    if not any(fact.kind == "battery" for fact in facts):
        facts[0] = Fact("battery", chosen[0], (), VOLTS[int(rng.integers(len(VOLTS)))])
    places = {f"n{n + 1}": (0.14 + 0.36 * (n % 3), 0.14 + 0.36 * (n // 3)) for n in range(9)}
    return Diagram("circuits", tuple(facts), places)


def _edit_circuits(rng: np.random.Generator, diagram: Diagram, touched: set[str]) -> Edited:
    kind = int(rng.integers(3))
    taken = {fact.names for fact in diagram.facts}
    if kind == 0:
        free = [pair for pair in _neighbours() if pair not in taken and f"pair {pair}" not in touched]
        if not free:
            return None
        pair = free[int(rng.integers(len(free)))]
        touched.add(f"pair {pair}")
        return _put(diagram, touched, _part(rng, pair))
    fact = diagram.facts[int(rng.integers(len(diagram.facts)))]
    # What lies between two nodes is edited once: one part in another's place is told as one removed and one added elsewhere.
    if f"pair {fact.names}" in touched:
        return None
    if kind == 1 and len(taken) > 3:
        touched.add(f"pair {fact.names}")
        return _with(diagram, fact, None), f"remove {fact.head}"
    values = {"resistor": OHMS, "battery": VOLTS}.get(fact.kind)
    if values is None:
        return None
    edited = _set(diagram, touched, fact, values[int(rng.integers(len(values)))])
    if edited is not None:
        touched.add(f"pair {fact.names}")
    return edited


_MAKERS: dict[str, Callable[[np.random.Generator], Diagram]] = {
    "geometry": _geometry, "coordinates": _coordinates, "chemistry": _chemistry, "circuits": _circuits,
}  # fmt: skip
_EDITORS: dict[str, Callable[[np.random.Generator, Diagram, set[str]], Edited]] = {
    "geometry": _edit_geometry, "coordinates": _edit_coordinates, "chemistry": _edit_chemistry, "circuits": _edit_circuits,
}  # fmt: skip
