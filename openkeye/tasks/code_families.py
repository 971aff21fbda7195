"""The families of generated problems: what is asked, a reference, inputs that grow, and mistakes that tests must find.

Words with a dollar are constants that each problem draws anew.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Values = Mapping[str, object]


@dataclass(frozen=True)
class Family:
    """One kind of problem."""

    statement: str
    source: str
    # Python that defines solve(text) -> text
    make_input: Callable[[random.Random, int, Values], str]
    # of a size from 1 on
    mistakes: tuple[tuple[str, str], ...]
    # (what stands in the source, what a wrong program has instead)
    values: Callable[[random.Random], Values]
    # draws its constants


FOUR_STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))
EIGHT_STEPS = (*FOUR_STEPS, (1, 1), (1, -1), (-1, 1), (-1, -1))


def _lines(*rows: object) -> str:
    return "\n".join(" ".join(map(str, row)) if isinstance(row, (list, tuple)) else str(row) for row in rows) + "\n"


def _numbers(rng: random.Random, size: int, low: int = -50, high: int = 50) -> list[int]:
    return [rng.randint(low, high) for _ in range(rng.randint(size, 3 * size) + 1)]


def _list_input(rng: random.Random, size: int, values: Values) -> str:
    numbers = _numbers(rng, size)
    # Equal numbers are where mistakes show.
    numbers += rng.choices(numbers, k=2)
    return _lines([len(numbers)], numbers)


def _word(rng: random.Random, low: int, high: int, letters: str = "abcde") -> str:
    return "".join(rng.choices(letters, k=rng.randint(low, high)))


def _graph_input(rng: random.Random, size: int, values: Values) -> str:
    num = size + 3
    edges = [(rng.randint(1, num), rng.randint(1, num), rng.randint(1, 20)) for _ in range(rng.randint(num - 2, 2 * num))]
    return _lines([num, len(edges)], *edges)


def _order_input(rng: random.Random, size: int, values: Values) -> str:
    names = list(range(1, size + 4))
    rng.shuffle(names)
    pairs = {tuple(sorted(rng.sample(range(len(names)), 2))) for _ in range(size + 2)}
    edges = [(names[a], names[b]) for a, b in pairs]
    if size % 3 == 0:
        a, b = edges[0]
        edges.append((b, a))
    return _lines([len(names), len(edges)], *edges)


def _grid_input(rng: random.Random, size: int, values: Values) -> str:
    height, width = rng.randint(2, size + 3), rng.randint(2, size + 3)
    rows = [[rng.choice("..#") for _ in range(width)] for _ in range(height)]
    rows[0][0] = rows[-1][-1] = "."
    return _lines([height, width], *("".join(row) for row in rows))


def _knapsack_input(rng: random.Random, size: int, values: Values) -> str:
    items = [(rng.randint(1, 12), rng.randint(1, 40)) for _ in range(size + 2)]
    return _lines([len(items), rng.randint(5, 10 + 4 * size)], *items)


def _interval_input(rng: random.Random, size: int, values: Values) -> str:
    starts = [rng.randint(0, 10 * size) for _ in range(size + 2)]
    return _lines([len(starts)], *((start, start + rng.choice([2, 5, 9 * size])) for start in starts))


def _brackets_input(rng: random.Random, size: int, values: Values) -> str:
    def whole(depth: int) -> str:
        if depth == 0:
            return ""
        left, right = rng.choice([("(", ")"), ("[", "]"), ("{", "}")])
        return left + whole(depth - 1) + right + whole(rng.randint(0, depth - 1))

    rows = []
    for number in range(size + 2):
        row = list(whole(1 + number % 4))
        if number % 2:
            place = rng.randrange(len(row))
            row[place : place + 1] = rng.choice(["", "(", "]", "}"])
        rows.append("".join(row) or "(")
    return _lines([len(rows)], *rows)


FAMILIES = {
    "sort_by_remainder": Family(
        "Given n and n integers, print them sorted by their remainder modulo $m (from 0 to $m - 1); numbers of equal "
        "remainders in ascending order. One line, separated by spaces.",
        """
def solve(text):
    numbers = [int(word) for word in text.split()[1:]]
    return " ".join(map(str, sorted(numbers, key=lambda number: (number % $m, number))))
