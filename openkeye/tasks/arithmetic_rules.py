"""Rules that check arithmetic step by step: every number must come from the question or an earlier step, and the way must
compute what the reference solution computes, in whatever order.

What a step computes is told by other worlds: the question's numbers are replaced by others, and a result stands for what it
would be there. Two ways are the same where they agree in every world.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice, product

from openkeye.tasks.judges import NO_REASONING, ProcessVerdict
from openkeye.tasks.rewards.reading import plain_words

Worlds = tuple[Fraction, ...]
# a quantity's value in each world

NUM_WORLDS = 3
MAX_READINGS = 16
# of a number that several quantities share
MAX_STEPS = 64
MAX_STEP_CHARACTERS = 200
NUMBER = r"-?\d{1,12}(?:\.\d{1,6})?"
OPERATOR = r"[-+*/×x÷−]"
NUMBERS = re.compile(rf"(?<![\w.]){NUMBER}(?!\w)")
EQUATION = re.compile(rf"({NUMBER}(?:\s{{0,2}}{OPERATOR}\s{{0,2}}{NUMBER}){{1,8}})\s{{0,2}}=\s{{0,2}}({NUMBER})")
COMPARISON = re.compile(rf"({NUMBER})\s{{0,2}}([<>])\s{{0,2}}({NUMBER})")
TERM = re.compile(rf"\s{{0,2}}({OPERATOR})?\s{{0,2}}(\d{{1,12}}(?:\.\d{{1,6}})?)")
OPERATIONS = {"−": "-", "×": "*", "x": "*", "÷": "/"}


@dataclass
class _Ledger:
    """What is known while steps are read."""

    known: dict[Fraction, set[Worlds]] = field(default_factory=dict)
    # by its value in the question's own world
    results: dict[Fraction, set[Worlds]] = field(default_factory=dict)
    # of steps alone
    comparisons: set[frozenset[Worlds]] = field(default_factory=set)

    def add(self, quantity: Worlds) -> None:
        self.known.setdefault(quantity[0], set()).add(quantity)


@dataclass(frozen=True)
class RuleArithmeticJudge:
    """`context.ContextJudge` by rules: no model is asked. It reads equations (`12 + 7 = 19`) and comparisons (`19 > 16`)."""

    name: str = "rules:arithmetic-steps"

    async def judge(self, question: str, solution: str, reasoning: str, answer: str) -> ProcessVerdict:
        """See `ContextJudge`; steps are sentences and lines that hold numbers."""
        return check_steps(question, solution, reasoning)


def check_steps(question: str, solution: str, reasoning: str) -> ProcessVerdict:
    """Rule on the steps of a reasoning. They lead to the answer where they compute what the solution's last step computes."""
    target = _Ledger()
    for quantity in _givens(question):
        target.add(quantity)
    last = None
    for sentence in _sentences(solution):
        _rule(sentence, target)
        last = sentence
    if last is None or not reasoning.strip():
        return NO_REASONING
    ledger = _Ledger()
    for quantity in _givens(question):
        ledger.add(quantity)
    verdicts = tuple(_rule(sentence, ledger) for sentence in _sentences(reasoning))
    comparison, equation = COMPARISON.search(last), EQUATION.search(last)
    if comparison is not None and equation is None:
        wanted = _compared(comparison, target)
        leads = bool(wanted & ledger.comparisons)
    else:
        value = Fraction(equation[2]) if equation is not None else None
        leads = value is not None and bool(target.results.get(value, set()) & ledger.results.get(value, set()))
    return ProcessVerdict(verdicts, leads)


def _sentences(text: str) -> list[str]:
    """Sentences and lines with numbers, MAX_STEPS at most."""
    pieces = re.split(r"\.(?!\d)|[\n;]", text[-MAX_STEPS * MAX_STEP_CHARACTERS :])
    return [piece.strip()[:MAX_STEP_CHARACTERS] for piece in pieces if re.search(r"\d", piece)][:MAX_STEPS]


