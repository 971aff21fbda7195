"""More of the packages of `repository_templates.py`."""

LIBRARY = """
=== PACKAGE/__init__.py
=== PACKAGE/dates.py
LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def is_leap(year):
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


def days_in(year, month):
    return 29 if month == 2 and is_leap(year) else LENGTHS[month - 1]


def add_days(date, days):
    year, month, day = date
    day += days
    while day > days_in(year, month):
        day -= days_in(year, month)
        month += 1
        if month > 12:
            year, month = year + 1, 1
    return year, month, day
=== PACKAGE/fees.py
def fee(days_late):
    if days_late <= 0:
        return 0
    return min(20 * days_late, 500)
=== PACKAGE/loans.py
from PACKAGE.dates import add_days

MOST = 3


class Loans:
    def __init__(self, days=28):
        self.days = days
        self.due = {}

    def lend(self, reader, book, date):
        if book in self.due:
            return False
        if sum(who == reader for who, _ in self.due.values()) >= MOST:
            return False
        self.due[book] = (reader, add_days(date, self.days))
        return True

    def overdue(self, date):
        return sorted(book for book, (_, due) in self.due.items() if due < date)

    def give_back(self, book):
        return self.due.pop(book)[0]
=== tests/__init__.py
=== tests/test_dates.py
import unittest

from PACKAGE.dates import add_days, days_in, is_leap


class DatesTest(unittest.TestCase):
    def test_leap_years(self):
        self.assertEqual([is_leap(y) for y in (1900, 2000, 2023, 2024)], [False, True, False, True])

    def test_days(self):
        self.assertEqual([days_in(2023, 2), days_in(2024, 2), days_in(2024, 12)], [28, 29, 31])

    def test_add(self):
        self.assertEqual(add_days((2023, 1, 31), 1), (2023, 2, 1))
        self.assertEqual(add_days((2023, 12, 30), 3), (2024, 1, 2))
        self.assertEqual(add_days((2024, 2, 1), 28), (2024, 2, 29))
=== tests/test_loans.py
import unittest

from PACKAGE.fees import fee
from PACKAGE.loans import Loans


class LoansTest(unittest.TestCase):
    def test_fees(self):
        self.assertEqual([fee(d) for d in (-1, 0, 1, 25, 26)], [0, 0, 20, 500, 500])

    def test_one_reader_a_book(self):
        loans = Loans()
        self.assertTrue(loans.lend("ann", "x", (2023, 1, 1)))
        self.assertFalse(loans.lend("bob", "x", (2023, 1, 1)))

    def test_most(self):
        loans = Loans()
        self.assertEqual([loans.lend("ann", book, (2023, 1, 1)) for book in "wxyz"], [True, True, True, False])
        self.assertEqual(loans.give_back("x"), "ann")
        self.assertTrue(loans.lend("ann", "z", (2023, 1, 1)))

    def test_overdue(self):
        loans = Loans(7)
        loans.lend("ann", "y", (2023, 1, 1))
        loans.lend("bob", "x", (2023, 1, 1))
        self.assertEqual(loans.overdue((2023, 1, 8)), [])
        self.assertEqual(loans.overdue((2023, 1, 9)), ["x", "y"])
"""

