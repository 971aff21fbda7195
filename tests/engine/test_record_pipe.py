"""Records arrive whole and in order, nobody waits for the reader, and a side that has gone is noticed."""

import threading
import time
from multiprocessing.connection import Pipe

import pytest

from openkeye.engine.record_pipe import RecordPipe


@pytest.fixture
def ends() -> tuple[RecordPipe, RecordPipe]:
    return tuple(RecordPipe(connection) for connection in Pipe())


def test_records_of_any_size_arrive_in_order_without_the_sender_waiting(ends):
    here, there = ends
    sent = [b"x" * (size << 20) for size in (0, 8, 1)] + list(range(1000))
    start = time.monotonic()
    for record in sent:
        here.put(record)
    # (nobody has read yet, and the system's buffer is long full)
    assert time.monotonic() - start < 2
    records = there.records()
    assert [next(records) for _ in sent] == sent
    there.put({"back": 1})
    assert next(here.records()) == {"back": 1}


def test_a_record_is_sent_as_it_was(ends):
    here, there = ends
    words = ["a"]
    here.put(words)
    words.append("b")
    assert next(there.records()) == ["a"]


def test_what_was_put_is_sent_before_the_flush_returns(ends):
    here, there = ends
    for number in range(100):
        here.put(number)
    here.flush(5.0)
    here.close()
    assert list(there.records()) == list(range(100))


def test_a_side_that_has_gone_is_noticed_and_does_no_harm(ends):
    here, there = ends
    got: list[object] = []
    reader = threading.Thread(target=lambda: got.extend(here.records()))
    reader.start()
    there.close()
    reader.join(5)
    assert not reader.is_alive() and got == []
    for _ in range(3):
        here.put("lost")
    here.flush(5.0)
