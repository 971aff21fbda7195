"""Times in an answer's words, as intervals in seconds."""

import re

# Every repetition is bounded: a model may write a megabyte of digits or blanks, and reading it must take no longer than that.
DIGITS = r"\d{1,9}"
FRACTION = r"(?:\.\d{1,18})?"
NUMBER = rf"(?<!\d)(?:(?:{DIGITS}:)?{DIGITS}:{DIGITS}{FRACTION}|{DIGITS}{FRACTION})(?!\d)"
BLANKS = r"\s{0,8}"
UNIT = rf"{BLANKS}(?:s\b|sec\b|secs\b|seconds?\b)?"
SPAN = re.compile(
    rf"(?:\bfrom\s{{1,8}}|\bbetween\s{{1,8}})?({NUMBER}){UNIT}{BLANKS}(?:to|-|–|until|and|through){BLANKS}({NUMBER}){UNIT}",
    re.IGNORECASE,
)
MOMENT = re.compile(rf"\bat\s{{1,8}}({NUMBER})", re.IGNORECASE)
PAIR = re.compile(
    rf"[\[(]{BLANKS}[\"']?({NUMBER}){UNIT}[\"']?{BLANKS},{BLANKS}[\"']?({NUMBER}){UNIT}[\"']?{BLANKS}[\])]", re.IGNORECASE
)

Interval = tuple[float, float]


def seconds_of(text: str) -> float:
    """`12.5`, `1:05` or `1:00:05` as seconds."""
    total = 0.0
    for part in text.split(":"):
        total = total * 60 + float(part)
    return total


def parse_intervals(text: str) -> list[Interval]:
    """Every `from a to b`, `a - b`, `a s to b s` or `between a and b` of an answer, ascending ends only, in order.

    Clock times (`mm:ss`, `h:mm:ss`) and plain seconds are understood. A span that ends before it begins is left out.
    """
    spans = [(seconds_of(match[1]), seconds_of(match[2])) for match in SPAN.finditer(text)]
    return [(first, last) for first, last in spans if last >= first]


def read_intervals(text: str) -> list[Interval] | None:
    """The spans of an answer that is to be scored, in words (`parse_intervals`) or as a list, `[[00:05, 00:08], [1:02, 1:10]]`.

    Where there is a list, it alone counts.

    Returns:
        None where the answer holds no span, or one that ends before it begins: such an answer is no answer.
    """
    pairs = PAIR.findall(text) or [(match[1], match[2]) for match in SPAN.finditer(text)]
    spans = [(seconds_of(first), seconds_of(last)) for first, last in pairs]
    return spans if spans and all(last >= first for first, last in spans) else None


def parse_moment(text: str) -> float | None:
    """The time of `at a`, in seconds; None where the answer names none."""
    match = MOMENT.search(text)
    return None if match is None else seconds_of(match[1])


def widen_intervals(intervals: list[Interval], frame_spacing_seconds: float, start: float, end: float) -> list[Interval]:
    """Intervals whose ends are times of sampled frames, as the best guess of the continuous truth.

    A thing first seen at a frame came at some moment since the frame before it, so both ends move out by half the spacing,
    clipped to the part of the video that was looked at.
    """
    half = frame_spacing_seconds / 2
    return [(max(start, first - half), min(end, last + half)) for first, last in intervals]
