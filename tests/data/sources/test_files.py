import numpy as np
import pytest

from openkeye.common.checks import InputError
from openkeye.data.sources import files
from openkeye.data.sources.files import LineIndex, files_at, video_below


@pytest.mark.parametrize("chunk_bytes", [1, 7, 1 << 24])
def test_lines_come_back_byte_for_byte(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk_bytes)
    lines = [b"first", b"", b" two ", "dr\u00e9i\u2028".encode(), b"four\r", b"\r", b"last"]
    for ending in (b"", b"\n", b"\n\n"):
        (tmp_path / "a.txt").write_bytes(b"\n".join(lines) + ending)
        index = LineIndex(tmp_path / "a.txt")
        assert [index.read(number) for number in range(len(index))] == [
            b"first", b" two ", "dr\u00e9i\u2028".encode(), b"four", b"last"
        ]  # fmt: skip
        assert [index.where(number) for number in range(len(index))] == [f"a.txt:{line}" for line in (1, 3, 4, 5, 7)]
    (tmp_path / "a.txt").write_bytes(b"")
    assert len(LineIndex(tmp_path / "a.txt")) == 0


def test_files_of_a_folder_have_one_order(tmp_path):
    names = [f"{number}/{name}.tar" for number in (2, 10, 1) for name in "ba"]
    for name in np.random.default_rng(0).permutation(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = [str(path.relative_to(tmp_path)) for path in files_at(tmp_path, "*.tar", "shards")]
    assert found == ["1/a.tar", "1/b.tar", "10/a.tar", "10/b.tar", "2/a.tar", "2/b.tar"]


def test_a_video_is_found_with_and_without_its_ending(tmp_path):
    (tmp_path / "v_a.1.webm").write_text("")
    for name in ("v_a.1", "v_a.1.webm"):
        assert video_below(tmp_path, name, "a:1") == str(tmp_path / "v_a.1.webm")
    with pytest.raises(InputError, match="a:1: no video v_a in"):
        video_below(tmp_path, "v_a", "a:1")
