"""Context-RL's judge by rules: a policy that guesses right answers is told apart from one that reasons."""

import asyncio

import numpy as np
import pytest

from openkeye.agents.recorded_model import RecordedModel, RecordingModel
from openkeye.tasks.arithmetic import GUESSABLE, KINDS, ArithmeticOptions, ArithmeticTask
from openkeye.tasks.arithmetic_rules import RuleArithmeticJudge, check_steps, first_mistake
from openkeye.tasks.context import ContextReward
from openkeye.tasks.judges import Panel, ProcessJudge
from openkeye.tasks.rewards.maths import MathsReward
from openkeye.tasks.task import Response
from tests.tasks.talking import SayingModel

TASK = ArithmeticTask(ArithmeticOptions(seed=5))
QUESTION = "There are 12 red circles, 7 blue stars and 5 green hearts. How many objects are there in total?"
SOLUTION = "12 + 7 = 19\n19 + 5 = 24"
MORE = "On the left are 12 red circles and 7 blue stars. On the right are 3 pink hearts and 9 red stars. Where are more?"
MORE_SOLUTION = "12 + 7 = 19\n3 + 9 = 12\n19 > 12"


def scored(example, text):
    return asyncio.run(TASK.score(example, Response(text)))


@pytest.mark.parametrize(
    ("reasoning", "is_sound"),
    [
        ("12 + 7 = 19. 19 + 5 = 24.", True),
        ("7 + 5 = 12. 12 + 12 = 24.", True),
        ("5 + 12 = 17\n17 + 7 = 24", True),
        ("12 + 7 + 5 = 24.", True),
        ("There are 12, 7 and 5 of them. 12 + 7 = 19, so 19 + 5 = 24.", True),
        ("", False),
        ("I say 24.", False),
        ("12 + 7 = 18. 18 + 5 = 24.", False),
        ("12 + 7 = 20. 20 + 4 = 24.", False),
        ("20 + 4 = 24.", False),
        ("12 + 12 = 24.", False),
        ("12 * 2 = 24.", False),
        ("12 + 7 = 19.", False),
        ("24 = 24.", False),
        ("24 + 0 = 24.", False),
        ("12 / 0 = 24.", False),
        ("12 + 7 = 19. 19 + 5 = 24. 24 + 1 = 26.", False),
    ],
)
def test_a_road_counts_where_it_computes_what_the_solution_computes(reasoning, is_sound):
    assert check_steps(QUESTION, SOLUTION, reasoning).is_sound is is_sound


@pytest.mark.parametrize(
    ("reasoning", "is_sound"),
    [
        (MORE_SOLUTION, True),
        ("3 + 9 = 12. 12 + 7 = 19. 12 < 19.", True),
        ("12 + 7 = 19. 3 + 9 = 12. 19 < 12.", False),
        ("12 > 9.", False),
        ("12 + 3 = 15. 7 + 9 = 16. 16 > 15.", False),
        ("12 + 7 = 19. 19 > 9.", False),
    ],
)
def test_comparisons_count_between_the_right_two_things(reasoning, is_sound):
    assert check_steps(MORE, MORE_SOLUTION, reasoning).is_sound is is_sound


@pytest.mark.parametrize("kind", KINDS)
def test_reference_solutions_are_right(kind):
    task = ArithmeticTask(ArithmeticOptions(kinds=(kind,), seed=1))
    for number in range(40):
        example = task.read(number)
        scores = asyncio.run(task.score(example, Response(example.facts["reference"])))
        assert scores["outcome"] == scores["context"] == scores["format"] == 1.0, (example.facts, scores)


def test_answers_of_two_sides_are_balanced_and_the_split_is_another():
    task = ArithmeticTask(ArithmeticOptions(kinds=GUESSABLE))
    answers = [task.read(number).facts["answer"] for number in range(300)]
    for answer in ("Yes", "No", "Left", "Right"):
        of_its_kind = sum(other in (("Yes", "No") if answer in ("Yes", "No") else ("Left", "Right")) for other in answers)
        assert 0.4 < answers.count(answer) / of_its_kind < 0.6
    test = ArithmeticTask(ArithmeticOptions(split="test"))
    assert {TASK.read(n).facts["question"] for n in range(50)}.isdisjoint(test.read(n).facts["question"] for n in range(50))
    assert TASK.read(7) == ArithmeticTask(ArithmeticOptions(seed=5)).read(7)


