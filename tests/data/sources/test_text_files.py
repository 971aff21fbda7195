from itertools import pairwise

import pytest

from openkeye.common.checks import InputError
from openkeye.data.sources.text_files import TextFiles


def test_pieces_add_up_and_end_at_line_breaks(tmp_path):
    text = "".join(f"Line {number} é says {'more ' * (number % 7)}.\n" for number in range(200))
    (tmp_path / "b.txt").write_text(text, encoding="utf-8")
    source = TextFiles(tmp_path / "b.txt", tokens=64, task="prose")
    samples = [source.read(index) for index in range(source.num_samples)]
    assert "".join(sample.text for sample in samples) == text and len(samples) > 20
    for sample, follower in pairwise(samples):
        assert sample.text.endswith("\n") and sample.task == "prose"
        # No piece is longer than asked, and the next line would have been too much.
        size = len(sample.text.encode())
        assert size <= 256 < size + len(follower.text.splitlines(keepends=True)[0].encode())
    line = int(samples[3].name.removeprefix("b.txt:"))
    assert samples[3].text.startswith(text.splitlines()[line - 1])


def test_a_line_without_end_is_cut_between_characters(tmp_path):
    text = "é" * 999 + "\n\n  \n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    source = TextFiles(tmp_path / "a.txt", tokens=25)
    joined = "".join(source.read(index).text for index in range(source.num_samples))
    assert joined.strip() == text.strip() and source.num_samples == 20
    odd = "x" + "é" * 120
    (tmp_path / "a.txt").write_text(odd, encoding="utf-8")
    source = TextFiles(tmp_path / "a.txt", tokens=25)
    assert "".join(source.read(index).text for index in range(source.num_samples)) == odd


def test_folders_patterns_and_what_is_no_text(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "a.md").write_text("other")
    source = TextFiles(tmp_path)
    assert [source.read(index).text for index in range(source.num_samples)] == ["first", "second"]
    assert TextFiles(tmp_path, pattern="*.md").read(0).text == "other"
    (tmp_path / "in" / "b.txt").write_bytes(b"\xff\xfe\x00 x")
    source = TextFiles(tmp_path)
    assert source.read(0).text == "first"
    with pytest.raises(InputError, match=r"b.txt:1: not UTF-8"):
        source.read(1)
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "in" / "b.txt").write_text("")
    for wrong, words in (({}, "no text in 2 files"), ({"pattern": "*.c"}, r"no file \*.c"), ({"tokens": 0}, "give 1 or more")):
        with pytest.raises(InputError, match=words):
            TextFiles(tmp_path, **wrong)
