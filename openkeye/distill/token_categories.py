"""What kind of token each one of a response is, read from the text that the tokens make together (report, token categories).

The text is labelled character by character, and a token is what most of its characters are. Later rules win:

1. reasoning; where the prompt holds pictures, perception outside of thinking, and in thinking in sentences that speak of seeing
2. times: mm:ss, seconds with their unit, both ends of an interval
3. coordinates: numbers of two or four between brackets, and whatever stands between box tags
4. format: special tokens, tags, marks of boxes, fences and JSON, white space alone
5. tool JSON: everything between tool-call tags

Letters: T tokens.
"""

import re
from collections.abc import Iterator, Sequence
from enum import IntEnum

import numpy as np

from openkeye.inputs.intervals import NUMBER, SPAN
from openkeye.inputs.tokenizer import TextTokenizer

UNREADABLE = "\ufffd"
# what a decoder writes for bytes that are no whole character yet
LONGEST_CHARACTER = 4
# bytes, and so tokens at most


class Category(IntEnum):
    """In the order of rising precedence where a token is as much of one as of another."""

    REASONING = 0
    PERCEPTION = 1
    FORMAT = 2
    TIMES = 3
    COORDINATES = 4
    TOOL_JSON = 5


CATEGORY_NAMES = tuple(category.name.lower() for category in Category)
THINKING = re.compile(r"<think>|</think>")
TOOL_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
TAG = re.compile(r"<\|[^|<>\s]+\|>|</?[A-Za-z_][\w-]*>")
MARKS = re.compile(
    r"\\boxed\{|```\w*|[{}\[\]]|\"(?:bbox_2d|bbox|box|point|label|start|end|time)\"\s*:|^\s*[-*#]+\s", re.MULTILINE
)
BOX = re.compile(r"<(box|point|bbox)>(.*?)</\1>", re.DOTALL)
TUPLE = re.compile(r"[(\[]\s*(-?\d+(?:\.\d+)?(?:\s*,\s*-?\d+(?:\.\d+)?)(?:(?:\s*,\s*-?\d+(?:\.\d+)?){2})?)\s*[)\]]")
COORDINATE = re.compile(r"-?\d+(?:\.\d+)?")
CLOCK = re.compile(r"\b(?:\d+:)?\d{1,3}:\d{2}(?:\.\d+)?\b")
SECONDS = re.compile(r"\b\d+(?:\.\d+)?\s*(?:s|sec|secs|seconds?|minutes?|min)\b", re.IGNORECASE)
MOMENT = re.compile(rf"\b(?:at|from|until|between)\s+({NUMBER})(?=\s*(?:s\b|sec|,|\.|$|to\b|and\b|-))", re.IGNORECASE)
SENTENCE = re.compile(r"[^.!?\n]+[.!?\n]*")
SEEING = re.compile(
    r"\b(?:see|sees|seen|saw|look|looks|looking|shows?|shown|visible|appears?|depicts?|picture|image|photo|frames?|video|clip|scene|"
    r"screen|watch|watching|colou?r|background|foreground)\b",
    re.IGNORECASE,
)


def token_spans(tokenizer: TextTokenizer, ids_T: Sequence[int]) -> tuple[str, np.ndarray]:
    """(the text of the tokens, special ones included; [T, 2] int64: first character of each token and the one behind it).

    Tokens that make one character together all span it.
    """
    alone = tokenizer.decode_batch([[token] for token in ids_T], skip_special_tokens=False)
    spans = np.zeros((len(ids_T), 2), np.int64)
    parts: list[str] = []
    first, length = 0, 0
    while first < len(ids_T):
        end, text = first + 1, alone[first]
        while UNREADABLE in text and end < len(ids_T) and end - first < LONGEST_CHARACTER:
            end += 1
            text = tokenizer.decode(list(ids_T[first:end]), skip_special_tokens=False)
        if UNREADABLE in text:
            # No way to read it on: this one stands alone.
            end, text = first + 1, alone[first]
        spans[first:end] = length, length + len(text)
        parts.append(text)
        length += len(text)
        first = end
    return "".join(parts), spans


