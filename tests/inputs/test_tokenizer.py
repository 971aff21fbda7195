"""Texts of templates may be cut before special tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from openkeye.inputs.processor import BUNDLED_DIR
from openkeye.inputs.tokenizer import TextTokenizer

WORDS = st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "<|im", "_end|>", "user", "\n", "  ", "When?", "é", "<think>"]))


def metaspace_tokenizer(**flags):
    """In the manner of sentencepiece: a space before words, at the text's beginning too."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True, **flags)]
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["When does the user appear? é <think>", "user\n_end|> <|im"], trainer)
    return TextTokenizer(tokenizer)


TOKENIZERS = {
    "bundled": TextTokenizer.load(BUNDLED_DIR / "tokenizer.json"),
    "metaspace": metaspace_tokenizer(),
    "swallows the space behind": metaspace_tokenizer(rstrip=True),
    "swallows the space before": metaspace_tokenizer(lstrip=True),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(words=WORDS)
def test_parts_have_the_ids_of_the_whole(name, words):
    tokenizer, text = TOKENIZERS[name], "".join(words)
    parts = tokenizer.cut_template(text)
    assert "".join(parts) == text
    assert [token for part in parts for token in tokenizer.encode_template(part)] == tokenizer.encode_template(text)


def test_a_conversation_is_cut_at_its_turns():
    text = "<|im_start|>user\nWhen?<|im_end|>\n<|im_start|>assistant\n"
    parts = ["<|im_start|>user\nWhen?", "<|im_end|>\n", "<|im_start|>assistant\n"]
    assert TOKENIZERS["bundled"].cut_template(text) == parts