""",
        _list_input,
        (("(number % $m, number)", "(number % $m, -number)"), ("(number % $m, number)", "(abs(number) % $m, number)")),
        lambda rng: {"m": rng.randint(3, 9)},
    ),
    "kth_distinct": Family(
        "Given n and n integers, print the $k-th largest distinct value, or `none` if there are fewer than $k distinct values.",
        """
def solve(text):
    numbers = sorted(set(map(int, text.split()[1:])), reverse=True)
    return str(numbers[$k - 1]) if len(numbers) >= $k else "none"
""",
        _list_input,
        (("set(map(int, text.split()[1:]))", "map(int, text.split()[1:])"), ("numbers[$k - 1]", "numbers[-1]")),
        lambda rng: {"k": rng.randint(2, 5)},
    ),
    "best_segment": Family(
        "Given n and n integers, print the largest sum of a segment of at least $k neighbouring numbers.",
        """
def solve(text):
    numbers = [int(word) for word in text.split()[1:]]
    sums = [0]
    for number in numbers:
        sums.append(sums[-1] + number)
    lowest, best = sums[0], None
    for end in range($k, len(sums)):
        lowest = min(lowest, sums[end - $k])
        if best is None or sums[end] - lowest > best:
            best = sums[end] - lowest
    return str(best)
""",
        lambda rng, size, values: _list_input(rng, size + 3, values),
        (("min(lowest, sums[end - $k])", "sums[end - $k]"), ("range($k, len(sums))", "range($k, len(sums) - 1)")),
        lambda rng: {"k": rng.randint(1, 3)},
    ),
    "digit_sum": Family(
        "Given integers a and b, print how many numbers from a to b inclusive have a sum of digits in base $base that is "
        "divisible by $m.",
        """
def solve(text):
    low, high = map(int, text.split())
    count = 0
    for number in range(low, high + 1):
        total = 0
        while number:
            total += number % $base
            number //= $base
        count += total % $m == 0
    return str(count)
""",
        lambda rng, size, values: _lines(sorted(rng.randint(1, 60 * size) for _ in range(2))),
        (("range(low, high + 1)", "range(low + 1, high)"), ("number % $base", "number % ($base + 1)")),
        lambda rng: {"base": rng.choice([2, 3, 5, 7, 8, 9]), "m": rng.randint(2, 4)},
    ),
    "power": Family(
        "Given q and then q pairs a b, print a to the power of b modulo $m for each pair, one a line. a is below 10^9 and b "
        "below 10^18.",
        """
def solve(text):
    words = list(map(int, text.split()[1:]))
    return "\\n".join(str(pow(a, b, $m)) for a, b in zip(words[::2], words[1::2]))
""",
        lambda rng, size, values: _lines(
            [size], *((rng.randrange(10**9), rng.choice([0, rng.randrange(100), rng.randrange(10**18)])) for _ in range(size))
        ),
        (("pow(a, b, $m)", "pow(a, b % $m, $m)"), ("pow(a, b, $m)", "pow(a, b % 1000, $m)")),
        lambda rng: {"m": rng.choice([1_000_003, 998_244_353, 1_000_007, 12_347])},
    ),
    "runs": Family(
        "Given one word a line, compress each: every run of at least $k equal letters becomes the letter and its length, "
        "shorter runs stay as they are. Print one word a line.",
        """
import itertools

def solve(text):
    lines = []
    for word in text.split():
        runs = [(letter, len(list(group))) for letter, group in itertools.groupby(word)]
        lines.append("".join(letter + str(num) if num >= $k else letter * num for letter, num in runs))
    return "\\n".join(lines)
""",
        lambda rng, size, values: _lines(
            *("".join(_word(rng, 1, 1) * rng.randint(1, 6) for _ in range(rng.randint(1, 5))) for _ in range(size + 3))
        ),
        (("num >= $k", "num > $k"), ("letter + str(num)", "str(num) + letter")),
        lambda rng: {"k": rng.randint(2, 3)},
    ),
    "shift": Family(
        "Given one word of small letters a line, shift the letter at place i (from 0) forward by $step * i places of the "
        "alphabet, round from z to a. Print one word a line.",
        """
def solve(text):
    lines = []
    for word in text.split():
        lines.append("".join(chr(97 + (ord(c) - 97 + $step * i) % 26) for i, c in enumerate(word)))
    return "\\n".join(lines)
