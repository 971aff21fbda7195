"""Diagrams: an interpreter of operations, written here, turns the first into the second; pictures show what they say."""

import re

import numpy as np
import pytest

from openkeye.common.checks import InputError
from openkeye.frameforge.diagram_drawing import draw_pair
from openkeye.frameforge.diagrams import DOMAINS, make_diagram_pair

LINE = re.compile(r"(add|remove|set|move) (\w+)\(([^)]*(?:\)\d*)?)\)(?: = (.+))?$")


def table(diagram):
    """Facts as (kind, arguments) to value; a point's coordinates are its value."""
    facts = {}
    for fact in diagram.facts:
        key = (fact.kind, fact.names)
        assert key not in facts, "two facts of one name"
        facts[key] = fact.numbers or fact.value
    return facts


def carried_out(facts, operations):
    facts = dict(facts)
    for operation in operations:
        verb, kind, arguments, value = LINE.match(operation).groups()
        parts = arguments.split(", ")
        names = tuple(part for part in parts if not re.fullmatch(r"-?\d+", part))
        numbers = tuple(float(part) for part in parts if re.fullmatch(r"-?\d+", part))
        key = (kind, names)
        assert (key in facts) == (verb != "add"), operation
        if verb == "remove":
            gone = facts.pop(key)
            assert not numbers or gone == numbers, operation
        else:
            assert facts.get(key) != (numbers or value or ""), f"{operation} changes nothing"
            facts[key] = numbers or value or ""
    return facts


@pytest.mark.parametrize("domain", DOMAINS)
def test_operations_turn_the_first_into_the_second(domain):
    verbs, num_negative = set(), 0
    for number in range(200):
        pair = make_diagram_pair(np.random.default_rng([4, number]), domain)
        assert carried_out(table(pair.first), pair.operations) == table(pair.second)
        assert bool(pair.operations) == (table(pair.first) != table(pair.second))
        # In any order: operations are a set.
        assert carried_out(table(pair.first), pair.operations[::-1]) == table(pair.second)
        assert pair.answer == ("\n".join(pair.operations) or "none")
        verbs |= {operation.split()[0] for operation in pair.operations}
        num_negative += not pair.operations
    assert verbs == {"add", "remove", "move" if domain == "coordinates" else "set"}
    assert 20 <= num_negative <= 65


@pytest.mark.parametrize("domain", DOMAINS)
def test_pictures_differ_where_diagrams_do_and_not_otherwise(domain):
    for number in range(12):
        pair = make_diagram_pair(np.random.default_rng([5, number]), domain, max_disturbances=0, negative_share=0.3)
        first, second = draw_pair(pair, 168)
        assert first.shape == second.shape == (168, 168, 3) and first.dtype == np.uint8
        assert np.array_equal(first, second) == (not pair.operations), pair.operations


def test_disturbances_leave_the_facts_alone():
    num_seen = set()
    for number in range(60):
        pair = make_diagram_pair(np.random.default_rng([6, number]), DOMAINS[number % 4], negative_share=1.0)
        assert pair.operations == () and pair.disturbances
        assert table(pair.first) == table(pair.second)
        num_seen |= set(pair.disturbances)
        if {"colour_jitter", "viewpoint", "semantic_no_op"} & set(pair.disturbances):
            assert not np.array_equal(*draw_pair(pair, 112))
    assert len(num_seen) == 5


def test_bounds_are_told():
    for domain, options in (("music", {}), ("geometry", {"max_edits": 0}), ("geometry", {"negative_share": 2.0})):
        with pytest.raises(InputError):
            make_diagram_pair(np.random.default_rng(0), domain, **options)
