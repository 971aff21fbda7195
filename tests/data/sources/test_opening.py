import pickle
import sys

import pytest

from openkeye.common.checks import InputError
from openkeye.data.config import SourceConfig
from openkeye.data.sources.opening import READERS, open_source


def test_unknown_readers_and_options_list_the_known_ones(tmp_path):
    with pytest.raises(InputError, match="source 'a': no reader 'csv'; choose from chat_json_lines, web_dataset, parquet"):
        open_source("a", SourceConfig("csv"))
    (tmp_path / "a.txt").write_text("words\n")
    for name, value, words in (
        ("size", 3, "no option 'size'; choose from tokens, pattern, task"),
        ("tokens", "3", "expected int"),
    ):
        with pytest.raises(InputError, match=f"source 'a': .*{words}"):
            open_source("a", SourceConfig("text_files", str(tmp_path / "a.txt"), {name: value}))
    with pytest.raises(InputError, match=r"groups is 1; expected bool"):
        open_source("a", SourceConfig("charades_sta", "x", {"groups": 1}))


@pytest.mark.parametrize("reader", [reader for reader in READERS if not reader.startswith("frameforge")])
def test_a_missing_file_is_told_at_opening(reader, tmp_path):
    for path in ("", str(tmp_path / "none.x")):
        with pytest.raises(InputError, match=r"no such f(ile|older)|got no path|a folder"):
            open_source("a", SourceConfig(reader, path))


@pytest.mark.parametrize(("reader", "package"), [("parquet", "pyarrow"), ("web_dataset", "webdataset")])
def test_a_missing_package_is_told_with_its_mend(reader, package, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package or name.endswith(f"sources.{reader}")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"source 'a': {reader} needs the package {package}.*openkeye\[train\]"):
        open_source("a", SourceConfig(reader, "x"))


def test_a_source_travels_to_another_process(tmp_path):
    (tmp_path / "a.txt").write_text("words\n" * 9)
    source = open_source("a", SourceConfig("text_files", str(tmp_path), {"tokens": 3}))
    copy = pickle.loads(pickle.dumps(source))
    assert source.num_samples == copy.num_samples == 5
    assert [copy.read(index) for index in range(5)] == [source.read(index) for index in range(5)]
