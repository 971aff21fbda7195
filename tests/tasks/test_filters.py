"""Filters of general RL."""

import asyncio
import json

import pytest

from openkeye.common.checks import InputError
from openkeye.tasks.arithmetic import ArithmeticOptions, ArithmeticTask
from openkeye.tasks.filters import (
    AnswerCount,
    ModelSolutionJudge,
    NgramIndex,
    count_right,
    cross_validate,
    decontaminate,
    filter_by_accuracy,
)
from openkeye.tasks.judges import Panel
from openkeye.tasks.task import Response
from tests.tasks.talking import SayingModel

TASK = ArithmeticTask(ArithmeticOptions(seed=3))
EXAMPLE = TASK.read(0)
RIGHT = f"<think>Long and winding.</think><answer>{EXAMPLE.facts['answer']}</answer>"
SHORT = EXAMPLE.facts["reference"].replace("Long", "")
WRONG = "<think>Hm.</think><answer>-1</answer>"


def validated(first, second, verdicts, min_solvers):
    judge = ModelSolutionJudge(Panel(SayingModel([json.dumps({"verdict": verdict}) for verdict in verdicts])))
    solvers = [SayingModel(first), SayingModel(second)]
    return asyncio.run(cross_validate(TASK, EXAMPLE, solvers, judge, 2, min_solvers))


def test_reliable_right_solutions_become_references():
    result = validated([RIGHT, WRONG], [SHORT, SHORT], (0, 1), 2)
    assert (result.num_sampled, result.num_right, result.num_solvers_right) == (4, 3, 2)
    assert result.reliable == (SHORT,) and result.reference is not None
    assert result.reference.facts["solution"] == SHORT and result.reference.messages == EXAMPLE.messages
    assert validated([RIGHT, WRONG], [SHORT, SHORT], (0, 0), 2).reference is None


def test_a_truth_that_only_one_solver_finds_is_in_doubt():
    result = validated([RIGHT, RIGHT], [WRONG, WRONG], (), 2)
    assert result.reliable == () and result.num_right == 2 and result.reference is None
    with pytest.raises(InputError, match="3 of 2 solvers"):
        validated([], [], (), 3)


def test_the_solved_and_the_hopeless_are_dropped():
    async def policy(example):
        # Right about every third kind, and by chance about another.
        policy.num_asked += 1
        is_right = example.number % 3 == 0 or (example.number % 3 == 1 and policy.num_asked % 2)
        return Response(example.facts["reference"] if is_right else WRONG)

    policy.num_asked = 0
    counts = asyncio.run(count_right(TASK, range(9), policy, 4))
    assert [count.num_right for count in counts] == [4, 2, 0] * 3
    result = filter_by_accuracy(counts)
    assert result.kept == ("arithmetic:1", "arithmetic:4", "arithmetic:7")
    assert result.num_dropped == {"solved": 3, "hopeless": 3} and result.dropped["arithmetic:2"] == "hopeless"
    assert not filter_by_accuracy(counts, 0.5, 0.9).kept
    with pytest.raises(InputError, match="never asked"):
        filter_by_accuracy([AnswerCount("a", 0, 0)])
    with pytest.raises(InputError, match="the smaller first"):
        filter_by_accuracy(counts, 0.9, 0.1)


def test_contaminated_texts_are_dropped():
    held_out = NgramIndex(["How many red circles are there on the left of the blue star?", "Short one"], n=5)
    texts = {
        "copy": "Tell me: HOW many red, circles are there?",
        "same words": "There are many red stars on the left",
        "short": "short ONE!",
        "shorter": "short",
        "empty": "",
    }
    result = decontaminate(texts, held_out)
    assert result.kept == ("same words", "shorter", "empty") and result.num_dropped == {"contaminated": 2}
    assert 0 < held_out.overlap(texts["copy"]) < 1 and decontaminate(texts, held_out, 0.9).kept[0] == "copy"
    with pytest.raises(InputError, match="n-grams of 0 words"):
        NgramIndex([], 0)
