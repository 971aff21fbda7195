"""Pictures that come while others are waited for: the same as decoded whole, few at a time, and no longer than asked for."""

import threading
import time
from typing import ClassVar

import numpy as np
import pytest

from openkeye.common.checks import InputError
from openkeye.inputs import media_stream
from openkeye.inputs.media_stream import MediaStream
from openkeye.inputs.sampling import VideoLimits
from openkeye.inputs.video import DecodeHealth, Frames, VideoRequest, iterate_shown, read_request, request_video
from openkeye.inputs.video_scan import scan_video
from tests.inputs.clips import even_times, make_clip, uneven_times

LIMITS = VideoLimits(fps=5.0, min_tokens_per_frame=8, max_tokens_per_frame=8)
DENSE = VideoLimits(fps=100.0, min_tokens_per_frame=8, max_tokens_per_frame=8)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    make_clip(folder / "constant.mp4", even_times(120, 30))
    make_clip(folder / "variable.mkv", uneven_times(60), max_b_frames=2)
    make_clip(folder / "broadcast.ts", even_times(120, 30, start_seconds=3))
    make_clip(folder / "counted.avi", even_times(90, 30), codec="mpeg4", max_b_frames=0)
    make_clip(folder / "keyframes.mp4", even_times(120, 30), gop=3)
    return {path.name: path for path in folder.iterdir()}


def request(path, limits: VideoLimits = LIMITS) -> VideoRequest:
    return request_video(scan_video(path), limits)


@pytest.mark.parametrize("limits", [LIMITS, DENSE])
@pytest.mark.parametrize("name", ["constant.mp4", "variable.mkv", "broadcast.ts", "counted.avi", "keyframes.mp4"])
def test_streamed_pictures_are_those_of_the_whole(paths, name, limits):
    asked, health = request(paths[name], limits), DecodeHealth()
    whole = read_request(asked)
    assert asked.times_seconds == whole.times_seconds
    assert np.array_equal(np.stack(list(iterate_shown(asked, health))), whole.pixels)
    assert health.notes() == []


