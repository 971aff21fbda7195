"""Small packages with tests, in which bugs are planted. PACKAGE stands for a name that each episode draws."""

from openkeye.tasks.repository_templates_more import MORE

INVENTORY = """
=== PACKAGE/__init__.py
=== PACKAGE/stock.py
class Stock:
    def __init__(self):
        self.counts = {}

    def add(self, item, count=1):
        if count <= 0:
            raise ValueError("count must be positive")
        self.counts[item] = self.counts.get(item, 0) + count

    def take(self, item, count=1):
        if self.counts.get(item, 0) < count:
            raise KeyError(item)
        self.counts[item] -= count
        if self.counts[item] == 0:
            del self.counts[item]

    def low(self, limit):
        return sorted(item for item, count in self.counts.items() if count <= limit)
=== PACKAGE/pricing.py
def discount(count):
    if count >= 100:
        return 20
    if count >= 10:
        return 5
    return 0


def total(prices, order):
    amount = 0
    for item, count in order.items():
        amount += prices[item] * count * (100 - discount(count)) // 100
    return amount
=== PACKAGE/orders.py
from PACKAGE.pricing import total


def fulfil(stock, prices, order):
    missing = [item for item, count in order.items() if stock.counts.get(item, 0) < count]
    if missing:
        return 0, sorted(missing)
    for item, count in order.items():
        stock.take(item, count)
    return total(prices, order), []
=== tests/__init__.py
=== tests/test_stock.py
import unittest

from PACKAGE.stock import Stock


class StockTest(unittest.TestCase):
    def test_add_counts_up(self):
        stock = Stock()
        stock.add("nut", 2)
        stock.add("nut")
        self.assertEqual(stock.counts, {"nut": 3})

    def test_add_refuses_nothing(self):
        with self.assertRaises(ValueError):
            Stock().add("nut", 0)

    def test_take_all_forgets_the_item(self):
        stock = Stock()
        stock.add("nut", 2)
        stock.take("nut", 2)
        self.assertEqual(stock.counts, {})

    def test_take_too_many(self):
        stock = Stock()
        stock.add("nut", 2)
        with self.assertRaises(KeyError):
            stock.take("nut", 3)
        self.assertEqual(stock.counts, {"nut": 2})

    def test_low_is_sorted_and_includes_the_limit(self):
        stock = Stock()
        for item, count in (("c", 2), ("a", 1), ("b", 3)):
            stock.add(item, count)
        self.assertEqual(stock.low(2), ["a", "c"])
=== tests/test_orders.py
import unittest

from PACKAGE.orders import fulfil
from PACKAGE.pricing import discount, total
from PACKAGE.stock import Stock


class OrderTest(unittest.TestCase):
    def test_discount_steps(self):
        self.assertEqual([discount(n) for n in (9, 10, 99, 100)], [0, 5, 5, 20])

    def test_total(self):
        self.assertEqual(total({"nut": 10, "bolt": 3}, {"nut": 10, "bolt": 2}), 101)

    def test_fulfil(self):
        stock = Stock()
        stock.add("nut", 5)
        self.assertEqual(fulfil(stock, {"nut": 2}, {"nut": 3}), (6, []))
        self.assertEqual(stock.counts, {"nut": 2})

    def test_missing_items_leave_the_stock(self):
        stock = Stock()
        stock.add("nut", 5)
        self.assertEqual(fulfil(stock, {}, {"nut": 3, "bolt": 1, "axle": 2}), (0, ["axle", "bolt"]))
        self.assertEqual(stock.counts, {"nut": 5})
"""

