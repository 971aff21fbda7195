"""Mistake reports never hold the answer."""

import asyncio
import json

import pytest

from openkeye.common.checks import InputError
from openkeye.tasks.arithmetic import ArithmeticOptions, ArithmeticTask
from openkeye.tasks.judges import Panel
from openkeye.tasks.mistake_reports import (
    Attempt,
    ModelReporter,
    RuleArithmeticReporter,
    checked_report,
    holds_answer,
)
from openkeye.tasks.task import Example
from tests.tasks.talking import SayingModel


def example(**facts):
    return Example("some", 0, "text", ({"role": "user", "content": "?"},), facts=facts)


@pytest.mark.parametrize(
    ("answer", "report", "holds"),
    [
        ("24", "The second sum is wrong.", False),
        ("24", "It should be 24.", True),
        ("24", "It should be 24.0, of course", True),
        ("24", "It is twenty-four.", True),
        ("24", "It is Twenty Four!", True),
        ("24", "Put 2 4 there", True),
        ("24", "Look at 240 and 124 again", False),
        ("1/2", "It is 0.5.", True),
        ("1/2", "It is 1/2", True),
        ("\\frac{3}{4}", "It is 0.75.", True),
        ("0.75", "It is $\\frac{3}{4}$.", True),
        ("0.75", "It is not $\\frac{1}{4}$.", False),
        ("\\boxed{x+1}", "Try x + 1.", True),
        ("\\boxed{x+1}", "Try x + 2.", False),
        ("No", "The comparison does not hold.", False),
        ("No", "So no.", True),
        ("No", "The answer is not yes.", True),
        ("Left", "Look at the right side again.", True),
        ("the red circle", "Is it the Red  Circle?", True),
        ("the red circle", "Is it a circle?", False),
        ("24", "word " * 20_000, True),
    ],
)
def test_what_gives_an_answer_away(answer, report, holds):
    assert holds_answer(report, example(answer=answer)) is holds


def test_boxes_and_times_are_given_away_one_by_one():
    boxes = example(boxes=[[100, 200, 300, 400], [5, 6, 7, 8]])
    assert holds_answer("One is [100, 200, 300, 400].", boxes) and not holds_answer("Not 100 and 200.", boxes)
    times = example(intervals=[[4.5, 12.0]])
    assert holds_answer("From 4.5 to 12 seconds.", times) and not holds_answer("It ends after 4.5.", times)
    with pytest.raises(InputError, match="no report about it can be checked"):
        holds_answer("Anything", example(something=1))


def test_a_report_with_the_answer_is_refused_and_the_next_one_taken():
    replies = [json.dumps({"report": text}) for text in ("It is 24.", "Twenty-four it is.", "Add the stars as well.")]
    panel = Panel(SayingModel(replies), num_votes=3)
    question = example(answer="24", question="?", solution="12 + 12 = 24")
    result = asyncio.run(checked_report(ModelReporter(panel), question, Attempt("12", "12")))
    assert result.text == "Add the stars as well." and result.num_refused == 2
    worst = Panel(SayingModel(replies[:1] * 2 + ["no JSON"]), num_votes=3)
    result = asyncio.run(checked_report(ModelReporter(worst), question, Attempt("12", "12")))
    assert result.text is None and result.num_refused == 2


def test_rules_report_on_every_kind_without_its_answer():
    task = ArithmeticTask(ArithmeticOptions(seed=2))
    for number in range(60):
        asked = task.read(number)
        solution = asked.facts["solution"]
        for reasoning in ("", solution.replace("=", "= 9"), solution, f"7 + {asked.facts['answer']} = 3", "1 + 1 = 2"):
            result = asyncio.run(checked_report(RuleArithmeticReporter(), asked, Attempt(reasoning, "0")))
            assert result.text is not None and not holds_answer(result.text, asked)
