"""Whatever a model writes, every reward gives a number, at once, and never raises."""

import asyncio
import json
import math
import pickle
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openkeye.tasks.judges import read_axes, read_mark, read_process
from openkeye.tasks.rewards.operations import DOMAINS
from openkeye.tasks.rewards.reading import read_json, read_numbers
from openkeye.tasks.rewards.table import REWARDS, make_reward
from openkeye.tasks.task import Example, Response

FACTS = {
    "answer": "24", "solution": "12 + 12 = 24", "question": "12 and 12?", "intervals": [[1, 5]], "boxes": [[0, 0, 10, 10]],
    "count": 3, "text": "Apple", "names": ["OpenKeye"], "choice": "B", "domain": "geometry", "operations": "add segment(A, B)",
    "caption": "The red circle is visible from 1.0 to 5.0 seconds.",
}  # fmt: skip
OPTIONS = {"overlong": {"max_tokens": 100, "margin_tokens": 10}}
TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}},)
EXAMPLE = Example("any", 0, "text", ({"role": "user", "content": "The red circle or the blue one?"},), TOOLS, FACTS)
BY_RULE = [make_reward(name, OPTIONS.get(name, {})) for name in REWARDS]
MEGABYTE = 1 << 20
HOSTILE = [
    "", " ", "\x00", "\ud800", "9" * MEGABYTE, "-" * MEGABYTE, "[" * MEGABYTE, "{" * MEGABYTE, "(" * MEGABYTE, "<" * MEGABYTE,
    "]" * MEGABYTE, " " * MEGABYTE, "\n" * MEGABYTE, "<think>" * 100_000, "</think>" * 100_000, "<answer>" * 100_000,
    "<tool_call>" * 100_000, '<tool_call>{"name":' * 10_000, "[[1, 2], " * 100_000, "[1, 2, 3, 4], " * 70_000,
    "add segment(A, B)\n" * 50_000, "from 1 to 2 and " * 60_000, "1 + 1 = 2. " * 90_000, "1+" * 500_000, "1:" * 500_000,
    "the red circle " * 70_000, "word " * 200_000, "۳" * 1000, "1e400", "[1e400, 1, 1e999, 2]", "NaN", "[NaN, Infinity, 1, 2]",
    "1" + "0" * 5000, '{"a":' * 5000 + "1" + "}" * 5000, "add segment(" + "A," * 500_000 + ")", "H(" * 100_000, "```" * 300_000,
    "<think>x</think><answer>" + "9" * 4000 + "</answer>", 
    "not " * 200_000 + "gpt", "12 + 12 = " * 100_000, "12 < " * 200_000, "١٢ + ١٢ = ٢٤", "−5 − −5 = ²", "½ + ½ = 1",
]  # fmt: skip


def checked(text, finish="stop"):
    for reward in BY_RULE:
        start = time.monotonic()
        numbers = asyncio.run(reward(EXAMPLE, Response(text, finish_reason=finish, num_tokens=len(text))))
        took = time.monotonic() - start
        assert numbers and all(isinstance(value, float) and math.isfinite(value) for value in numbers.values()), reward.name
        assert -1.0 <= numbers[reward.name] <= 1.0, reward.name
        # Algebra has five seconds of its own, and a busy machine.
        assert took < (30.0 if reward.name in ("maths", "context") else 15.0), f"{reward.name} took {took:.1f} s"


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:12]) + str(len(text)))
def test_hostile_answers(text):
    checked(text)


@given(st.text(max_size=300))
@settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
def test_any_text(text):
    # (without algebra, whose process would be asked about every one)
    for reward in BY_RULE:
        if reward.name not in ("maths", "context"):
            numbers = asyncio.run(reward(EXAMPLE, Response(text)))
            assert all(math.isfinite(value) for value in numbers.values())


PIECES = """<think> </think> <answer> </answer> <tool_call> </tool_call> { } [ ] ( ) , : ; = . 1 24 0:05 1e9 -3 12 + < from to
add segment(A,B) remove circle(O) none red circle the is visible moves up B yes no ``` json null true " ' \\frac{ } $"""
pieces = st.sampled_from([*PIECES.split(), "\n"])


@given(st.lists(pieces, max_size=40).map(" ".join))
@settings(deadline=None, max_examples=80)
def test_any_heap_of_what_rewards_look_for(text):
    for reward in BY_RULE:
        if reward.name not in ("maths", "context"):
            numbers = asyncio.run(reward(EXAMPLE, Response(text)))
            assert all(math.isfinite(value) for value in numbers.values())
    for read in (read_axes, read_mark((0, 1)), read_process):
        read(text)
    assert all(math.isfinite(number) for number in read_numbers(text))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda part: st.lists(part) | st.dictionaries(st.text(max_size=3), part),
    )
)
@settings(deadline=None, max_examples=60)
def test_json_is_read_as_it_is(value):
    text = json.dumps(value)
    if isinstance(value, dict | list):
        assert read_json(f"Here:\n{text}") == read_json(f"```json\n{text}\n```") == read_json(text) == value
    for read in (read_axes, read_mark((0, 1)), read_process):
        read(text)


@pytest.mark.parametrize("reward", BY_RULE, ids=lambda reward: reward.name)
def test_rewards_travel_between_processes(reward):
    assert pickle.loads(pickle.dumps(reward)) == reward


def test_domains_are_all_read():
    assert len(DOMAINS) == 4