def damage(path, to) -> None:
    content = bytearray(path.read_bytes())
    for place in np.random.default_rng(0).integers(len(content) // 3, 2 * len(content) // 3, 12):
        content[place] ^= 0xFF
    to.write_bytes(content)


@pytest.mark.parametrize("name", ["constant.mp4", "variable.mkv", "broadcast.ts", "counted.avi"])
def test_the_picture_before_stands_in_for_one_that_cannot_be_decoded(paths, name, tmp_path):
    damage(paths[name], tmp_path / name)
    asked, health = request(tmp_path / name, DENSE), DecodeHealth()
    whole = read_request(asked)
    known = dict(zip(whole.times_seconds, whole.pixels, strict=True))
    held, num_held = None, 0
    for seconds, picture in zip(asked.times_seconds, iterate_shown(asked, health), strict=True):
        num_held += seconds not in known
        held = known.get(seconds, held)
        if held is not None:
            assert np.array_equal(picture, held), seconds
    assert health.num_held == num_held
    assert any("stands in" in note for note in health.notes()) == (num_held > 0)


def test_pictures_before_the_first_that_can_be_decoded_show_that_one(paths, monkeypatch):
    asked = request(paths["constant.mp4"])
    whole = read_request(asked)
    pairs = list(zip(whole.pixels, whole.times_seconds, strict=True))

    def some(*_):
        yield from [pairs[3], pairs[4], pairs[2], (pairs[7][0], pairs[7][1] - 0.01)]

    monkeypatch.setattr("openkeye.inputs.video.iterate_frames", some)
    health = DecodeHealth()
    shown = list(iterate_shown(asked, health))
    places = [3, 3, 3, 3, 4, 4, 4] + [7] * (len(pairs) - 7)
    assert all(np.array_equal(picture, whole.pixels[place]) for picture, place in zip(shown, places, strict=True))
    # All but the fourth and the fifth; the one in the eighth's place was shown just before it.
    assert health.num_held == len(pairs) - 2
    monkeypatch.setattr("openkeye.inputs.video.iterate_frames", lambda *_: (pair for pair in []))
    with pytest.raises(InputError, match=r"constant\.mp4: none of the \d+ sampled frames can be decoded"):
        list(iterate_shown(asked, DecodeHealth()))


class Reader:
    """A stream with its decoding thread, and what it rang for."""

    streams: ClassVar[list[MediaStream]] = []

    def __init__(self, media: list, max_pictures: int = 1000, first: int = 0, **options) -> None:
        self.stream = MediaStream(media, **options)
        self.streams.append(self.stream)
        self.media = media
        self.rung = threading.Semaphore(0)
        self.start(max_pictures, first)

    def start(self, max_pictures: int, first: int) -> None:
        plan = next(item for item in self.media if isinstance(item, VideoRequest)).plan
        picture_bytes = plan.height * plan.width * 3
        self.stream.rewind(first)
        self.stream.start(max_pictures * picture_bytes, self.rung.release)

    def wait(self, condition) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end and self.rung.acquire(timeout=20)

    def read(self, first: int) -> list[np.ndarray]:
        """All from a picture on, each released before the next is waited for."""
        stream, pictures = self.stream, []
        for number in range(first, len(stream.hashes)):
            self.wait(lambda number=number: stream.num_arrived > number)
            pictures.append(stream.pixels(number))
            stream.release(number + 1)
        return pictures


def all_have_ended() -> None:
    """Within a moment no decoding thread is left."""
    for thread in threading.enumerate():
        if thread.name == "openkeye-decode":
            thread.join(5)
            assert not thread.is_alive()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    for stream in Reader.streams:
        stream.close()
    Reader.streams.clear()
    all_have_ended()


def test_media_of_every_kind_come_in_their_order(paths):
    image, frames = np.full((56, 84, 3), 7, np.uint8), read_request(request(paths["variable.mkv"]))
    videos = [request(paths["constant.mp4"]), request(paths["counted.avi"])]
    reader = Reader([image, videos[0], frames, image, videos[1]], max_pictures=2)
    stream, sizes = reader.stream, [1, *(len(item.times_seconds) for item in (videos[0], frames)), 1]
    assert stream.num_arrived >= 1 and not stream.is_complete
    seen = reader.read(1)
    assert stream.is_complete and stream.error is None and stream.held_bytes == 0
    expected = np.concatenate([read_request(videos[0]).pixels, read_request(videos[1]).pixels])
    later = seen[: len(videos[0].times_seconds)] + seen[len(seen) - len(videos[1].times_seconds) :]
    assert np.array_equal(np.stack(later), expected)
    assert stream.hashes[0] == stream.hashes[sum(sizes) - 1] and None not in stream.hashes
    assert np.array_equal(stream.pixels(0), image) and np.array_equal(stream.pixels(sizes[0] + sizes[1]), frames.pixels[0])


def test_what_is_at_hand_needs_no_decoding(paths):
    stream = MediaStream([np.zeros((28, 28, 3), np.uint8), read_request(request(paths["constant.mp4"]))])
    assert stream.is_complete and None not in stream.hashes
    assert not stream.is_startable


def test_decoding_waits_until_pictures_are_released(paths):
    reader = Reader([request(paths["constant.mp4"], DENSE)], max_pictures=3)
    reader.wait(lambda: reader.stream.is_full)
    time.sleep(0.1)
    assert reader.stream.num_arrived == 3
    reader.stream.release(2)
    reader.wait(lambda: reader.stream.is_full)
    assert reader.stream.num_arrived == 5
    reader.stream.close()


def test_closing_ends_a_decoding_that_waits_and_one_that_works(paths, monkeypatch):
    waiting = Reader([request(paths["constant.mp4"], DENSE)], max_pictures=1)
    waiting.wait(lambda: waiting.stream.is_full)
    waiting.stream.close()
    all_have_ended()
    assert waiting.stream.held_bytes == 0
    packets, stops = [], []
    decode_health = media_stream.DecodeHealth

    def health_of(stop):
        stops.append(stop)
        return decode_health(stop=stop)

    real = media_stream.iterate_shown

    def counted(asked, health):
        # As if no frame of the file were ever asked for: only packets pass.
        health.stop.wait(10)
        packets.append(len(list(real(asked, health))))
        yield from ()

    monkeypatch.setattr(media_stream, "DecodeHealth", health_of)
    monkeypatch.setattr(media_stream, "iterate_shown", counted)
    working = Reader([request(paths["constant.mp4"], DENSE)])
    while not stops:
        time.sleep(0.001)
    working.stream.close()
    all_have_ended()
    assert packets == [0], "nothing is decoded once the stream is closed"


def test_a_second_start_decodes_again_from_where_it_is_asked(paths):
    videos = [request(paths["constant.mp4"]), request(paths["counted.avi"])]
    num_first = len(videos[0].times_seconds)
    reader = Reader(videos)
    reader.wait(lambda: reader.stream.num_arrived > num_first + 3)
    reader.stream.close()
    hashes = list(reader.stream.hashes)
    for first in (num_first + 2, 4, 0):
        reader.start(1, first)
        assert reader.stream.num_arrived == first
        expected = np.concatenate([read_request(item).pixels for item in videos])[first:]
        assert np.array_equal(np.stack(reader.read(first)), expected)
        assert reader.stream.hashes[: num_first + 3] == hashes[: num_first + 3]
        reader.stream.close()


def test_a_file_that_changes_between_two_decodings_is_an_error(paths, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(paths["constant.mp4"].read_bytes())
    reader = Reader([request(path)])
    reader.wait(lambda: reader.stream.is_complete)
    reader.stream.close()
    make_clip(path, even_times(120, 30), gop=5, max_b_frames=0)
    reader.start(1000, 0)
    reader.wait(lambda: reader.stream.error is not None)
    assert isinstance(reader.stream.error, InputError) and "ask again" in str(reader.stream.error)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_errors_are_kept_for_the_owner(paths, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(paths["constant.mp4"].read_bytes())
    asked = request(path)
    path.unlink()
    reader = Reader([asked])
    reader.wait(lambda: reader.stream.error is not None)
    assert isinstance(reader.stream.error, InputError) and "no such file" in str(reader.stream.error)

    def fail(_done: int, _total: int) -> None:
        raise ZeroDivisionError

    reader = Reader([request(paths["constant.mp4"])], on_decoded=fail)
    reader.wait(lambda: reader.stream.error is not None)
    assert isinstance(reader.stream.error, ZeroDivisionError) and reader.stream.num_arrived == 1


def test_progress_and_notes(paths, tmp_path):
    late = make_clip(tmp_path / "late.mkv", even_times(30, 10, start_seconds=2))
    told: list[tuple[int, int]] = []
    asked = request(late.path)
    reader = Reader(
        [asked, Frames(np.zeros((1, 28, 28, 3), np.uint8), [0.0], "f", 1.0, ["scratched"])],
        on_decoded=lambda *t: told.append(t),
    )
    reader.wait(lambda: reader.stream.is_complete)
    all_have_ended()
    total = len(asked.times_seconds)
    assert told == [(number, total) for number in range(1, total + 1)]
    assert reader.stream.notes[0].startswith(f"{late.path}: the stream's clock") and reader.stream.notes[1:] == ["f: scratched"]