CALCULATOR = """
=== PACKAGE/__init__.py
=== PACKAGE/lexer.py
def tokens(text):
    found = []
    place = 0
    while place < len(text):
        letter = text[place]
        if letter.isspace():
            place += 1
        elif letter.isdigit():
            end = place
            while end < len(text) and text[end].isdigit():
                end += 1
            found.append(("number", int(text[place:end])))
            place = end
        elif letter.isalpha():
            end = place
            while end < len(text) and text[end].isalnum():
                end += 1
            found.append(("name", text[place:end]))
            place = end
        elif letter in "+-*/()":
            found.append(("sign", letter))
            place += 1
        else:
            raise SyntaxError(f"unknown {letter!r} at {place}")
    return found
=== PACKAGE/parser.py
from PACKAGE.lexer import tokens


class Parser:
    def __init__(self, text):
        self.tokens = tokens(text)
        self.place = 0

    def peek(self):
        return self.tokens[self.place] if self.place < len(self.tokens) else ("end", None)

    def take(self):
        token = self.peek()
        self.place += 1
        return token

    def chain(self, part, signs):
        tree = part()
        while self.peek()[0] == "sign" and self.peek()[1] in signs:
            sign = self.take()[1]
            tree = (sign, tree, part())
        return tree

    def sum(self):
        return self.chain(self.product, "+-")

    def product(self):
        return self.chain(self.atom, "*/")

    def atom(self):
        kind, value = self.take()
        if kind == "sign" and value == "-":
            return ("neg", self.atom())
        if kind == "sign" and value == "(":
            tree = self.sum()
            if self.take() != ("sign", ")"):
                raise SyntaxError("missing )")
            return tree
        if kind not in ("number", "name"):
            raise SyntaxError(f"unexpected {value!r}")
        return (kind, value)


def parse(text):
    parser = Parser(text)
    tree = parser.sum()
    if parser.peek()[0] != "end":
        raise SyntaxError(f"unexpected {parser.peek()[1]!r}")
    return tree
=== PACKAGE/evaluate.py
from PACKAGE.parser import parse


def evaluate(tree, names):
    kind = tree[0]
    if kind == "number":
        return tree[1]
    if kind == "name":
        return names[tree[1]]
    if kind == "neg":
        return -evaluate(tree[1], names)
    left, right = evaluate(tree[1], names), evaluate(tree[2], names)
    if kind == "+":
        return left + right
    if kind == "-":
        return left - right
    if kind == "*":
        return left * right
    return left // right


def calculate(text, **names):
    return evaluate(parse(text), names)
=== tests/__init__.py
=== tests/test_lexer.py
import unittest

from PACKAGE.lexer import tokens


class LexerTest(unittest.TestCase):
    def test_numbers_and_names(self):
        self.assertEqual(tokens("12 x1"), [("number", 12), ("name", "x1")])

    def test_signs_without_spaces(self):
        self.assertEqual(tokens("(1)"), [("sign", "("), ("number", 1), ("sign", ")")])

    def test_unknown(self):
        with self.assertRaises(SyntaxError):
            tokens("1 ? 2")
=== tests/test_calculate.py
import unittest

from PACKAGE.evaluate import calculate
from PACKAGE.parser import parse


class CalculateTest(unittest.TestCase):
    def test_products_before_sums(self):
        self.assertEqual(calculate("2 + 3 * 4"), 14)

    def test_from_left_to_right(self):
        self.assertEqual(calculate("10 - 3 - 2"), 5)
        self.assertEqual(calculate("24 / 4 / 2"), 3)

    def test_parentheses(self):
        self.assertEqual(calculate("(2 + 3) * 4"), 20)

    def test_minus_signs(self):
        self.assertEqual(calculate("-2 - -3"), 1)

    def test_names(self):
        self.assertEqual(calculate("x * x + y1", x=3, y1=4), 13)

    def test_wrong_ends(self):
        for text in ("(1", "1 2", "", "1 +", ")"):
            with self.subTest(text), self.assertRaises(SyntaxError):
                parse(text)
"""

TEXT_TABLE = """
=== PACKAGE/__init__.py
from PACKAGE.table import render
=== PACKAGE/align.py
def pad(text, width, side="left"):
    if len(text) > width:
        return text[: width - 1] + "~"
    room = width - len(text)
    if side == "left":
        return text + " " * room
    if side == "right":
        return " " * room + text
    return " " * (room // 2) + text + " " * (room - room // 2)


def is_number(text):
    return text.lstrip("-").replace(".", "", 1).isdigit()
=== PACKAGE/columns.py
from PACKAGE.align import is_number


def widths(rows, most):
    found = [0] * max(len(row) for row in rows)
    for row in rows:
        for place, cell in enumerate(row):
            found[place] = max(found[place], len(cell))
    return [min(width, most) for width in found]


def sides(rows):
    num = max(len(row) for row in rows)
    columns = [[row[place] for row in rows if place < len(row)] for place in range(num)]
    return ["right" if all(is_number(cell) for cell in column) else "left" for column in columns]
=== PACKAGE/table.py
from PACKAGE.align import pad
from PACKAGE.columns import sides, widths


def render(head, rows, most=20):
    cells = [[str(cell) for cell in row] for row in rows]
    wide = widths([head, *cells], most)
    where = sides(cells)
    lines = [" ".join(pad(cell, width, "centre") for cell, width in zip(head, wide)).rstrip()]
    lines.append(" ".join("-" * width for width in wide))
    for row in cells:
        row = row + [""] * (len(wide) - len(row))
        lines.append(" ".join(pad(cell, width, side) for cell, width, side in zip(row, wide, where)).rstrip())
    return "\\n".join(lines)
=== tests/__init__.py
=== tests/test_align.py
import unittest

from PACKAGE.align import is_number, pad


class AlignTest(unittest.TestCase):
    def test_sides(self):
        self.assertEqual(pad("ab", 5), "ab   ")
        self.assertEqual(pad("ab", 5, "right"), "   ab")
        self.assertEqual(pad("ab", 5, "centre"), " ab  ")

    def test_too_long(self):
        self.assertEqual(pad("abcdef", 4), "abc~")
        self.assertEqual(pad("abcd", 4), "abcd")

    def test_numbers(self):
        self.assertTrue(is_number("-1.5") and is_number("12"))
        self.assertFalse(is_number("1.2.3") or is_number("x") or is_number(""))
=== tests/test_table.py
import unittest

from PACKAGE import render
from PACKAGE.columns import sides, widths


class TableTest(unittest.TestCase):
    def test_widths(self):
        self.assertEqual(widths([["a", "bbbb"], ["ccc"]], 3), [3, 3])

    def test_sides(self):
        self.assertEqual(sides([["a", "1"], ["2", "-3"], ["4"]]), ["left", "right"])

    def test_render(self):
        text = render(["name", "n"], [["nut", 5], ["bolt", 12]])
        self.assertEqual(text, "name n\\n---- --\\nnut   5\\nbolt 12")

    def test_short_rows(self):
        self.assertEqual(render(["a", "b"], [["x"], ["y", "z"]]).splitlines()[2:], ["x", "y z"])

    def test_cut(self):
        self.assertEqual(render(["a"], [["abcdef"]], most=3).splitlines()[-1], "ab~")
"""

