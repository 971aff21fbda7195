"""Documents drawn by Pillow, each with the text that is on it and one fact to ask for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageDraw

from openkeye.data.makers.fonts import Font, load_font
from openkeye.data.makers.made_sample import pick

GOODS = (
    "Bread", "Milk", "Butter", "Apples", "Tomatoes", "Rice", "Coffee", "Tea", "Honey", "Cheese", "Eggs", "Flour", "Sugar",
    "Olive oil", "Pasta", "Salt", "Yoghurt", "Carrots", "Onions", "Soap", "Batteries", "Light bulb", "Notebook", "Pencils",
)  # fmt: skip
PLACES = (
    "Corner",
    "Harbour",
    "Garden",
    "Station",
    "Old Town",
    "Riverside",
    "Market",
    "Hill",
    "Lake",
    "Bridge",
    "North",
    "Mill",
)
SHOPS = ("Store", "Bakery", "Books", "Hardware", "Pharmacy", "Cafe", "Grocery", "Kiosk")
SIGN_WORDS = (
    "no parking", "keep left", "mind the step", "wet floor", "exit", "staff only", "please ring the bell", "open daily",
    "closed on Mondays", "road works ahead", "do not feed the birds", "lift out of order", "cash only", "quiet please",
    "deliveries at the rear", "beware of the dog", "platform", "tickets", "lost property", "meeting point", "push", "pull",
)  # fmt: skip
FIELDS = ("Name", "Date", "Order", "Room", "Weight", "Length", "Colour", "Amount", "Seat", "Code", "Shelf", "Batch")
SUBJECTS = ("Visitors", "Rainfall", "Sales", "Output", "Passengers", "Members", "Harvest", "Calls")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
INKS = ((20, 20, 24), (40, 30, 90), (90, 25, 25), (20, 70, 45))
SIGN_COLOURS = (
    ((255, 255, 255), (20, 60, 140)), ((20, 20, 20), (245, 200, 40)), ((255, 255, 255), (170, 30, 35)),
    ((20, 20, 20), (250, 250, 246)), ((255, 255, 255), (25, 110, 60)),
)  # fmt: skip
# ink and ground


@dataclass(frozen=True)
class Page:
    """A clean picture of a document."""

    picture: PIL.Image.Image
    lines: tuple[str, ...]
    # all text on it, in the order of reading
    question: str = ""
    answer: str = ""
    # one fact that stands on it


def _paper(rng: np.random.Generator) -> tuple[int, int, int]:
    light = int(rng.integers(236, 256))
    return light, light, max(0, light - int(rng.integers(0, 16)))


def _width(font: Font, text: str) -> int:
    return int(np.ceil(font.getlength(text)))


def _height(font: Font) -> int:
    """Of a line, with room to the next."""
    box = font.getbbox("Agjy|")
    return int(np.ceil((box[3] - min(0.0, box[1])) * 1.35))


def receipt(rng: np.random.Generator, font_path: str, texts: Sequence[str]) -> Page:
    """A shop's receipt; its sum is asked, or one price."""
    size = int(rng.integers(20, 30))
    font, title = load_font(font_path, size), load_font(font_path, round(size * 1.4))
    ink = pick(rng, INKS[:2])
    count = int(rng.integers(3, 9))
    goods = [GOODS[number] for number in rng.permutation(len(GOODS))[:count]]
    cents = rng.integers(49, 2500, count).tolist()
    shop = f"{pick(rng, PLACES)} {pick(rng, SHOPS)}"
    date = f"{int(rng.integers(1, 29)):02d}.{int(rng.integers(1, 13)):02d}.{int(rng.integers(2015, 2027))}"
    rows = [(name, f"{price // 100}.{price % 100:02d}") for name, price in zip(goods, cents, strict=True)]
    total = f"{sum(cents) // 100}.{sum(cents) % 100:02d}"
    closing = [f"Receipt no. {int(rng.integers(1000, 99999))}", "Thank you"]
    widest = max(*(_width(font, f"{name}{price}") for name, price in rows), _width(title, shop), _width(font, closing[0]))
    width, step = widest + 4 * size, _height(font)
    picture = PIL.Image.new("RGB", (width, _height(title) + (count + 6) * step + 2 * size), _paper(rng))
    draw = PIL.ImageDraw.Draw(picture)
    y = size
    draw.text(((width - _width(title, shop)) // 2, y), shop, ink, title)
    y += _height(title)
    draw.text(((width - _width(font, date)) // 2, y), date, ink, font)
    y += step + step // 2
    for name, price in [*rows, ("TOTAL", total)]:
        if name == "TOTAL":
            draw.line((size, y, width - size, y), ink, 2)
            y += step // 3
        draw.text((size, y), name, ink, font)
        draw.text((width - size - _width(font, price), y), price, ink, font)
        y += step
    for line in closing:
        y += step // 6
        draw.text(((width - _width(font, line)) // 2, y), line, ink, font)
        y += step
    lines = (shop, date, *(f"{name} {price}" for name, price in rows), f"TOTAL {total}", *closing)
    if rng.random() < 0.5:
        return Page(picture, lines, "What is the total?", total)
    name, price = pick(rng, rows)
    return Page(picture, lines, f"What is the price of {name}?", price)


def sign(rng: np.random.Generator, font_path: str, texts: Sequence[str]) -> Page:
    """A sign of a few lines, of the user's own texts where there are any."""
    font = load_font(font_path, int(rng.integers(44, 72)))
    ink, ground = pick(rng, SIGN_COLOURS)
    if texts:
        lines = _wrapped(pick(rng, texts), 18)[:8]
    else:
        count = int(rng.integers(1, 4))
        lines = [SIGN_WORDS[number] for number in rng.permutation(len(SIGN_WORDS))[:count]]
        lines = [line.upper() if rng.random() < 0.5 else line.capitalize() for line in lines]
        if rng.random() < 0.4:
            lines.append(f"{int(rng.integers(1, 24))}:00 - {int(rng.integers(1, 24))}:30")
    step = _height(font)
    width, height = max(_width(font, line) for line in lines) + 120, len(lines) * step + 100
    picture = PIL.Image.new("RGB", (width, height), ground)
    draw = PIL.ImageDraw.Draw(picture)
    draw.rounded_rectangle((14, 14, width - 15, height - 15), 18, None, ink, 5)
    for number, line in enumerate(lines):
        draw.text(((width - _width(font, line)) // 2, 50 + number * step), line, ink, font)
    return Page(picture, tuple(lines))


def _wrapped(text: str, columns: int) -> list[str]:
    """Words in lines of about so many letters; a longer word has a line of its own."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > columns:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def form(rng: np.random.Generator, font_path: str, texts: Sequence[str]) -> Page:
    """A form of labelled fields; one value is asked."""
    font, bold = load_font(font_path, int(rng.integers(22, 32))), load_font(font_path, 38)
    ink = pick(rng, INKS)
    names = [FIELDS[number] for number in rng.permutation(len(FIELDS))[: int(rng.integers(3, 8))]]
    values = [f"{pick(rng, PLACES)} {int(rng.integers(1, 1000))}" for _ in names]
    title = f"Form {pick(rng, 'ABCDEFGH')}-{int(rng.integers(10, 100))}"
    step = round(_height(font) * 1.4)
    label_width = max(_width(font, f"{name}:") for name in names) + 30
    value_width = max(_width(font, value) for value in values) + 40
    picture = PIL.Image.new("RGB", (label_width + value_width + 80, len(names) * step + 140), _paper(rng))
    draw = PIL.ImageDraw.Draw(picture)
    draw.text((40, 30), title, ink, bold)
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        y = 100 + number * step
        draw.text((40, y), f"{name}:", ink, font)
        draw.text((40 + label_width, y), value, ink, font)
        draw.rectangle((30 + label_width, y - 4, 30 + label_width + value_width, y + step - 12), None, (120, 120, 120), 1)
    asked = int(rng.integers(len(names)))
    lines = (title, *(f"{name}: {value}" for name, value in zip(names, values, strict=True)))
    return Page(picture, lines, f'What stands in the field "{names[asked]}"?', values[asked])


def table(rng: np.random.Generator, font_path: str, texts: Sequence[str]) -> Page:
    """A ruled table of numbers; one cell is asked. Its text goes row by row."""
    font = load_font(font_path, int(rng.integers(22, 32)))
    ink = pick(rng, INKS)
    columns = [MONTHS[number] for number in np.sort(rng.permutation(12)[: int(rng.integers(2, 6))])]
    subjects = [SUBJECTS[number] for number in rng.permutation(len(SUBJECTS))[: int(rng.integers(2, 6))]]
    cells = rng.integers(0, 1000, (len(subjects), len(columns)))
    first_width = max(_width(font, name) for name in subjects) + 30
    cell_width, step = _width(font, "0000") + 40, round(_height(font) * 1.3)
    width, height = first_width + cell_width * len(columns), step * (len(subjects) + 1)
    picture = PIL.Image.new("RGB", (width + 60, height + 60), _paper(rng))
    draw = PIL.ImageDraw.Draw(picture)
    edges = [30, *(30 + first_width + number * cell_width for number in range(len(columns) + 1))]
    for x in edges:
        draw.line((x, 30, x, 30 + height), ink, 2)
    for number in range(len(subjects) + 2):
        draw.line((30, 30 + number * step, 30 + width, 30 + number * step), ink, 2)
    rows = [["", *columns], *([name, *map(str, row)] for name, row in zip(subjects, cells.tolist(), strict=True))]
    for row_number, row in enumerate(rows):
        for column, text in enumerate(row):
            x = edges[column] + 15 if column == 0 else edges[column + 1] - 15 - _width(font, text)
            draw.text((x, 30 + row_number * step + step // 8), text, ink, font)
    asked_row, asked_column = int(rng.integers(len(subjects))), int(rng.integers(len(columns)))
    lines = tuple(" ".join(text for text in line if text) for line in rows)
    return Page(
        picture,
        lines,
        f"What is the value of {subjects[asked_row]} in {columns[asked_column]}?",
        str(cells[asked_row, asked_column]),
    )


def chart(rng: np.random.Generator, font_path: str, texts: Sequence[str]) -> Page:
    """A bar chart with its values written above the bars; the tallest bar or one value is asked."""
    font, title_font = load_font(font_path, int(rng.integers(20, 27))), load_font(font_path, 32)
    names = [MONTHS[number] for number in np.sort(rng.permutation(12)[: int(rng.integers(3, 8))])]
    # No two bars are of one height, so that one is the tallest.
    values = (rng.permutation(190)[: len(names)] + 10).tolist()
    title = f"{pick(rng, SUBJECTS)} {int(rng.integers(1990, 2027))}"
    ink, bar = pick(rng, INKS), tuple(int(level) for level in rng.integers(60, 200, 3))
    step, tall, top = _width(font, "0000") + 34, 260, 100
    width = max(step * len(names), _width(title_font, title)) + 80
    picture = PIL.Image.new("RGB", (width, top + tall + _height(font) + 50), _paper(rng))
    draw = PIL.ImageDraw.Draw(picture)
    draw.text((40, 20), title, ink, title_font)
    base = top + tall
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        left, high = 40 + number * step, round(value / max(values) * (tall - 50))
        draw.rectangle((left + 8, base - high, left + step - 8, base), bar, ink)
        shown = str(value)
        draw.text((left + (step - _width(font, shown)) // 2, base - high - _height(font)), shown, ink, font)
        draw.text((left + (step - _width(font, name)) // 2, base + 8), name, ink, font)
    draw.line((30, base, width - 30, base), ink, 3)
    lines = (title, " ".join(map(str, values)), " ".join(names))
    if rng.random() < 0.5:
        return Page(picture, lines, "Which month has the tallest bar?", names[int(np.argmax(values))])
    asked = int(rng.integers(len(names)))
    return Page(picture, lines, f"What is the value of {names[asked]}?", str(values[asked]))


TEMPLATES: dict[str, Callable[[np.random.Generator, str, Sequence[str]], Page]] = {
    "receipt": receipt,
    "sign": sign,
    "form": form,
    "table": table,
    "chart": chart,
}