ROUTES = """
=== PACKAGE/__init__.py
=== PACKAGE/graph.py
class Graph:
    def __init__(self):
        self.edges = {}

    def connect(self, a, b, length):
        if length < 0:
            raise ValueError("a length below 0")
        for start, end in ((a, b), (b, a)):
            known = self.edges.setdefault(start, {})
            known[end] = min(length, known.get(end, length))
=== PACKAGE/search.py
import heapq


def shortest(graph, start, goal):
    queue = [(0, start, (start,))]
    seen = set()
    while queue:
        length, place, path = heapq.heappop(queue)
        if place == goal:
            return length, list(path)
        if place in seen:
            continue
        seen.add(place)
        for other, step in graph.edges.get(place, {}).items():
            if other not in seen:
                heapq.heappush(queue, (length + step, other, (*path, other)))
    return None
=== PACKAGE/reach.py
def within(graph, start, steps):
    found = {start: 0}
    border = [start]
    while border:
        place = border.pop(0)
        if found[place] == steps:
            continue
        for other in graph.edges.get(place, {}):
            if other not in found:
                found[other] = found[place] + 1
                border.append(other)
    return found


def parts(graph):
    left = sorted(graph.edges)
    groups = []
    while left:
        group = sorted(within(graph, left[0], -1))
        groups.append(group)
        left = [place for place in left if place not in group]
    return groups
=== tests/__init__.py
=== tests/test_search.py
import unittest

from PACKAGE.graph import Graph
from PACKAGE.search import shortest


def made():
    graph = Graph()
    for a, b, length in (("a", "b", 4), ("b", "c", 1), ("a", "c", 9), ("c", "d", 2), ("x", "y", 1)):
        graph.connect(a, b, length)
    return graph


class SearchTest(unittest.TestCase):
    def test_shortest(self):
        self.assertEqual(shortest(made(), "a", "d"), (7, ["a", "b", "c", "d"]))

    def test_both_ways(self):
        self.assertEqual(shortest(made(), "d", "a")[0], 7)

    def test_none(self):
        self.assertIsNone(shortest(made(), "a", "x"))
        self.assertEqual(shortest(made(), "q", "q"), (0, ["q"]))

    def test_shorter_edge_counts(self):
        graph = made()
        graph.connect("a", "b", 2)
        graph.connect("b", "a", 6)
        self.assertEqual(graph.edges["a"]["b"], 2)
        with self.assertRaises(ValueError):
            graph.connect("a", "b", -1)
        graph.connect("a", "z", 0)
=== tests/test_reach.py
import unittest

from PACKAGE.reach import parts, within
from tests.test_search import made


class ReachTest(unittest.TestCase):
    def test_within(self):
        self.assertEqual(within(made(), "a", 1), {"a": 0, "b": 1, "c": 1})
        self.assertEqual(within(made(), "a", 2), {"a": 0, "b": 1, "c": 1, "d": 2})
        self.assertEqual(within(made(), "a", 0), {"a": 0})

    def test_parts(self):
        self.assertEqual(parts(made()), [["a", "b", "c", "d"], ["x", "y"]])
"""

SETTINGS = """
=== PACKAGE/__init__.py
=== PACKAGE/reader.py
def read(text):
    sections = {"": {}}
    name = ""
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        if line.startswith("[") and line.endswith("]"):
            name = line[1:-1].strip()
            sections.setdefault(name, {})
        elif "=" in line:
            key, value = line.split("=", 1)
            sections[name][key.strip()] = value.strip()
        else:
            raise ValueError(f"line {number}: expected key = value")
    return sections
=== PACKAGE/values.py
WORDS = {"yes": True, "true": True, "no": False, "false": False}


def convert(text):
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    if "," in text:
        return [convert(part.strip()) for part in text.split(",") if part.strip()]
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text
=== PACKAGE/settings.py
from PACKAGE.reader import read
from PACKAGE.values import convert


class Settings:
    def __init__(self, text, defaults=None):
        self.sections = read(text)
        self.defaults = defaults or {}

    def get(self, path):
        section, _, key = path.rpartition(".")
        found = self.sections.get(section, {})
        if key in found:
            return convert(found[key])
        if path in self.defaults:
            return self.defaults[path]
        raise KeyError(path)

    def unknown(self):
        given = {f"{section}.{key}".lstrip(".") for section, keys in self.sections.items() for key in keys}
        return sorted(given - set(self.defaults))
=== tests/__init__.py
=== tests/test_reader.py
import unittest

from PACKAGE.reader import read


class ReaderTest(unittest.TestCase):
    def test_sections(self):
        self.assertEqual(read("a = 1\\n[ s ]\\nb=x=y # why\\n"), {"": {"a": "1"}, "s": {"b": "x=y"}})

    def test_sections_may_come_twice(self):
        self.assertEqual(read("[s]\\na=1\\n[t]\\n[s]\\nb=2")["s"], {"a": "1", "b": "2"})

    def test_wrong_line(self):
        with self.assertRaises(ValueError) as caught:
            read("a = 1\\n\\nwhat")
        self.assertIn("line 3", str(caught.exception))
=== tests/test_settings.py
import unittest

from PACKAGE.settings import Settings
from PACKAGE.values import convert


class SettingsTest(unittest.TestCase):
    def test_values(self):
        self.assertEqual([convert(t) for t in ("3", "-1.5", "Yes", "no", "x")], [3, -1.5, True, False, "x"])
        self.assertEqual(convert("1, b,,2.0"), [1, "b", 2.0])

    def test_get(self):
        settings = Settings("size = 3\\n[net]\\nport = 80", {"net.host": "here", "size": 1})
        self.assertEqual([settings.get(p) for p in ("size", "net.port", "net.host")], [3, 80, "here"])
        with self.assertRaises(KeyError):
            settings.get("net.user")

    def test_unknown(self):
        settings = Settings("size = 3\\n[net]\\nport = 80\\nhost = x", {"net.host": "here", "size": 1})
        self.assertEqual(settings.unknown(), ["net.port"])
        self.assertEqual(Settings("b = 1\\na = 1").unknown(), ["a", "b"])
"""