def categories_of(
    tokenizer: TextTokenizer, ids_T: Sequence[int], has_pictures: bool, begins_in_thinking: bool = False
) -> np.ndarray:
    """[T] uint8 `Category` of each token of a response.

    Args:
        tokenizer: that the ids are of.
        ids_T: the response.
        has_pictures: whether its prompt holds pictures or videos.
        begins_in_thinking: whether the prompt ends with an open think tag.
    """
    text, spans = token_spans(tokenizer, ids_T)
    return token_categories(text, spans, has_pictures, begins_in_thinking)


def token_categories(text: str, spans: np.ndarray, has_pictures: bool, begins_in_thinking: bool = False) -> np.ndarray:
    """[T] uint8: see `categories_of`; of a text and where each token stands in it."""
    labels = label_characters(text, has_pictures, begins_in_thinking)
    is_blank = np.fromiter((character.isspace() for character in text), bool, len(text))
    # A token's white space says nothing, unless there is nothing else.
    sums = np.stack([np.concatenate([[0], np.cumsum((labels == kind) & ~is_blank)]) for kind in Category])
    counts = sums[:, spans[:, 1]] - sums[:, spans[:, 0]]
    # Of equally many, the later kind.
    best = len(Category) - 1 - counts[::-1].argmax(axis=0)
    return np.where(counts.sum(axis=0) > 0, best, int(Category.FORMAT)).astype(np.uint8)


def label_characters(text: str, has_pictures: bool, begins_in_thinking: bool = False) -> np.ndarray:
    """[characters] uint8 `Category`, by the rules at the top of this file."""
    outside = Category.PERCEPTION if has_pictures else Category.REASONING
    labels = np.full(len(text), int(outside), np.uint8)
    for start, end in _thinking(text, begins_in_thinking):
        labels[start:end] = Category.REASONING
        if has_pictures:
            for sentence in SENTENCE.finditer(text, start, end):
                if SEEING.search(sentence[0]):
                    labels[sentence.start() : sentence.end()] = Category.PERCEPTION
    for start, end in _times(text, has_pictures):
        labels[start:end] = Category.TIMES
    for match in MARKS.finditer(text):
        labels[match.start() : match.end()] = Category.FORMAT
    for match in TUPLE.finditer(text):
        _label_numbers(labels, text, match.start(1), match.end(1))
    for match in BOX.finditer(text):
        _label_numbers(labels, text, match.start(2), match.end(2))
    for match in TOOL_CALL.finditer(text):
        labels[match.start(1) : match.end(1)] = Category.TOOL_JSON
    for match in TAG.finditer(text):
        labels[match.start() : match.end()] = Category.FORMAT
    return labels


def _thinking(text: str, begins_in_thinking: bool) -> list[tuple[int, int]]:
    """Spans between think tags; one that is closed and was never opened begins with the text, one never closed ends with it."""
    marks = list(THINKING.finditer(text))
    spans = []
    start = 0 if begins_in_thinking or (marks and marks[0][0] == "</think>") else None
    for mark in marks:
        if mark[0] == "<think>":
            start = mark.end() if start is None else start
        elif start is not None:
            spans.append((start, mark.start()))
            start = None
    return spans if start is None else [*spans, (start, len(text))]


def _times(text: str, has_pictures: bool) -> Iterator[tuple[int, int]]:
    """Spans of times. Bare numbers in "from 3 to 5" or "at 3" are times of a video; without pictures they are any numbers."""
    for pattern in (CLOCK, SECONDS):
        yield from (match.span() for match in pattern.finditer(text))
    for match in SPAN.finditer(text):
        words = match[0].lower()
        if ":" in words or SECONDS.search(words) or (has_pictures and words.startswith(("from", "between"))):
            yield from (match.span(1), match.span(2))
    if has_pictures:
        yield from (match.span(1) for match in MOMENT.finditer(text))


def _label_numbers(labels: np.ndarray, text: str, start: int, end: int) -> None:
    labels[start:end] = Category.FORMAT
    for match in COORDINATE.finditer(text, start, end):
        labels[match.start() : match.end()] = Category.COORDINATES
