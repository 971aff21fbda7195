"""Reading what a model wrote: bounded in time and memory, and never an exception, whatever it is."""

import json
import math
import re
from typing import Any

from openkeye.tasks.task import Response

MAX_CHARACTERS = 1 << 16
# of an answer that rewards look at: its end, where the answer is
MAX_NUMBER = 1e15
THINK, END_THINK = "<think>", "</think>"
ANSWER, END_ANSWER = "<answer>", "</answer>"
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d{1,18}(?:,\d{3}){0,5}(?:\.\d{1,18})?(?![\d])")
WORDS_OF_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip


def bounded(text: str) -> str:
    """The part of a text that is looked at."""
    return text if len(text) <= MAX_CHARACTERS else text[-MAX_CHARACTERS:]


def whole_text(response: Response) -> str:
    """Reasoning and answer with their tags, as the model wrote them, whether or not somebody has taken them apart before."""
    return f"{THINK}{response.reasoning}{END_THINK}{response.text}" if response.reasoning else response.text


def answer_text(response: Response) -> str:
    """What the model answers: behind its reasoning and inside of its answer tags, where it wrote any.

    Reasoning that was never closed is no answer: the text is then empty.
    """
    said = bounded(response.text)
    if END_THINK in said:
        said = said.rpartition(END_THINK)[2]
    elif THINK in said:
        return ""
    if ANSWER in said:
        said = said.rpartition(ANSWER)[2].partition(END_ANSWER)[0]
    return said.strip()


def reasoning_text(response: Response) -> str:
    """What stands before the answer: between the think tags, or, without tags, nothing."""
    if response.reasoning:
        return bounded(response.reasoning)
    before, tag, _ = bounded(response.text).rpartition(END_THINK)
    return before.rpartition(THINK)[2].strip() if tag else ""


def read_json(text: str) -> Any | None:
    """JSON, also inside of a code fence or behind words; None where there is none.

    Not a number and infinity are no JSON; nesting that would exhaust the stack, and numbers of thousands of digits, are none.
    """
    text = bounded(text).strip()
    fence = re.search(r"```(?:json)?\s{0,8}(.{0,65536}?)```", text, re.DOTALL)
    if fence:
        text = fence[1].strip()
    starts = [place for place in (text.find("["), text.find("{")) if place >= 0]
    for candidate in (text, text[min(starts) :] if starts else ""):
        try:
            return _DECODER.raw_decode(candidate)[0]
        except (ValueError, RecursionError):
            continue
    return None


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def finite(value: Any) -> float | None:
    """A number of sane size as float; None for anything else, truth values among them."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # (compared before it is converted: an int may be too large for a float)
    return float(value) if abs(value) <= MAX_NUMBER and not math.isnan(value) else None


def read_numbers(text: str) -> list[float]:
    """Every number of a text, in order: `-3`, `1,200`, `4.5`, and `three` up to twenty."""
    found = [(match.start(), float(match[0].replace(",", "").replace("−", "-"))) for match in NUMBER.finditer(bounded(text))]
    for match in re.finditer(r"[a-z]{1,20}", bounded(text).lower()):
        if match[0] in WORDS_OF_NUMBERS:
            found.append((match.start(), float(WORDS_OF_NUMBERS.index(match[0]))))
    return [value for _, value in sorted(found) if abs(value) <= MAX_NUMBER]


def plain_words(text: str) -> str:
    """Lower case, single blanks, no punctuation at the ends: two answers that differ in these only are the same."""
    return " ".join(bounded(text).lower().split()).strip(" .,;:!?\"'")
