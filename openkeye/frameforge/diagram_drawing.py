"""Diagrams as pictures, drawn with Pillow at twice their size."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from openkeye.frameforge.diagrams import EXTENT, Diagram, DiagramPair, Fact, Place

OVERSAMPLING = 2
INK = (30, 30, 40)
SIGNS = {"lamp": "X", "switch": "/", "capacitor": "||", "battery": "+-"}

Point = tuple[float, float]
Colour = tuple[int, int, int]


class Sheet:
    """A square paper of places from 0 to 1, as seen from somewhere."""

    def __init__(self, side: int, ink: Colour, paper: Colour, view: tuple[float, float, float]) -> None:
        """view: scale around the middle, then shift to the right and down, as shares of the paper."""
        self.side = side * OVERSAMPLING
        self.ink, self.paper, self.view = ink, paper, view
        self.image = Image.new("RGB", (self.side, self.side), paper)
        self.draw = ImageDraw.Draw(self.image)
        self.width = max(1, round(self.side / 160))

    def at(self, place: Place) -> Point:
        """Pixels of a place."""
        scale, x, y = self.view
        return ((0.5 + (place[0] - 0.5) * scale + x) * self.side, (0.5 + (place[1] - 0.5) * scale + y) * self.side)

    def line(self, first: Place, second: Place, fill: Colour | None = None, width: int | None = None) -> None:
        """A straight line."""
        self.draw.line((*self.at(first), *self.at(second)), fill=fill or self.ink, width=width or self.width)

    def ring(self, centre: Place, radius: float, is_filled: bool = False) -> None:
        """A circle, its radius as a share of the paper."""
        x, y = self.at(centre)
        r = radius * self.view[0] * self.side
        fill = self.ink if is_filled else None
        self.draw.ellipse((x - r, y - r, x + r, y + r), outline=self.ink, width=self.width, fill=fill)

    def text(self, place: Place, text: str, height: float = 0.055, has_ground: bool = False) -> None:
        """Words around a place, on a ground of paper where lines run below."""
        font = ImageFont.load_default(height * self.view[0] * self.side)
        spot = self.at(place)
        if has_ground:
            left, top, right, bottom = self.draw.textbbox(spot, text, font=font, anchor="mm")
            self.draw.rectangle((left - 2, top - 2, right + 2, bottom + 2), fill=self.paper)
        self.draw.text(spot, text, fill=self.ink, font=font, anchor="mm")

    def finish(self) -> np.ndarray:
        """[side, side, 3] uint8."""
        side = self.side // OVERSAMPLING
        return np.asarray(self.image.resize((side, side), Image.Resampling.BOX))


def draw_pair(pair: DiagramPair, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Both pictures: [side, side, 3] uint8. The first is drawn plainly, the second as its disturbances say."""
    rng = np.random.default_rng(pair.seed)
    ink, paper, view = INK, (252, 252, 250), (1.0, 0.0, 0.0)
    first = draw_diagram(pair.first, Sheet(side, ink, paper, view))
    if "colour_jitter" in pair.disturbances:
        ink = (int(rng.integers(90)), int(rng.integers(90)), int(rng.integers(110)))
        paper = (int(rng.integers(215, 256)), int(rng.integers(215, 256)), int(rng.integers(205, 250)))
    if "viewpoint" in pair.disturbances:
        scale = float(rng.uniform(0.75, 0.92))
        slack = (1 - scale) / 2
        view = (scale, float(rng.uniform(-slack, slack)), float(rng.uniform(-slack, slack)))
    sheet = Sheet(side, ink, paper, view)
    if "semantic_no_op" in pair.disturbances:
        # A frame around it, and bolder lines, mean nothing.
        sheet.width *= 2
        sheet.draw.rectangle((2, 2, sheet.side - 3, sheet.side - 3), outline=ink, width=sheet.width)
    return first, draw_diagram(pair.second, sheet)


def draw_diagram(diagram: Diagram, sheet: Sheet) -> np.ndarray:
    """One picture."""
    _DRAWERS[diagram.domain](diagram, sheet)
    return sheet.finish()


def _middle(first: Place, second: Place) -> Place:
    return (first[0] + second[0]) / 2, (first[1] + second[1]) / 2


def _outside(place: Place, by: float) -> Place:
    """A place further from the paper's middle."""
    x, y = place[0] - 0.5, place[1] - 0.5
    length = (x * x + y * y) ** 0.5 or 1.0
    return place[0] + by * x / length, place[1] + by * y / length


