"""Text to token ids and back, with a strict line between a template's special tokens and the same characters in prose."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from openkeye.common.checks import InputError

STRUCTURE_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|fast_video_pad|>",
    "<|frame|>",
    "<|fast_start|>",
    "<|fast_end|>",
)
# Tokens that build a prompt. In a user's text they are prose, whatever a tokenizer file calls them.


class TextTokenizer:
    """A `tokenizer.json` with two ways to read text: as a template writes it, and as a user does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._template_reader = tokenizer
        self._prose_reader = _with_special_structure(tokenizer)
        self._prose_reader.encode_special_tokens = True
        # ("encode special tokens" as ordinary text: the library's name for not parsing them)
        added = tokenizer.get_added_tokens_decoder()
        special = {token.content for token in added.values() if token.special}
        present = {token.content for token in added.values()}
        self.special_tokens: frozenset[str] = frozenset(special | (present & set(STRUCTURE_TOKENS)))
        # Before a token that swallows the space in front of it, a text cannot be cut.
        cuts = [re.escape(token.content) for token in added.values() if token.special and not token.lstrip]
        self._cuts = re.compile(f"(?={'|'.join(cuts)})") if cuts else None

    @classmethod
    def load(cls, path: Path) -> "TextTokenizer":
        """Read a `tokenizer.json`; InputError if it is missing or is not one."""
        if not path.is_file():
            raise InputError(f"{path}: no such file; a checkpoint folder needs its tokenizer.json")
        try:
            text = path.read_text(encoding="utf-8")
            json.loads(text)
        except ValueError as error:
            raise InputError(f"{path}: not valid JSON ({error}); copy the checkpoint's tokenizer.json again") from error
        return cls(Tokenizer.from_str(text))

    def encode_template(self, text: str) -> list[int]:
        """Ids of text from a template: special tokens are parsed."""
        return self._template_reader.encode(text, add_special_tokens=False).ids

    def cut_template(self, text: str) -> list[str]:
        """Parts of a template's text, from special token to special token: their ids in a row are those of the whole."""
        return [part for part in self._cuts.split(text) if part] if self._cuts else [text]

    def encode_text(self, text: str) -> list[int]:
        """Ids of a user's text: `<|image_pad|>` and its like stay prose."""
        return self._prose_reader.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        return self._template_reader.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def decode_batch(self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """Texts of several sequences of ids."""
        return self._template_reader.decode_batch([list(ids) for ids in sequences], skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of one token's exact text, or None."""
        return self._template_reader.token_to_id(token)

    def vocabulary(self) -> dict[str, int]:
        """Every token's text with its id, added tokens included."""
        return self._template_reader.get_vocab(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self._template_reader.get_vocab_size(with_added_tokens=True)


def _with_special_structure(tokenizer: Tokenizer) -> Tokenizer:
    """A copy in which every structure token counts as special, so that the prose reader leaves it alone."""
    content = json.loads(tokenizer.to_str())
    for token in content.get("added_tokens", []):
        if token["content"] in STRUCTURE_TOKENS:
            token["special"] = True
    return Tokenizer.from_str(json.dumps(content))