MATRIX = """
=== PACKAGE/__init__.py
=== PACKAGE/matrix.py
def shape(matrix):
    return len(matrix), len(matrix[0])


def multiply(a, b):
    if shape(a)[1] != shape(b)[0]:
        raise ValueError("shapes do not fit")
    columns = list(zip(*b))
    return [[sum(x * y for x, y in zip(row, column)) for column in columns] for row in a]


def identity(size):
    return [[1 if row == column else 0 for column in range(size)] for row in range(size)]


def power(matrix, times):
    result = identity(len(matrix))
    while times > 0:
        if times % 2 == 1:
            result = multiply(result, matrix)
        matrix = multiply(matrix, matrix)
        times //= 2
    return result
=== PACKAGE/solve.py
from fractions import Fraction


def determinant(matrix):
    rows = [[Fraction(value) for value in row] for row in matrix]
    result = Fraction(1)
    for place in range(len(rows)):
        pivot = next((r for r in range(place, len(rows)) if rows[r][place] != 0), None)
        if pivot is None:
            return 0
        if pivot != place:
            rows[place], rows[pivot] = rows[pivot], rows[place]
            result = -result
        result *= rows[place][place]
        for below in range(place + 1, len(rows)):
            factor = rows[below][place] / rows[place][place]
            rows[below] = [x - factor * y for x, y in zip(rows[below], rows[place])]
    return int(result)
=== PACKAGE/sequences.py
from PACKAGE.matrix import power


def fibonacci(number):
    return power([[1, 1], [1, 0]], number)[0][1]


def paths(edges, start, end, steps):
    size = 1 + max(max(edge) for edge in edges)
    matrix = [[0] * size for _ in range(size)]
    for a, b in edges:
        matrix[a][b] += 1
    return power(matrix, steps)[start][end]
=== tests/__init__.py
=== tests/test_matrix.py
import unittest

from PACKAGE.matrix import multiply, power
from PACKAGE.solve import determinant


class MatrixTest(unittest.TestCase):
    def test_multiply(self):
        self.assertEqual(multiply([[1, 2, 3]], [[1, 0], [0, 1], [2, 2]]), [[7, 8]])
        with self.assertRaises(ValueError):
            multiply([[1, 2]], [[1, 2]])

    def test_power(self):
        self.assertEqual(power([[1, 1], [0, 1]], 5), [[1, 5], [0, 1]])
        self.assertEqual(power([[3, 1], [2, 1]], 0), [[1, 0], [0, 1]])

    def test_determinant(self):
        self.assertEqual(determinant([[2, 1], [1, 3]]), 5)
        self.assertEqual(determinant([[0, 1], [1, 0]]), -1)
        self.assertEqual(determinant([[1, 2], [2, 4]]), 0)
        self.assertEqual(determinant([[0, 2, 1], [3, 1, 0], [1, 0, 4]]), -25)
=== tests/test_sequences.py
import unittest

from PACKAGE.sequences import fibonacci, paths


class SequencesTest(unittest.TestCase):
    def test_fibonacci(self):
        self.assertEqual([fibonacci(n) for n in range(8)], [0, 1, 1, 2, 3, 5, 8, 13])

    def test_paths(self):
        edges = [(0, 1), (0, 2), (1, 3), (2, 3), (0, 1)]
        self.assertEqual(paths(edges, 0, 3, 2), 3)
        self.assertEqual(paths(edges, 0, 3, 1), 0)
"""