def test_a_policy_that_guesses_is_told_apart_from_one_that_reasons():
    """Both answer right; the guesser's steps are of another example, as a model's are that learnt to look like reasoning."""
    rng = np.random.default_rng(0)
    totals = {"reasons": [], "guesses": [], "is silent": []}
    for number in range(60):
        example = TASK.read(number)
        other = TASK.read(number + 6 * int(rng.integers(1, 50)))
        right = f"</think><answer>{example.facts['answer']}</answer>"
        stolen = other.facts["reference"].partition("</think>")[0] + right
        for name, text in (("reasons", example.facts["reference"]), ("guesses", stolen), ("is silent", f"<think>So.{right}")):
            totals[name].append(scored(example, text))
    for numbers in totals.values():
        assert np.mean([one["outcome"] for one in numbers]) == 1.0
    assert np.mean([one["context"] for one in totals["reasons"]]) == 1.0
    for name in ("guesses", "is silent"):
        assert np.mean([one["context"] for one in totals[name]]) <= 0.05
        assert np.mean([one["right_answer_wrong_reasoning"] for one in totals[name]]) >= 0.95


def test_the_switch_decides_what_is_learnt():
    example = TASK.read(0)
    guess = Response(f"<think>So.</think><answer>{example.facts['answer']}</answer>")
    by_outcome = asyncio.run(ArithmeticTask(ArithmeticOptions(seed=5, reward="outcome")).score(example, guess))
    by_context = asyncio.run(ArithmeticTask(ArithmeticOptions(seed=5, reward="context")).score(example, guess))
    assert by_outcome["total"] == pytest.approx(1.1) and by_context["total"] == pytest.approx(0.1)


def test_wrong_answers_with_sound_roads_earn_nothing():
    example = TASK.read(0)
    text = example.facts["reference"].replace(f"<answer>{example.facts['answer']}", "<answer>99999")
    assert scored(example, text)["context"] == 0.0


def test_the_first_mistake_is_found():
    assert first_mistake(QUESTION, "12 + 7 = 19. 19 + 5 = 25.") == ("19 + 5 = 25", "wrong")
    assert first_mistake(QUESTION, "12 + 8 = 20.") == ("12 + 8 = 20", "unsupported")
    assert first_mistake(QUESTION, SOLUTION) is None


def test_a_model_as_judge_sees_the_solution_and_the_majority_counts(tmp_path):
    example = TASK.read(0)
    verdicts = [
        '{"steps": ["right", "wrong"], "leads_to_answer": true}',
        'Well. ```json\n{"steps": ["right", "right"], "leads_to_answer": true}\n```',
        '{"steps": ["right", "right"], "leads_to_answer": true}',
    ]
    model = SayingModel(verdicts)
    panel = Panel(RecordingModel(model, tmp_path / "exchanges.jsonl"), num_votes=3)
    reward = ContextReward(MathsReward(), ProcessJudge(panel))
    numbers = asyncio.run(reward(example, Response(example.facts["reference"])))
    assert numbers["context"] == 1.0 and len(model.asked) == 3
    assert str(example.facts["solution"]) in model.asked[0][-1]["content"]
    # Again: out of the cache. Elsewhere: out of the recorded exchanges.
    asyncio.run(reward(example, Response(example.facts["reference"])))
    assert len(model.asked) == 3
    again = ContextReward(MathsReward(), ProcessJudge(Panel(RecordedModel(tmp_path / "exchanges.jsonl"), num_votes=3)))
    assert asyncio.run(again(example, Response(example.facts["reference"]))) == numbers
    assert RuleArithmeticJudge().name.startswith("rules:")
