import json
import pickle

import pyarrow
import pyarrow.parquet
import pytest

from openkeye.common.checks import InputError
from openkeye.data.sources.parquet import ParquetRows
from tests.data.sources.media import flat, picture_bytes, seen, write_picture


def chat(question, answer="Yes."):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_rows(path, rows, group_rows=2):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group_rows)
    return path


def test_rows_of_several_files_and_row_groups_by_number(tmp_path):
    picture = {"bytes": picture_bytes(), "path": "a.png"}
    rows = [{"messages": chat(f"<image>\n{number}?"), "images": [picture], "unread": b"x"} for number in range(5)]
    write_rows(tmp_path / "a.parquet", rows)
    write_rows(tmp_path / "b.parquet", [{"messages": chat(f"{number}?"), "images": None} for number in (5, 6, 7)])
    source = ParquetRows(tmp_path)
    assert source.num_samples == 8
    for index in (7, 0, 4, 1, 3, 2, 6, 5):
        sample = source.read(index)
        assert flat(sample)[-2] == ("user", "text", f"{index}?")
        assert sample.name == (f"a.parquet:{index + 1}" if index < 5 else f"b.parquet:{index - 4}")
    assert flat(source.read(0))[0] == ("user", "image", picture_bytes()) and seen(source.read(0))[1] == 1
    copy = pickle.loads(pickle.dumps(source))
    assert not copy._held and flat(copy.read(4)) == flat(source.read(4))


def test_parts_paths_conversations_and_messages_as_json(tmp_path):
    write_picture(tmp_path / "b.png")
    parts = [{"type": "image", "image": "b.png"}, {"type": "text", "text": "Red?"}]
    source = ParquetRows(write_rows(tmp_path / "a.parquet", [{"messages": [{"role": "user", "content": parts}]}]))
    assert flat(source.read(0)) == [("user", "image", str(tmp_path / "b.png")), ("user", "text", "Red?")]
    turns = [{"from": "human", "value": "<image>\nRed?"}, {"from": "gpt", "value": "Yes."}]
    written = [{"conversations": turns, "image": {"bytes": None, "path": "b.png"}}]
    source = ParquetRows(write_rows(tmp_path / "c.parquet", written))
    assert flat(source.read(0))[0] == ("user", "image", str(tmp_path / "b.png"))
    source = ParquetRows(write_rows(tmp_path / "d.parquet", [{"messages": json.dumps(chat("x"))}, {"messages": "["}]))
    assert flat(source.read(0))[0] == ("user", "text", "x")
    with pytest.raises(InputError, match=r"d.parquet:2, messages: not valid JSON"):
        source.read(1)
    assert ParquetRows(write_rows(tmp_path / "e.parquet", [{"text": "Once."}])).read(0).text == "Once."


def test_damaged_files_and_other_columns_are_told(tmp_path):
    path = write_rows(tmp_path / "a.parquet", [{"messages": chat(str(number) * 50)} for number in range(6)])
    content = path.read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[:-200])
    with pytest.raises(InputError, match=r"cut.parquet: not a whole Parquet file"):
        ParquetRows(tmp_path / "cut.parquet")
    (tmp_path / "other").mkdir()
    write_rows(tmp_path / "other" / "o.parquet", [{"question": "x"}])
    with pytest.raises(InputError, match=r"o.parquet: columns question; expected messages"):
        ParquetRows(tmp_path / "other")
    # The footer is whole, the first row group's pages are not.
    first = pyarrow.parquet.ParquetFile(path).metadata.row_group(0)
    start = min(
        first.column(column).file_offset or first.column(column).data_page_offset for column in range(first.num_columns)
    )
    start = min(first.column(column).dictionary_page_offset or start for column in range(first.num_columns))
    damaged = bytearray(content)
    damaged[start : start + 60] = b"\xff" * 60
    path.write_bytes(damaged)
    source = ParquetRows(path)
    with pytest.raises(InputError, match=r"a.parquet:1: cannot be read"):
        source.read(0)
    assert flat(source.read(5))[0][2] == "5" * 50
