"""Times in words."""

import time

import pytest

from openkeye.inputs.intervals import parse_intervals, parse_moment, read_intervals, widen_intervals


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("From 4.5 to 12.0 seconds.", [(4.5, 12.0)]),
        ("From 2.0 to 4.5 and from 8.0 to 11.5 seconds.", [(2.0, 4.5), (8.0, 11.5)]),
        ("It is seen 1:05 - 1:20.5.", [(65.0, 80.5)]),
        ("between 0:10 and 1:00:02", [(10.0, 3602.0)]),
        ("3 s to 5 s", [(3.0, 5.0)]),
        ("from 9.0 to 3.0", []),
        ("The blue square.", []),
    ],
)
def test_spans_are_read(text, expected):
    assert parse_intervals(text) == expected


def test_a_moment_is_read():
    assert parse_moment("At 8.5 seconds.") == 8.5
    assert parse_moment("To the left.") is None


def test_widening_goes_half_a_step_out_and_stays_inside():
    assert widen_intervals([(0.0, 4.0), (9.0, 10.0)], 0.5, 0.0, 10.1) == [(0.0, 4.25), (8.75, 10.1)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[00:05, 00:08], [01:02, 1:01:10.5]]", [(5.0, 8.0), (62.0, 3670.5)]),
        ("[3.5, 8]", [(3.5, 8.0)]),
        ('[["0:05", "0:08"]]', [(5.0, 8.0)]),
        ("From 4.5 to 12.0 and from 20.0 to 21.0 seconds.", [(4.5, 12.0), (20.0, 21.0)]),
        ("From 4.5 to 12.0, that is [[1, 2]]", [(1.0, 2.0)]),
        ("From 9.0 to 3.0 and from 4.0 to 5.0 seconds.", None),
        ("[[8, 5]]", None),
        ("never", None),
        ("", None),
    ],
)
def test_spans_to_be_scored_are_all_valid_or_none(text, expected):
    assert read_intervals(text) == expected


def test_numbers_without_measure_are_no_times():
    assert read_intervals("from 0 to " + "9" * 400) is None and read_intervals(f"[0, {'9' * 400}]") is None


@pytest.mark.parametrize("hostile", ["9" * 1_000_000, " " * 1_000_000, "1 " * 500_000, "1:" * 500_000, "[[" * 500_000])
def test_megabytes_are_read_at_once(hostile):
    start = time.monotonic()
    assert read_intervals(hostile) is None and parse_intervals("1" + hostile) == [] and parse_moment("at 1" + hostile) != 2.0
    # (a quadratic reading would take hours; a busy machine takes its time)
    assert time.monotonic() - start < 20.0