def _givens(question: str) -> list[Worlds]:
    """The question's numbers, each with other values in the other worlds (by its place, so that equal numbers differ)."""
    values = [Fraction(match[0]) for match in NUMBERS.finditer(question)]
    return [
        (
            value,
            *(Fraction(10_007 * (world + 1) + 131 * place * place + 17 * place * (world + 3)) for world in range(NUM_WORLDS)),
        )
        for place, value in enumerate(values[:32])
    ]


def _rule(sentence: str, ledger: _Ledger) -> str:
    """The verdict on one step; what it shows becomes known."""
    equations, comparisons = list(EQUATION.finditer(sentence)), list(COMPARISON.finditer(sentence))
    if not equations and not comparisons:
        # A statement: its numbers must be known ones.
        numbers = [Fraction(match[0]) for match in NUMBERS.finditer(sentence)]
        return "right" if all(number in ledger.known for number in numbers) else "unsupported"
    for equation in equations:
        verdict = _rule_equation(equation[1], Fraction(equation[2]), ledger)
        if verdict != "right":
            return verdict
    for comparison in comparisons:
        first, second = Fraction(comparison[1]), Fraction(comparison[3])
        if not (first > second if comparison[2] == ">" else first < second):
            return "wrong"
        pairs = _compared(comparison, ledger)
        if not pairs:
            return "unsupported"
        ledger.comparisons |= pairs
    return "right"


def _rule_equation(left: str, result: Fraction, ledger: _Ledger) -> str:
    terms = [(OPERATIONS.get(match[1] or "+", match[1] or "+"), Fraction(match[2])) for match in TERM.finditer(left)]
    value = _evaluated([(operator, (number,)) for operator, number in terms])
    if value is None or value[0] != result:
        return "wrong"
    readings = [sorted(ledger.known.get(number, ())) for _, number in terms]
    if not all(readings):
        return "unsupported"
    found = set()
    for choice in islice(product(*readings), MAX_READINGS):
        quantity = _evaluated([(operator, reading) for (operator, _), reading in zip(terms, choice, strict=True)])
        if quantity is not None:
            found.add(quantity)
    for quantity in found:
        ledger.add(quantity)
        ledger.results.setdefault(quantity[0], set()).add(quantity)
    return "right" if found else "wrong"


def _evaluated(terms: Sequence[tuple[str, Worlds]]) -> Worlds | None:
    """A chain of terms, products before sums; None where it divides by 0."""
    worlds = []
    for values in zip(*(values for _, values in terms), strict=True):
        total, product_ = Fraction(0), Fraction(0)
        for (operator, _), value in zip(terms, values, strict=True):
            if operator == "*":
                product_ *= value
            elif operator == "/":
                if not value:
                    return None
                product_ /= value
            else:
                total, product_ = total + product_, value if operator == "+" else -value
        worlds.append(total + product_)
    return tuple(worlds)


def _compared(comparison: "re.Match[str]", ledger: _Ledger) -> set[frozenset[Worlds]]:
    """The pairs of quantities that a comparison may speak of."""
    first, second = (sorted(ledger.known.get(Fraction(comparison[place]), ())) for place in (1, 3))
    return {frozenset(pair) for pair in islice(product(first, second), MAX_READINGS)}


def first_mistake(question: str, reasoning: str) -> tuple[str, str] | None:
    """(the first step that is not right, its verdict); None where every step is right."""
    ledger = _Ledger()
    for quantity in _givens(question):
        ledger.add(quantity)
    for sentence in _sentences(reasoning):
        verdict = _rule(sentence, ledger)
        if verdict != "right":
            return sentence, verdict
    return None


def say_mistakes(question: str, reasoning: str) -> list[str]:
    """Mistake reports by rules about the first step that is not right, from the plainest to the vaguest, without results."""
    if not reasoning.strip():
        return ["Nothing was computed. Write the steps one after the other, then the answer."]
    found = first_mistake(question, reasoning)
    if found is None:
        return ["Every step holds, but they lead elsewhere. Read the question again: which numbers does it need, and for what?"]
    step, verdict = found
    left = plain_words(re.split(r"[=<>]", step)[0])
    if verdict == "wrong":
        what = "is computed wrongly. Compute it again, and what follows from it."
    else:
        what = "takes a number that is neither in the question nor a result before it."
    return [f"The step that begins with {left} {what}", f"A step {what}", "The steps do not hold. Write them anew."]