CACHE = """
=== PACKAGE/__init__.py
=== PACKAGE/clock.py
class Clock:
    def __init__(self, now=0):
        self.now = now

    def advance(self, seconds):
        if seconds < 0:
            raise ValueError("time does not run back")
        self.now += seconds
=== PACKAGE/lru.py
class LeastRecent:
    def __init__(self, size):
        self.size = size
        self.entries = {}

    def get(self, key, default=None):
        if key not in self.entries:
            return default
        value = self.entries.pop(key)
        self.entries[key] = value
        return value

    def put(self, key, value):
        self.entries.pop(key, None)
        self.entries[key] = value
        while len(self.entries) > self.size:
            del self.entries[next(iter(self.entries))]
=== PACKAGE/expiring.py
from PACKAGE.lru import LeastRecent


class Expiring:
    def __init__(self, clock, seconds, size=100):
        self.clock = clock
        self.seconds = seconds
        self.entries = LeastRecent(size)
        self.hits = 0
        self.misses = 0

    def fetch(self, key, make):
        found = self.entries.get(key)
        if found is not None and self.clock.now - found[0] < self.seconds:
            self.hits += 1
            return found[1]
        self.misses += 1
        value = make(key)
        self.entries.put(key, (self.clock.now, value))
        return value

    def rate(self):
        asked = self.hits + self.misses
        return 0.0 if asked == 0 else self.hits / asked
=== tests/__init__.py
=== tests/test_lru.py
import unittest

from PACKAGE.lru import LeastRecent


class LeastRecentTest(unittest.TestCase):
    def test_oldest_leaves(self):
        cache = LeastRecent(2)
        for key in "abc":
            cache.put(key, key * 2)
        self.assertEqual(list(cache.entries), ["b", "c"])

    def test_use_keeps(self):
        cache = LeastRecent(2)
        cache.put("a", 1)
        cache.put("b", 2)
        self.assertEqual(cache.get("a"), 1)
        cache.put("c", 3)
        self.assertEqual(cache.entries, {"a": 1, "c": 3})

    def test_put_again(self):
        cache = LeastRecent(2)
        for key, value in (("a", 1), ("b", 2), ("a", 3), ("c", 4)):
            cache.put(key, value)
        self.assertEqual(cache.entries, {"a": 3, "c": 4})

    def test_default(self):
        self.assertIsNone(LeastRecent(1).get("a"))
        self.assertEqual(LeastRecent(1).get("a", 5), 5)
=== tests/test_expiring.py
import unittest

from PACKAGE.clock import Clock
from PACKAGE.expiring import Expiring


class ExpiringTest(unittest.TestCase):
    def setUp(self):
        self.clock = Clock()
        self.made = []
        self.cache = Expiring(self.clock, 10)

    def make(self, key):
        self.made.append(key)
        return len(self.made)

    def test_fresh(self):
        self.assertEqual([self.cache.fetch("a", self.make) for _ in range(2)], [1, 1])
        self.assertEqual(self.cache.rate(), 0.5)

    def test_stale(self):
        self.cache.fetch("a", self.make)
        self.clock.advance(9)
        self.assertEqual(self.cache.fetch("a", self.make), 1)
        self.clock.advance(1)
        self.assertEqual(self.cache.fetch("a", self.make), 2)
        self.assertEqual((self.cache.hits, self.cache.misses), (1, 2))

    def test_never_asked(self):
        self.assertEqual(self.cache.rate(), 0.0)

    def test_clock(self):
        self.clock.advance(3)
        self.clock.advance(0)
        self.assertEqual(self.clock.now, 3)
        with self.assertRaises(ValueError):
            self.clock.advance(-1)
"""

ALL = {"inventory": INVENTORY, "calculator": CALCULATOR, "text_table": TEXT_TABLE, "cache": CACHE, **MORE}


def files_of(name: str, package: str) -> dict[str, str]:
    """Files of a template, by path, with a name for its package."""
    files: dict[str, str] = {}
    for part in ALL[name].replace("PACKAGE", package).strip().split("=== ")[1:]:
        path, _, text = part.partition("\n")
        files[path] = text
    return files
