"""Times in an answer's words, as intervals in seconds."""

import re

NUMBER = r"(?:(?:\d+:)?\d+:\d+(?:\.\d+)?|\d+(?:\.\d+)?)"
UNIT = r"\s*(?:s\b|sec\b|secs\b|seconds?\b)?"
SPAN = re.compile(
    rf"(?:\bfrom\s+|\bbetween\s+)?({NUMBER}){UNIT}\s*(?:to|-|–|until|and|through)\s*({NUMBER}){UNIT}",
    re.IGNORECASE,
)
MOMENT = re.compile(rf"\bat\s+({NUMBER})", re.IGNORECASE)

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
