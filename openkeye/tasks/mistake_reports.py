"""Mistake reports (Context-RL, second half): what was wrong with an attempt. A report that holds the answer is refused."""

import re
from dataclasses import dataclass
from typing import Any, Protocol

from openkeye.common.checks import InputError
from openkeye.tasks.arithmetic_rules import say_mistakes
from openkeye.tasks.judges import Panel
from openkeye.tasks.rewards.reading import MAX_CHARACTERS, WORDS_OF_NUMBERS, plain_words, read_json, read_numbers
from openkeye.tasks.task import Example

ANSWERS = ("answer", "count", "text", "choice")
# facts that are answers as such
LISTS = ("boxes", "intervals")
# facts of which one entry is enough to give the answer away
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
BETWEEN_DIGITS = re.compile(r"(?<=\d)[\s,_'-]{1,3}(?=\d)")
FRACTION = re.compile(r"(-?\d{1,12})\s{0,2}/\s{0,2}([1-9]\d{0,11})")
MAX_REPORT = 2000
# characters
REPORT_PROMPT = (
    "The answer of this attempt is wrong. Say in at most four sentences where the reasoning goes wrong and what to look at "
    "again. You must not give the right answer, nor anything from which it can be read off: no final result, not its "
    'negation among two possibilities.\nReply {"report": "..."}.'
)


@dataclass(frozen=True)
class Attempt:
    """An answer that failed."""

    reasoning: str
    answer: str


class MistakeReporter(Protocol):
    """Says what was wrong."""

    async def report(self, example: Example, attempt: Attempt, number: int) -> str | None:
        """The report of the number-th try, from 0 on, each telling less than the one before or another thing; None: no more."""
        ...


@dataclass(frozen=True)
class RuleArithmeticReporter:
    """Reports on generated arithmetic by rules: no model is asked."""

    name: str = "rules:arithmetic-mistakes"

    async def report(self, example: Example, attempt: Attempt, number: int) -> str | None:
        """See `MistakeReporter`."""
        reports = say_mistakes(str(example.facts["question"]), attempt.reasoning)
        return reports[number] if number < len(reports) else None


@dataclass(frozen=True)
class ModelReporter:
    """A model that sees the reference solution and the attempt. The panel's votes are its tries: give it several."""

    panel: Panel

    async def report(self, example: Example, attempt: Attempt, number: int) -> str | None:
        """See `MistakeReporter`."""
        parts = [
            ("QUESTION", str(example.facts.get("question", ""))),
            ("SOLUTION", str(example.facts.get("solution", ""))),
            ("REASONING", attempt.reasoning),
            ("ANSWER", attempt.answer),
        ]
        reports = await self.panel.votes(REPORT_PROMPT, parts, _read_report)
        return reports[number] if number < len(reports) else None


def _read_report(text: str) -> str | None:
    table = read_json(text)
    report = table.get("report") if isinstance(table, dict) else None
    return report.strip() if isinstance(report, str) and 0 < len(report.strip()) <= MAX_REPORT else None


@dataclass(frozen=True)
class CheckedReport:
    """A report without the answer, or none."""

    text: str | None
    num_refused: int
    # tries that held the answer


async def checked_report(reporter: MistakeReporter, example: Example, attempt: Attempt, max_tries: int = 4) -> CheckedReport:
    """The first report that does not hold the answer, of at most `max_tries`."""
    num_refused = 0
    for number in range(max_tries):
        text = await reporter.report(example, attempt, number)
        if text is None:
            break
        if not holds_answer(text, example):
            return CheckedReport(text, num_refused)
        num_refused += 1
    return CheckedReport(None, num_refused)


def holds_answer(report: str, example: Example) -> bool:
    """Whether a report gives an example's answer away, in figures, in words, or hidden between blanks.

    It refuses rather too much: a report may not name a number that happens to be the answer, nor the words yes and no where
    the answer is one of them.

    Raises:
        InputError: the example has no answer to compare with.
    """
    known = [example.facts[key] for key in ANSWERS if key in example.facts]
    lists = [entry for key in LISTS for entry in example.facts.get(key, ())]
    if not known and not any(key in example.facts for key in LISTS):
        raise InputError(f"{example.name}: has none of {', '.join((*ANSWERS, *LISTS))}, so no report about it can be checked")
    if len(report) > MAX_CHARACTERS:
        return True
    answers = [one for answer in known for one in (answer if isinstance(answer, list | tuple) else [answer])]
    # The words of all two-sided answers give each other away.
    sides = [side for side in TWO_SIDED if any(plain_words(str(answer)) in side for answer in answers)]
    answers += [word for side in sides for word in side]
    report = _plain_maths(report)
    numbers = set(read_numbers(report)) | set(read_numbers(BETWEEN_DIGITS.sub("", report)))
    numbers |= {float(first) / float(second) for first, second in FRACTION.findall(report)}
    is_listed = any(all(float(part) in numbers for part in entry) for entry in lists)
    return is_listed or any(_says(report, numbers, answer) for answer in answers)


TWO_SIDED = (("yes", "no"), ("left", "right"), ("true", "false"), ("up", "down"))


def _says(report: str, numbers: set[float], answer: Any) -> bool:
    text = plain_words(_plain_maths(str(answer)))
    said = " ".join(report.lower().replace("-", " ").split())
    value = read_numbers(text)
    if len(value) == 1 and re.fullmatch(r"[-+]?[\d.,]+", text.replace("−", "-")):
        if value[0] in numbers:
            return True
        return bool(spelled := _spelled(value[0])) and re.search(rf"\b{spelled}\b", said) is not None
    fraction = FRACTION.fullmatch(text)
    if fraction and float(fraction[1]) / float(fraction[2]) in numbers:
        return True
    tight = re.sub(r"\s", "", text)
    if not tight:
        return False
    if len(tight) < 4 and tight.isalnum():
        return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", said) is not None
    return tight in re.sub(r"\s", "", report.lower())


def _plain_maths(text: str) -> str:
    """`\\boxed{\\frac{1}{2}}` as `1/2`."""
    text = re.sub(r"\\[dt]?frac\s?\{([^{}]{1,40})\}\s?\{([^{}]{1,40})\}", r"\1/\2", text)
    return re.sub(r"\\boxed|[${}]", "", text)


def _spelled(value: float) -> str:
    """A whole number up to 99 in English; empty for any other."""
    if not value.is_integer() or not 0 <= value < 100:
        return ""
    number = int(value)
    if number < len(WORDS_OF_NUMBERS):
        return WORDS_OF_NUMBERS[number]
    ones = f" {WORDS_OF_NUMBERS[number % 10]}" if number % 10 else ""
    return f"{TENS[number // 10 - 2]}{ones}"