def _geometry(diagram: Diagram, sheet: Sheet) -> None:
    places = diagram.places
    for fact in diagram.facts:
        if fact.kind == "segment":
            sheet.line(places[fact.names[0]], places[fact.names[1]])
        elif fact.kind == "circle":
            sheet.ring(places[fact.names[0]], 0.075)
    for fact in diagram.facts:
        if fact.kind == "length":
            sheet.text(_middle(*(places[name] for name in fact.names)), fact.value, has_ground=True)
    for name, place in places.items():
        sheet.ring(place, 0.012, is_filled=True)
        sheet.text(_outside(place, 0.11), name)


def _coordinates(diagram: Diagram, sheet: Sheet) -> None:
    def on_paper(spot: Place) -> Place:
        return 0.5 + spot[0] / (2 * EXTENT), 0.5 - spot[1] / (2 * EXTENT)

    grey = tuple(round(0.25 * ink + 0.75 * paper) for ink, paper in zip(sheet.ink, sheet.paper, strict=True))
    for step in range(-EXTENT, EXTENT + 1):
        fill = sheet.ink if step == 0 else (grey[0], grey[1], grey[2])
        sheet.line(on_paper((step, -EXTENT)), on_paper((step, EXTENT)), fill, 1)
        sheet.line(on_paper((-EXTENT, step)), on_paper((EXTENT, step)), fill, 1)
        if step % 2 == 0 and abs(step) < EXTENT:
            sheet.text(on_paper((step - 0.3, -0.35)), str(step), 0.032)
    for fact in diagram.facts:
        if fact.kind == "segment":
            first, second = (on_paper(diagram.places[name]) for name in fact.names)
            sheet.line(first, second)
    for fact in diagram.facts:
        if fact.kind == "point":
            x, y = fact.numbers
            sheet.ring(on_paper((x, y)), 0.014, is_filled=True)
            sheet.text(on_paper((x + 0.45, y + 0.45)), fact.names[0], 0.05)


def _chemistry(diagram: Diagram, sheet: Sheet) -> None:
    if not diagram.places:
        for row, fact in enumerate(diagram.facts):
            place = (0.5, (row + 0.8) / (len(diagram.facts) + 0.6))
            sheet.text(place, f"{fact.names[0]}: {fact.value}", 0.075)
        return
    for fact in diagram.facts:
        (x1, y1), (x2, y2) = (diagram.places[name] for name in fact.names)
        length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
        across = ((y1 - y2) / length, (x2 - x1) / length)
        count = ("single", "double", "triple").index(fact.value) + 1
        for number in range(count):
            off = 0.022 * (number - (count - 1) / 2)
            shift = (off * across[0], off * across[1])
            sheet.line((x1 + shift[0], y1 + shift[1]), (x2 + shift[0], y2 + shift[1]))
    for name, place in diagram.places.items():
        sheet.text(place, name, 0.06, has_ground=True)


def _circuits(diagram: Diagram, sheet: Sheet) -> None:
    for fact in diagram.facts:
        first, second = (diagram.places[name] for name in fact.names)
        _part(fact, first, second, sheet)
    for name, (x, y) in diagram.places.items():
        sheet.ring((x, y), 0.012, is_filled=True)
        sheet.text((x - 0.045, y - 0.045), name, 0.04)


def _part(fact: Fact, first: Place, second: Place, sheet: Sheet) -> None:
    """A part in the middle of its line, its value beside it."""
    sheet.line(first, second)
    x, y = _middle(first, second)
    is_across = abs(first[1] - second[1]) < abs(first[0] - second[0])
    if fact.kind == "resistor":
        half = (0.065, 0.03) if is_across else (0.03, 0.065)
        corners = (*sheet.at((x - half[0], y - half[1])), *sheet.at((x + half[0], y + half[1])))
        sheet.draw.rectangle(corners, outline=sheet.ink, width=sheet.width, fill=sheet.paper)
    elif fact.kind != "wire":
        sheet.text((x, y), SIGNS[fact.kind], 0.065, has_ground=True)
        if fact.kind == "lamp":
            sheet.ring((x, y), 0.04)
    if fact.value:
        unit = {"battery": "V"}.get(fact.kind, "")
        sheet.text((x, y - 0.065) if is_across else (x + 0.09, y), fact.value + unit, 0.045)


_DRAWERS: dict[str, Callable[[Diagram, Sheet], None]] = {
    "geometry": _geometry, "coordinates": _coordinates, "chemistry": _chemistry, "circuits": _circuits,
}  # fmt: skip
