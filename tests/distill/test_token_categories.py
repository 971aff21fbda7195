import numpy as np
import pytest

from openkeye.distill.token_categories import Category, categories_of, label_characters, token_categories, token_spans
from openkeye.inputs.processor import BUNDLED_DIR
from openkeye.inputs.tokenizer import TextTokenizer

RESPONSE = (
    "<think>\nThe frame shows a red ball. So two and two make four.\n</think>\n\n"
    "It enters from 0:05 to 1:10, at 12.5 s, box [10, 20, 300, 400]. <tool_call>\n"
    '{"name": "zoom", "arguments": {"t": "0:07"}}\n</tool_call><|im_end|>'
)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.load(BUNDLED_DIR / "tokenizer.json")


def kinds(text: str, part: str, **options: bool) -> set[Category]:
    """Of a part's characters that are no white space."""
    labels = label_characters(text, **({"has_pictures": True} | options))
    start = text.index(part)
    return {Category(labels[n]) for n in range(start, start + len(part)) if not text[n].isspace()}


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("<think>", Category.FORMAT),
        ("The frame shows a red ball.", Category.PERCEPTION),
        ("So two and two make four.", Category.REASONING),
        ("</think>", Category.FORMAT),
        ("It enters from", Category.PERCEPTION),
        ("0:05", Category.TIMES),
        ("1:10", Category.TIMES),
        ("12.5 s", Category.TIMES),
        ("10", Category.TIMES),
        ("300", Category.COORDINATES),
        ("[", Category.FORMAT),
        ("<tool_call>", Category.FORMAT),
        ('{"name": "zoom", "arguments": {"t": "0:07"}}', Category.TOOL_JSON),
        ("<|im_end|>", Category.FORMAT),
    ],
)
def test_every_part_has_its_category(part, kind):
    assert kinds(RESPONSE, part) == {kind}


def test_without_pictures_nothing_is_seen():
    assert kinds(RESPONSE, "The frame shows", has_pictures=False) == {Category.REASONING}
    assert kinds("It is 4.", "It is 4.", has_pictures=False) == {Category.REASONING}
    assert kinds("take it from 3 to 5 at 2, then", "3", has_pictures=False) == {Category.REASONING}
    assert kinds("it lasts from 3 to 5", "3") == {Category.TIMES}
    assert kinds("7 - 3 is 4", "7") == {Category.PERCEPTION}


def test_thinking_that_the_prompt_has_opened():
    text = "Two and two.</think>Four."
    assert kinds(text, "Two and two.", begins_in_thinking=True) == kinds(text, "Two and two.") == {Category.REASONING}
    assert kinds(text, "Four.") == {Category.PERCEPTION}
    assert kinds("Two, cut short", "Two", begins_in_thinking=True) == {Category.REASONING}
    assert kinds("Two, cut short", "Two") == {Category.PERCEPTION}


def test_boxes_points_and_lists():
    assert kinds("<box>(12,34),(56,78)</box>", "56") == {Category.COORDINATES}
    assert kinds("at (120, 44) there", "120") == kinds("at (120, 44) there", "44") == {Category.COORDINATES}
    assert kinds("[1, 2, 3]", "2") == {Category.PERCEPTION}, "three numbers are no box"
    assert kinds('{"bbox_2d": [1, 2, 3, 4], "label": "cat"}', '"bbox_2d":') == {Category.FORMAT}
    assert kinds('{"bbox_2d": [1, 2, 3, 4], "label": "cat"}', "cat") == {Category.PERCEPTION}
    assert kinds("\\boxed{42}", "\\boxed{") == {Category.FORMAT}


def test_tokens_take_the_category_of_most_of_their_characters():
    text, spans = "a 0:05\n\n", np.array([[0, 2], [2, 5], [5, 6], [6, 8]])
    assert token_categories(text, spans, True).tolist() == [
        Category.PERCEPTION,
        Category.TIMES,
        Category.TIMES,
        Category.FORMAT,
    ]
    # Half a word, half a time: the rarer kind wins, and so does it over white space.
    assert token_categories("ab 0:05", np.array([[0, 5], [5, 7]]), True).tolist() == [Category.TIMES] * 2
    assert token_categories("", np.zeros((0, 2), np.int64), True).tolist() == []
    assert token_categories("", np.zeros((2, 2), np.int64), True).tolist() == [Category.FORMAT] * 2


@pytest.mark.parametrize("text", [RESPONSE, "Größe: 3 µm, 你好 🎈🎈 end", "   ", ""])
def test_spans_cover_the_text_of_real_tokens(tokenizer, text):
    ids = tokenizer.encode_template(text)
    read, spans = token_spans(tokenizer, ids)
    assert read == text
    assert (spans[1:, 0] >= spans[:-1, 0]).all() and (len(spans) == 0 or spans[-1, 1] == len(text))
    covered = np.zeros(len(text), bool)
    for start, end in spans:
        covered[start:end] = True
    assert covered.all()
    for token, (start, end) in zip(ids, spans, strict=True):
        alone = tokenizer.decode([token], skip_special_tokens=False)
        assert alone == text[start:end] or "\ufffd" in alone


def test_bytes_that_make_no_character_stand_alone(tokenizer):
    ids = tokenizer.encode_template("🎈")[:2] + tokenizer.encode_template("ball")
    text, spans = token_spans(tokenizer, ids)
    assert text.endswith("ball") and spans[-1, 1] == len(text)
    assert text[spans[2, 0] :] == "ball"


def test_real_tokens_of_a_response(tokenizer):
    ids = tokenizer.encode_template(RESPONSE)
    found = categories_of(tokenizer, ids, has_pictures=True)
    assert found.dtype == np.uint8 and len(found) == len(ids)
    assert set(found.tolist()) == set(map(int, Category)), "all six are there"
    text, spans = token_spans(tokenizer, ids)
    tool = [n for n, (start, end) in enumerate(spans) if "zoom" in text[start:end] or text[start:end] in ("z", "zo", "oom")]
    assert all(found[n] == Category.TOOL_JSON for n in tool)
