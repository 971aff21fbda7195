"""Worker processes that die, hang and make mistakes: real processes, really killed."""

import os
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch

from openkeye.common.checks import InputError
from openkeye.data.document import Document, PixelPictures
from openkeye.data.mixture import Draw
from openkeye.data.reading import BadSample, InProcessReading, ReadingStoppedError, SampleReader
from openkeye.data.reading_pool import ReadingPool
from tests.data.small_sources import DeadlySource, TextSource, convert, document


@contextmanager
def opened(source, num_workers: int = 1, max_held_tokens: int = 1000, max_read_seconds: float = 60.0, context: int = 100):
    """A pool on one source `s`; nothing of it is left at the end."""
    pool = ReadingPool(SampleReader({"s": source}, convert, context), num_workers, max_held_tokens, max_read_seconds)
    try:
        yield pool
    finally:
        pool.stop()
        pool.close()
        assert active_children() == []


def take_all(pool: ReadingPool, num: int) -> list[Document | BadSample]:
    """The first samples of `s`."""
    numbers = [pool.submit(Draw("s", index)) for index in range(num)]
    return [pool.take(number) for number in numbers]


@dataclass(frozen=True)
class PictureSource:
    """Documents with everything that a document can have, every other one much larger than what a pipe holds."""

    num_samples: int = 4

    def read(self, index: int) -> Document:
        pixels = np.random.default_rng(index).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)
        places = torch.arange(9 if index % 2 else 200_000)
        return Document(
            name=f"pictures:{index}",
            input_ids=places + index,
            position_ids=torch.stack([places, places + 1, places + 2]),
            is_learnt=places > 5,
            is_media=places < 2,
            pictures=(PixelPictures([pixels]),),
            branches=(4, 7),
            task="see",
        )


def test_a_document_comes_through_the_pipe_as_it_was():
    with opened(PictureSource(), 2, context=200_000) as pool:
        for index, got in enumerate(take_all(pool, 4)):
            expected = vars(PictureSource().read(index))
            assert isinstance(got, Document)
            for name, value in vars(got).items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, expected[name]) and value.dtype == expected[name].dtype, name
                elif name == "pictures":
                    assert np.array_equal(value[0].pixels[0], expected[name][0].pixels[0])
                else:
                    assert value == expected[name], name


def test_workers_say_what_this_process_says():
    reader = SampleReader({"s": TextSource("s", None, 30, bad_every=5)}, convert, context=25)
    in_process = InProcessReading(reader)
    here = [in_process.take(in_process.submit(Draw("s", index))) for index in range(30)]
    with opened(reader.sources["s"], 2, context=25) as pool:
        there = take_all(pool, 30)
    assert {type(outcome) for outcome in here} == {Document, BadSample}
    assert [outcome.name for outcome in here] == [outcome.name for outcome in there]
    assert [outcome for outcome in here if isinstance(outcome, BadSample)] == [
        outcome for outcome in there if isinstance(outcome, BadSample)
    ]


ALWAYS = 99


def test_a_sample_is_tried_on_a_second_worker_and_then_bad(tmp_path):
    words = {2: "killed (signal 9)", 3: "ended with status 9", 4: "ran out of memory"}
    ends = {1: ("kill", 1), 2: ("kill", ALWAYS), 3: ("exit", ALWAYS), 4: ("memory", ALWAYS)}
    with opened(DeadlySource(str(tmp_path), ends), num_workers=2) as pool:
        outcomes = take_all(pool, 6)
    assert [outcomes[index].name for index in (0, 1, 5)] == ["deadly:0", "deadly:1", "deadly:5"]
    for index, expected in words.items():
        bad = outcomes[index]
        assert isinstance(bad, BadSample) and bad.name == f"s, sample {index}" and not bad.is_too_long
        assert "2 workers" in bad.reason and expected in bad.reason
        # two tries, by two processes
        assert len(list(tmp_path.glob(f"{index}_*"))) == 2


def test_a_worker_that_hangs_is_replaced_and_its_sample_bad_the_second_time(tmp_path):
    with opened(DeadlySource(str(tmp_path), {1: ("hang", ALWAYS)}), max_read_seconds=2.0) as pool:
        before, bad, after = take_all(pool, 3)
    assert (before.name, after.name) == ("deadly:0", "deadly:2")
    assert isinstance(bad, BadSample) and "not done after 2 s" in bad.reason
    assert len(list(tmp_path.glob("1_*"))) == 2


def test_a_mistake_in_code_ends_the_run_with_its_traceback(tmp_path):
    with opened(DeadlySource(str(tmp_path), {1: ("mistake", ALWAYS)})) as pool:
        with pytest.raises(RuntimeError, match="s, sample 1: reading it raised what is no InputError") as caught:
            take_all(pool, 3)
        assert "KeyError: 'a mistake in code'" in str(caught.value)


def test_a_worker_that_died_idle_is_replaced_and_no_sample_blamed():
    with opened(TextSource("s", None)) as pool:
        take_all(pool, 1)
        (worker,) = active_children()
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        assert isinstance(pool.take(pool.submit(Draw("s", 5))), Document)


def test_a_stopped_worker_is_late():
    with opened(TextSource("s", None), max_read_seconds=2.0) as pool:
        take_all(pool, 1)
        (worker,) = active_children()
        os.kill(worker.pid, signal.SIGSTOP)
        assert isinstance(pool.take(pool.submit(Draw("s", 1))), Document)
        assert worker not in active_children()


@dataclass(frozen=True)
class NotedSource:
    """Leaves a file for each sample read."""

    folder: str
    num_samples: int | None = None
    length: int = 10

    def read(self, index: int) -> Document:
        (Path(self.folder) / str(index)).touch()
        return document(f"n:{index}", self.length)


def test_workers_read_ahead_as_far_as_there_is_room_and_not_further(tmp_path):
    with opened(NotedSource(str(tmp_path)), 1, max_held_tokens=30) as pool:
        numbers = [pool.submit(Draw("s", index)) for index in range(20)]
        for number in numbers[:10]:
            pool.take(number)
            time.sleep(0.02)
        # Three documents fill the room, and one more may be under way.
        end = time.monotonic() + 20
        while len(list(tmp_path.iterdir())) < 11:
            assert time.monotonic() < end, "nothing is read ahead"
            time.sleep(0.01)
        assert len(list(tmp_path.iterdir())) <= 10 + 3 + 1
        # What is awaited is read, though nobody takes what fills the room.
        assert pool.take(numbers[19]).name == "n:19"


def test_what_does_not_pickle_is_refused_with_the_mend():
    reader = SampleReader({"s": TextSource("s", None)}, lambda sample: convert(sample), 100)
    with pytest.raises(InputError, match="num_workers=0"):
        ReadingPool(reader, 1, 100, 60.0)


def test_stop_ends_a_take_under_way(tmp_path):
    with opened(DeadlySource(str(tmp_path), {0: ("hang", ALWAYS)})) as pool:
        threading.Timer(1.5, pool.stop).start()
        begin = time.monotonic()
        with pytest.raises(ReadingStoppedError):
            take_all(pool, 1)
        assert time.monotonic() - begin < 10


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has collected does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
