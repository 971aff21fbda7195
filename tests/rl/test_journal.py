"""The journal: whatever byte a kill comes at, what was appended before is there and nothing else."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openkeye.common.checks import InputError
from openkeye.rl.journal import Event, Journal

ARRAYS = {"ids": np.arange(5, dtype=np.int32), "mask": np.array([True, False]), "none": np.zeros((0, 3), np.float32)}


def written(folder, num_events):
    """A journal of so many events in one segment, every second one with arrays; the sizes of its files after each."""
    journal = Journal(folder)
    sizes = []
    for number in range(num_events):
        journal.append("counted", {"number": number}, ARRAYS if number % 2 else None)
        sizes.append(((folder / "000001.jsonl").stat().st_size, (folder / "000001.arrays").stat().st_size))
    journal.close()
    return sizes


def numbers_of(folder):
    """What a journal that is opened anew says, with its arrays checked."""
    journal = Journal(folder)
    for event in journal.events:
        arrays = journal.arrays(event)
        assert arrays.keys() == (ARRAYS.keys() if event.facts["number"] % 2 else set())
        for name, array in arrays.items():
            assert array.dtype == ARRAYS[name].dtype and np.array_equal(array, ARRAYS[name])
    journal.close()
    return [event.facts["number"] for event in journal.events]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_after_a_kill_at_any_byte_the_events_before_it_are_there(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("journal") / "whole"
    sizes = written(folder, 6)
    num_bytes = data.draw(st.integers(0, sizes[-1][0]))
    # Arrays of an event are on the disk before its line is begun; later ones need not be.
    num_whole = sum(lines <= num_bytes for lines, _ in sizes)
    array_bytes = data.draw(st.integers(sizes[num_whole - 1][1] if num_whole else 0, sizes[-1][1]))
    for name, length in (("000001.jsonl", num_bytes), ("000001.arrays", array_bytes)):
        (folder / name).write_bytes((folder / name).read_bytes()[:length])
    assert numbers_of(folder) == list(range(num_whole))
    # A later process appends to a segment of its own, behind a cut line too.
    journal = Journal(folder)
    journal.append("counted", {"number": 100})
    journal.close()
    assert numbers_of(folder) == [*range(num_whole), 100]


def test_compaction_keeps_what_is_needed_and_a_kill_in_it_loses_nothing(tmp_path):
    folder = tmp_path / "journal"
    written(folder, 6)
    journal = Journal(folder)
    before = journal.num_bytes
    shutil.copytree(folder, tmp_path / "before")
    kept = journal.compact([event for event in journal.events if event.facts["number"] in (1, 4)])
    assert [event.facts["number"] for event in kept] == [1, 4] and journal.num_bytes < before / 2
    assert np.array_equal(journal.arrays(kept[0])["ids"], ARRAYS["ids"])
    journal.append("counted", {"number": 7}, ARRAYS)
    journal.close()
    assert numbers_of(folder) == [1, 4, 7]
    # Killed before the new segment has its name, and before the old ones are gone.
    number = max(path.stem for path in folder.glob("*.jsonl") if b"compacted" in path.read_bytes())
    for ending, expected in (("", [1, 4, 7]), (".unfinished", list(range(6)))):
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        shutil.copytree(tmp_path / "before", tmp_path / "killed")
        for kind in ("jsonl", "arrays"):
            shutil.copy(folder / f"{number}.{kind}", tmp_path / "killed" / f"{number}.{kind}{ending}")
        assert numbers_of(tmp_path / "killed") == expected


def test_damage_is_told_from_a_kill(tmp_path):
    written(tmp_path / "line", 4)
    path = tmp_path / "line" / "000001.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b"counted", b"covnted") + b"".join(lines[2:]))
    with pytest.raises(InputError, match=r"line 2 is damaged"):
        Journal(tmp_path / "line")
    written(tmp_path / "arrays", 4)
    path = tmp_path / "arrays" / "000001.arrays"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    journal = Journal(tmp_path / "arrays")
    assert np.array_equal(journal.arrays(journal.events[1])["ids"], ARRAYS["ids"])
    with pytest.raises(InputError, match="checksum"):
        journal.arrays(journal.events[3])


def test_two_processes_do_not_write_one_journal(tmp_path):
    journal = Journal(tmp_path)
    with pytest.raises(InputError, match="open in another process"):
        Journal(tmp_path)
    journal.close()
    Journal(tmp_path).close()


def test_an_event_comes_back_as_it_was(tmp_path):
    journal = Journal(tmp_path)
    event = journal.append("said", {"text": "ä\n", "rewards": {"outcome": 0.1}, "none": None})
    journal.close()
    assert Journal(tmp_path).events == [event] == [Event("said", {"text": "ä\n", "rewards": {"outcome": 0.1}, "none": None})]