""",
        lambda rng, size, values: _lines(*(_word(rng, 3, 14, "abcmnxyz") for _ in range(size + 1))),
        (("enumerate(word)", "enumerate(word, 1)"), (" % 26", "")),
        lambda rng: {"step": rng.randint(2, 11)},
    ),
    "frequent_words": Family(
        "Given words, print the $k most frequent ones with their counts, one a line as `word count`: most frequent first, and "
        "words of equal count in alphabetical order. Fewer words if there are fewer.",
        """
from collections import Counter

def solve(text):
    ranked = sorted(Counter(text.split()).items(), key=lambda item: (-item[1], item[0]))
    return "\\n".join(f"{word} {count}" for word, count in ranked[:$k])
""",
        lambda rng, size, values: _lines([_word(rng, 1, 2, "abc") for _ in range(6 * size + 4)]),
        (("(-item[1], item[0])", "(item[1], item[0])"), ("ranked[:$k]", "ranked[: $k - 1]")),
        lambda rng: {"k": rng.randint(2, 4)},
    ),
    "brackets": Family(
        "Given n and n lines of brackets ()[]{}, print for each line `yes` if they are balanced and nested at most $depth "
        "deep, else `no`.",
        """
def solve(text):
    lines = []
    for row in text.split()[1:]:
        stack, is_right = [], True
        for letter in row:
            if letter in "([{":
                stack.append({"(": ")", "[": "]", "{": "}"}[letter])
                is_right = is_right and len(stack) <= $depth
            elif not stack or stack.pop() != letter:
                is_right = False
                break
        lines.append("yes" if is_right and not stack else "no")
    return "\\n".join(lines)
""",
        _brackets_input,
        ((" and not stack else", " else"), ("len(stack) <= $depth", "len(stack) < $depth")),
        lambda rng: {"depth": rng.randint(2, 3)},
    ),
    "shortest_path": Family(
        "A graph has n nodes and m undirected edges. Given n and m, and m lines `a b length`, print the length of the "
        "shortest path from node 1 to node n, where every node entered costs $toll more. Print -1 if there is none.",
        """
import heapq

def solve(text):
    words = list(map(int, text.split()))
    num = words[0]
    edges = {node: [] for node in range(1, num + 1)}
    for a, b, length in zip(words[2::3], words[3::3], words[4::3]):
        edges[a].append((b, length))
        edges[b].append((a, length))
    best, queue = {}, [(0, 1)]
    while queue:
        cost, node = heapq.heappop(queue)
        if node in best:
            continue
        best[node] = cost
        for other, length in edges[node]:
            heapq.heappush(queue, (cost + length + $toll, other))
    return str(best.get(num, -1))
""",
        _graph_input,
        (("        edges[b].append((a, length))\n", ""), ("cost + length + $toll", "cost + length")),
        lambda rng: {"toll": rng.randint(1, 5)},
    ),
    "components": Family(
        "A graph has n nodes and m undirected edges. Given n and m, and m lines `a b weight`, print the number of "
        "connected parts when only edges of a weight of at least $least are kept, and the size of the largest part.",
        """
def solve(text):
    words = list(map(int, text.split()))
    root = list(range(words[0] + 1))

    def find(node):
        while root[node] != node:
            node = root[node]
        return node

    for a, b, weight in zip(words[2::3], words[3::3], words[4::3]):
        if weight >= $least:
            root[find(a)] = find(b)
    roots = [find(node) for node in range(1, words[0] + 1)]
    return f"{len(set(roots))} {max(map(roots.count, roots))}"
""",
        _graph_input,
        (
            ("            root[find(a)] = find(b)", "            root[max(a, b)] = min(a, b)"),
            ("weight >= $least", "weight < $least"),
        ),
        lambda rng: {"least": rng.randint(4, 12)},
    ),
    "order": Family(
        "Given n and m, and m lines `a b` that say that job a comes before job b, print an order of the jobs 1 to n: of "
        "the jobs that may come next always the one with the $which number. Print `circle` if there is no order.",
        """
