import numpy as np
import pytest

from openkeye.common.checks import InputError
from openkeye.distill.repetition import Repetition, RepetitionConfig, count_by_granularity, find_repetition
from openkeye.distill.token_categories import token_spans
from openkeye.inputs.processor import BUNDLED_DIR
from openkeye.inputs.tokenizer import TextTokenizer

CONFIG = RepetitionConfig()


def loop(before: int, block: int, copies: int, seed: int = 0) -> np.ndarray:
    """Tokens that never repeat, then a block again and again, then other tokens."""
    order = np.random.default_rng(seed).permutation(5000)
    head, body, tail = order[:before], order[before : before + block], order[before + block :][:7]
    return np.concatenate([head, np.tile(body, copies), tail])


@pytest.mark.parametrize("block", [2, 3, 17, 100, 512])
@pytest.mark.parametrize("before", [0, 1, 40])
def test_onset_of_a_loop_is_its_second_copy(before, block):
    copies = max(4, -(-32 // block))
    found = find_repetition(loop(before, block, copies), CONFIG)
    assert found == Repetition(before + block, "ngram", copies)
    assert find_repetition(loop(before, block, copies - 1), CONFIG) is None


def test_onset_is_that_of_the_first_of_several():
    ids = np.concatenate([loop(10, 5, 8), 6000 + loop(3, 2, 20)])
    assert find_repetition(ids, CONFIG) == Repetition(15, "ngram", 8)


def test_one_token_in_a_row():
    ids = np.array([1, 2, 3] + [9] * 16 + [4])
    assert find_repetition(ids, CONFIG) == Repetition(4, "token", 16)
    assert find_repetition(np.array([1, 2, 3] + [9] * 15 + [4]), CONFIG) is None
    assert find_repetition(np.array([9] * 100), CONFIG) == Repetition(1, "token", 100)
    only_blocks = RepetitionConfig(num_token_copies=0)
    assert find_repetition(np.array([9] * 100), only_blocks) is None


def test_a_loop_cut_short_counts_its_whole_copies():
    ids = np.concatenate([loop(4, 10, 5)[:-7], loop(4, 10, 5)[4:9]])
    found = find_repetition(ids, CONFIG)
    assert found is not None and (found.onset, found.num_copies) == (14, 5)


@pytest.mark.parametrize("ids", [[], [1], [1, 1, 2, 2, 3, 3], list(range(300))])
def test_what_does_not_repeat(ids):
    assert find_repetition(np.array(ids, dtype=np.int32), CONFIG) is None


def test_sentences_that_come_back_between_others():
    tokenizer = TextTokenizer.load(BUNDLED_DIR / "tokenizer.json")
    said = "The red circle moves left."
    text = f"At first, nothing. {said} One more. {said} Then another thing. THE red  circle moves left. So be it. {said} End."
    ids = tokenizer.encode_text(text)
    read, spans = token_spans(tokenizer, ids)
    found = find_repetition(np.array(ids), CONFIG, read, spans)
    assert found is not None and (found.granularity, found.num_copies) == ("sentence", 4)
    second = text.index(said, text.index(said) + 1)
    start, end = spans[found.onset]
    assert start <= second < end
    fewer = text.replace(f"So be it. {said}", "So be it.")
    ids = tokenizer.encode_text(fewer)
    assert find_repetition(np.array(ids), CONFIG, *token_spans(tokenizer, ids)) is None


def test_responses_are_counted_by_what_they_repeat_first():
    assert count_by_granularity([None, Repetition(1, "token", 9), Repetition(1, "ngram", 9)]) == {
        "token": 1, "ngram": 1, "sentence": 0,
    }  # fmt: skip


def test_settings_under_which_anything_repeats_are_refused():
    for words in ({"num_token_copies": 1}, {"num_sentence_copies": -1}, {"longest_ngram": 1}, {"penalty": -1.0}):
        with pytest.raises(InputError, match="repetition"):
            RepetitionConfig(**words)