QUEUE = """
=== PACKAGE/__init__.py
=== PACKAGE/jobs.py
class Job:
    def __init__(self, name, priority=0, after=()):
        self.name = name
        self.priority = priority
        self.after = set(after)
        self.tries = 0
=== PACKAGE/policy.py
def delay(tries, base=2, most=60):
    return min(most, base ** tries)


def may_retry(job, limit):
    return job.tries < limit
=== PACKAGE/runner.py
from PACKAGE.policy import delay, may_retry


class Runner:
    def __init__(self, limit=3):
        self.limit = limit
        self.waiting = []
        self.done = []
        self.failed = []
        self.slept = 0

    def submit(self, job):
        if any(job.name == other.name for other in self.waiting):
            raise ValueError(f"{job.name} waits already")
        self.waiting.append(job)

    def next(self):
        ready = [job for job in self.waiting if job.after <= set(self.done)]
        return min(ready, key=lambda job: (-job.priority, job.name)) if ready else None

    def run(self, work):
        while (job := self.next()) is not None:
            job.tries += 1
            if work(job):
                self.waiting.remove(job)
                self.done.append(job.name)
            elif may_retry(job, self.limit):
                self.slept += delay(job.tries)
            else:
                self.waiting.remove(job)
                self.failed.append(job.name)
        return not self.failed and not self.waiting
=== tests/__init__.py
=== tests/test_runner.py
import unittest

from PACKAGE.jobs import Job
from PACKAGE.policy import delay
from PACKAGE.runner import Runner


class RunnerTest(unittest.TestCase):
    def test_order(self):
        runner = Runner()
        for job in (Job("b"), Job("a"), Job("c", priority=2), Job("d", priority=9, after=["a"])):
            runner.submit(job)
        self.assertTrue(runner.run(lambda job: True))
        self.assertEqual(runner.done, ["c", "a", "d", "b"])

    def test_tries(self):
        runner = Runner(limit=3)
        runner.submit(Job("a"))
        seen = []
        self.assertFalse(runner.run(lambda job: seen.append(job.tries)))
        self.assertEqual((seen, runner.failed, runner.slept), ([1, 2, 3], ["a"], 6))

    def test_success_at_last(self):
        runner = Runner(limit=3)
        runner.submit(Job("a"))
        self.assertTrue(runner.run(lambda job: job.tries == 2))
        self.assertEqual((runner.done, runner.failed), (["a"], []))

    def test_what_waits_for_a_failure_stays(self):
        runner = Runner(limit=1)
        runner.submit(Job("a"))
        runner.submit(Job("b", after=["a"]))
        self.assertFalse(runner.run(lambda job: False))
        self.assertEqual([job.name for job in runner.waiting], ["b"])

    def test_waiting_forever(self):
        runner = Runner()
        runner.submit(Job("a", after=["b"]))
        self.assertFalse(runner.run(lambda job: True))

    def test_names_are_unique(self):
        runner = Runner()
        runner.submit(Job("a"))
        runner.submit(Job("b"))
        with self.assertRaises(ValueError):
            runner.submit(Job("a"))

    def test_delay(self):
        self.assertEqual([delay(n) for n in (1, 2, 5, 6)], [2, 4, 32, 60])
"""

MORE = {"library": LIBRARY, "routes": ROUTES, "settings": SETTINGS, "matrix": MATRIX, "queue": QUEUE}