def solve(text):
    words = list(map(int, text.split()))
    num = words[0]
    before = {job: set() for job in range(1, num + 1)}
    for a, b in zip(words[2::2], words[3::2]):
        before[b].add(a)
    order = []
    while len(order) < num:
        ready = [job for job in before if job not in order and before[job] <= set(order)]
        if not ready:
            return "circle"
        order.append($pick(ready))
    return " ".join(map(str, order))
""",
        _order_input,
        (('            return "circle"\n', "            break\n"), ("before[b].add(a)", "before[b] = {a}")),
        lambda rng: rng.choice([{"which": "smallest", "pick": "min"}, {"which": "largest", "pick": "max"}]),
    ),
    "maze": Family(
        "Given the height and width of a grid and its rows of `.` (free) and `#` (wall), print the least number of steps "
        "from the upper left to the lower right corner, moving $moves. Print -1 if there is no way.",
        """
from collections import deque

def solve(text):
    height, width, *rows = text.split()
    height, width = int(height), int(width)
    seen, queue = {(0, 0): 0}, deque([(0, 0)])
    while queue:
        y, x = queue.popleft()
        for dy, dx in $steps:
            place = (y + dy, x + dx)
            if 0 <= place[0] < height and 0 <= place[1] < width and rows[place[0]][place[1]] == "." and place not in seen:
                seen[place] = seen[(y, x)] + 1
                queue.append(place)
    return str(seen.get((height - 1, width - 1), -1))
""",
        _grid_input,
        (("seen.get((height - 1, width - 1), -1)", "(height + width - 2)"), ("queue.popleft()", "queue.pop()")),
        lambda rng: rng.choice(
            [
                {"moves": "sideways, up and down", "steps": FOUR_STEPS},
                {"moves": "in all eight directions", "steps": EIGHT_STEPS},
            ]
        ),
    ),
    "knapsack": Family(
        "Given n and a capacity, and n lines `weight value`, print the largest total value of items of which each may be "
        "taken up to $times times, and whose weights add up to at most the capacity.",
        """
def solve(text):
    words = list(map(int, text.split()))
    best = [0] * (words[1] + 1)
    for weight, value in zip(words[2::2], words[3::2]):
        for _ in range($times):
            for room in range(words[1], weight - 1, -1):
                best[room] = max(best[room], best[room - weight] + value)
    return str(best[-1])
""",
        _knapsack_input,
        (
            ("range(words[1], weight - 1, -1)", "range(weight, words[1] + 1)"),
            ("range(words[1], weight - 1, -1)", "range(words[1], weight, -1)"),
        ),
        lambda rng: {"times": rng.randint(1, 3)},
    ),
    "meetings": Family(
        "Given n and n lines `start end`, print the largest number of meetings that one can attend when at least $rest minutes "
        "must lie between the end of one and the start of the next.",
        """
def solve(text):
    words = list(map(int, text.split()[1:]))
    meetings = sorted(zip(words[1::2], words[::2]))
    free, count = None, 0
    for end, start in meetings:
        if free is None or start >= free:
            free, count = end + $rest, count + 1
    return str(count)
""",
        _interval_input,
        (
            ("end + $rest", "end"),
            ("sorted(zip(words[1::2], words[::2]))", "[(b, a) for a, b in sorted(zip(words[::2], words[1::2]))]"),
        ),
        lambda rng: {"rest": rng.randint(1, 4)},
    ),
    "distance": Family(
        "Given two words a line, print for each line the least cost to turn the first into the second, where putting in "
        "or leaving out a letter costs 1 and changing a letter costs $change.",
        """
def solve(text):
    words, lines = text.split(), []
    for a, b in zip(words[::2], words[1::2]):
        row = list(range(len(b) + 1))
        for i, letter in enumerate(a, 1):
            above, row = row, [i]
            for j, other in enumerate(b, 1):
                changed = above[j - 1] + (0 if letter == other else $change)
                row.append(min(above[j] + 1, row[-1] + 1, changed))
        lines.append(str(row[-1]))
    return "\\n".join(lines)
""",
        lambda rng, size, values: _lines(*((_word(rng, 2, 8, "abc"), _word(rng, 2, 8, "abc")) for _ in range(size + 1))),
        (
            ("(0 if letter == other else $change)", "$change"),
            ("min(above[j] + 1, row[-1] + 1, changed)", "min(above[j] + 1, changed)"),
        ),
        lambda rng: {"change": rng.choice([1, 2])},
    ),
}
