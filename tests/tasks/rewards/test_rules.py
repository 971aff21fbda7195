"""Rewards by rule: format, words, counts, texts, places, captions, who the model is, and how rewards are composed."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openkeye.common.checks import InputError
from openkeye.tasks.rewards.caption import CaptionReward, RuleCaptionJudge
from openkeye.tasks.rewards.cognition import SelfCognitionReward
from openkeye.tasks.rewards.counting import CountingReward
from openkeye.tasks.rewards.format import FormatReward, ToolJsonReward, is_well_formed
from openkeye.tasks.rewards.maths import MathsReward
from openkeye.tasks.rewards.ocr import OcrReward, edit_distance, normalised, text_similarity
from openkeye.tasks.rewards.reward import compose
from openkeye.tasks.rewards.spatial import RuleSpatialJudge, SpatialReward
from openkeye.tasks.rewards.table import make_reward
from openkeye.tasks.rewards.words import ChoiceReward, WordsReward
from openkeye.tasks.task import Example, Response


def example(question="?", tools=(), **facts):
    return Example("some", 0, "text", ({"role": "user", "content": question},), tools, facts)


def worth(reward, truth, text, **response):
    return asyncio.run(reward(truth, Response(text, **response)))[reward.name]


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("<think>a</think><answer>b</answer>", True),
        (" <think>a\n</think>\n<answer> b </answer>\n", True),
        ("<think>a</think>b", False),
        ("<answer>b</answer>", False),
        ("<think> </think><answer>b</answer>", False),
        ("<think>a</think><answer> </answer>", False),
        ("<think>a</think><answer>b</answer>!", False),
        ("So <think>a</think><answer>b</answer>", False),
        ("<think>a</think><think>a</think><answer>b</answer>", False),
        ("<think>a</think><answer>b</answer><answer>c</answer>", False),
        ("<answer>b</answer><think>a</think>", False),
        ("<think><answer>b</answer></think>", False),
        ("<think>a<answer>b</answer>", False),
        ("", False),
    ],
)
def test_tags(text, fits):
    assert is_well_formed(text) is fits


def test_format_counts_reasoning_that_was_taken_apart_and_refuses_what_was_cut():
    reward = FormatReward()
    assert worth(reward, example(), "<answer>b</answer>", reasoning="a") == 1.0
    assert worth(reward, example(), "<think>a</think><answer>b</answer>", finish_reason="length") == 0.0
    assert worth(FormatReward(needs_think=False, needs_answer=False), example(), "b") == 1.0
    assert worth(FormatReward(needs_think=False, needs_answer=False), example(), "<think>b") == 0.0


TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "find",
            "parameters": {"properties": {"n": {"type": "integer"}, "s": {"enum": ["a", "b"]}}, "required": ["n"]},
        },
    },
)


@pytest.mark.parametrize(
    ("calls", "value"),
    [
        ([], 1.0),
        (['{"name": "find", "arguments": {"n": 1}}'], 1.0),
        (['{"name": "find", "arguments": {"n": 1, "s": "a"}}', "{"], 0.5),
        (['{"name": "find", "arguments": {"n": 1, "s": "c"}}'], 0.0),
        (['{"name": "find", "arguments": {"n": "1"}}'], 0.0),
        (['{"name": "find", "arguments": {"n": true}}'], 0.0),
        (['{"name": "find", "arguments": {}}'], 0.0),
        (['{"name": "find", "arguments": {"n": 1, "other": 2}}'], 0.0),
        (['{"name": "lose", "arguments": {"n": 1}}'], 0.0),
        (['{"name": "find", "arguments": "n"}'], 0.0),
    ],
)
def test_tool_calls(calls, value):
    text = "".join(f"<tool_call>{call}</tool_call>" for call in calls)
    assert worth(ToolJsonReward(), example(tools=TOOLS), text) == value


def test_words_choices_and_counts():
    assert worth(WordsReward(), example(answer="On the left"), " on  the LEFT. ") == 1.0
    assert worth(WordsReward(), example(answer=["left", "on the left"]), "Left") == 1.0
    assert worth(WordsReward(), example(answer="left"), "not left") == 0.0
    for text in (
        "B",
        "(B)",
        "B.",
        "B) the cat",
        "The answer is B",
        "<think>A</think><answer>B</answer>",
        "B\n[[00:05, 00:08]]",
    ):
        assert worth(ChoiceReward(), example(choice="B"), text) == 1.0, text
    for text in ("A", "A B", "Because", "b", "", "A boat. Option C"):
        assert worth(ChoiceReward(), example(choice="B"), text) == 0.0, text
    for text in ("3", "3.", "There are three.", "3 circles", "<think>1, 2</think>3", "3.0"):
        assert worth(CountingReward(), example(count=3), text) == 1.0, text
    for text in ("4", "3 or 4", "1 2 3 4 5", "", "-3", "3.5", "33", "<think>3"):
        assert worth(CountingReward(), example(count=3), text) == 0.0, text


@given(st.text(alphabet="abc", max_size=8), st.text(alphabet="abc", max_size=8))
@settings(deadline=None)
def test_the_edit_distance_is_levenshteins(first, second):
    table = [[i + j if i * j == 0 else 0 for j in range(len(second) + 1)] for i in range(len(first) + 1)]
    for i in range(1, len(first) + 1):
        for j in range(1, len(second) + 1):
            swap = table[i - 1][j - 1] + (first[i - 1] != second[j - 1])
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, swap)
    assert edit_distance(first, second) == table[-1][-1]


def test_texts_are_the_same_after_normalising():
    assert normalised("Café, “No 12”!") == normalised("CAFE\u0301 no12") == "caféno12"
    assert normalised("1.5 kg") == "1.5kg" != normalised("15 kg")
    assert worth(OcrReward(), example(text="Hello, World!"), "hello world") == 1.0
    assert worth(OcrReward(), example(text="Hello, World!"), "hello word") == 0.0
    assert worth(OcrReward(is_soft=True), example(text="abcd"), "abce") == pytest.approx(0.75)
    assert text_similarity("", "abc") == 0.0 and text_similarity("abc" * 9, "abc") == 0.0 and text_similarity("", "") == 1.0


@pytest.mark.parametrize(
    ("truth", "text", "mark"),
    [
        ("On the left.", "on the left", 1.0),
        ("On the left.", "Left.", 1.0),
        ("On the left.", "On the right.", -1.0),
        ("On the left.", "Left or right.", 0.0),
        ("On the left.", "I cannot see it.", 0.0),
        ("On the left.", "", -1.0),
        ("The red circle.", "The red circle.", 1.0),
        ("The red circle.", "The blue star.", -1.0),
        ("The red circle.", "The green cat.", 0.0),
        ("Yes.", "No.", -1.0),
    ],
)
def test_spatial_marks(truth, text, mark):
    question = "Which is to the left, the red circle or the blue star?"
    assert worth(SpatialReward(RuleSpatialJudge()), example(question, answer=truth), text) == mark


CAPTION = (
    "The red circle is visible from 1.0 to 5.0 seconds. The red circle moves to the left. The blue star is visible from 4.0 to "
    "9.0 seconds. The word apple is shown from 2.0 to 8.0 seconds."
)


def axes(text):
    return asyncio.run(CaptionReward(RuleCaptionJudge())(example(caption=CAPTION), Response(text)))


def test_captions_on_seven_axes():
    best = axes(CAPTION)
    assert set(best.values()) == {1.0} and len(best) == 8
    less = axes("The red circle is visible from 1.0 to 5.0 seconds.")
    assert less["caption_coverage"] == 0.25 and less["caption_hallucination"] == 1.0 and less["caption_on_screen_text"] == 0.0
    more = axes(CAPTION + " The green heart is visible from 0.0 to 1.0 seconds.")
    assert more["caption_coverage"] == 1.0 and more["caption_hallucination"] == 0.8
    assert more["caption_subject"] == 0.8 and more["caption_action"] == 1.0
    other_way = axes(CAPTION.replace("to the left", "up"))
    assert other_way["caption_action"] == 0.0 and other_way["caption_subject"] == 1.0
    late = axes(CAPTION.replace("from 1.0 to 5.0", "from 10.0 to 11.0"))
    assert late["caption_temporal_order"] == pytest.approx(1 / 3) and late["caption_coverage"] == 1.0
    assert axes(CAPTION * 5)["caption_hallucination"] < 0.5
    assert set(axes("Some shapes.").values()) == set(axes("").values()) == {0.0}
    with pytest.raises(InputError, match="axis 'colour'"):
        CaptionReward(RuleCaptionJudge(), {"colour": 1.0})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("I am OpenKeye.", 1.0),
        ("No, I am not ChatGPT. I am OpenKeye.", 1.0),
        ("I am OpenKeye, made by OpenAI.", 0.0),
        ("I am ChatGPT.", 0.0),
        ("I am not OpenKeye.", 0.0),
        ("I am Qwen, not OpenKeye", 0.0),
        ("", 0.0),
    ],
)
def test_who_are_you(text, value):
    assert worth(SelfCognitionReward(), example(names=["OpenKeye"]), text) == value


def test_maths_is_conditional_on_the_format():
    right = "<think>a</think><answer>24</answer>"
    assert worth(MathsReward(), example(answer="24"), right) == 1.0
    assert worth(MathsReward(), example(answer="24"), "24") == 0.0
    assert worth(MathsReward(needs_format=False), example(answer="24"), "24") == 1.0
    assert worth(MathsReward(), example(answer="24"), right.replace("24", "24 or 25")) == 0.0


def test_rewards_are_composed_by_weights():
    score = compose([WordsReward(), FormatReward()], {"words": 1.0, "format": 0.5})
    numbers = asyncio.run(score(example(answer="b"), Response("<think>a</think><answer>b</answer>")))
    assert numbers == {"words": 1.0, "format": 1.0, "total": 1.5, "outcome": 1.0}
    assert asyncio.run(score(example(answer="b"), Response("b")))["total"] == 1.0
    with pytest.raises(InputError, match="given twice"):
        compose([WordsReward(), WordsReward()], {})
    with pytest.raises(InputError, match="none of the rewards"):
        compose([WordsReward()], {"format": 1.0})
    with pytest.raises(InputError, match="no reward"):
        compose([], {})
    with pytest.raises(InputError, match="has no 'answer'"):
        asyncio.run(score(example(), Response("b")))


def test_rewards_by_name_take_options():
    assert make_reward("format", {"needs_think": False}) == FormatReward(needs_think=False)
    assert make_reward("grounding", {"rules": {"gate_iou": 0.7}}).rules.gate_iou == 0.7
    with pytest.raises(InputError, match="did you mean grounding"):
        make_reward("groundin", {})
    with pytest.raises(InputError, match="did you mean needs_think"):
        make_reward("format", {"need_think": False})
    with pytest.raises(InputError, match="margin_tokens"):
        make_reward("overlong", {"max_tokens": 5})
