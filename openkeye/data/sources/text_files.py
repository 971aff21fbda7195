"""Text files as long plain-text samples."""

from pathlib import Path

import numpy as np

from openkeye.common.checks import InputError
from openkeye.data.sample import Sample
from openkeye.data.sources.files import files_at, read_bytes

BYTES_PER_TOKEN = 4
# about, of prose in the vocabularies of large models


class TextFiles:
    """A `Source`: the pieces of one file, or of a folder's files by name, cut at line breaks; the same in every run."""

    def __init__(self, path: str | Path, *, tokens: int = 4096, pattern: str = "*.txt", task: str = "") -> None:
        """Find where the pieces begin.

        Args:
            tokens: about how many a piece has, four bytes counted as one.
            pattern: which files of a folder, and of those in it, count.

        Raises:
            InputError: no such file or folder, no text in it, or tokens below 1.
        """
        if tokens < 1:
            raise InputError(f"{path}: tokens is {tokens}; give 1 or more")
        self._files = files_at(path, pattern, "a text file or a folder of them")
        self._task = task
        pieces = [
            (number, start, end, line)
            for number, file in enumerate(self._files)
            for start, end, line in _pieces(file.read_bytes(), tokens * BYTES_PER_TOKEN)
        ]
        if not pieces:
            raise InputError(f"{path}: no text in {len(self._files)} files {pattern}; give others")
        self._pieces = np.array(pieces, dtype=np.int64)
        # [pieces, 4]: file, first byte, end, line from 1 on

    @property
    def num_samples(self) -> int:
        return len(self._pieces)

    def read(self, index: int) -> Sample:
        """See `Source.read`."""
        number, start, end, line = self._pieces[index].tolist()
        file = self._files[number]
        where = f"{file.name}:{line}"
        try:
            text = read_bytes(file, start, end - start, where).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: not UTF-8 text ({error.reason}); convert {file}, or leave it out") from error
        return Sample(where, text=text, task=self._task)


def _pieces(content: bytes, size: int) -> list[tuple[int, int, int]]:
    """(start, end, number of the first line) of pieces of at most `size` bytes, without those of nothing but space."""
    found, start, line = [], 0, 1
    while start < len(content):
        end = min(start + size, len(content))
        if end < len(content):
            end = _cut(content, start, end)
        if content[start:end].strip():
            found.append((start, end, line))
        line += content.count(b"\n", start, end)
        start = end
    return found


def _cut(content: bytes, start: int, end: int) -> int:
    """Behind the last line break of the piece; in a longer line before a character's first byte."""
    behind_break = content.rfind(b"\n", start, end) + 1
    if behind_break > start:
        return behind_break
    while end - 1 > start and content[end] & 0xC0 == 0x80:
        end -= 1
    return end
