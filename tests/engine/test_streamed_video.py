"""Videos decoded while their prompt is read: answers as from decoded frames, few frames in memory, nobody disturbed."""

import threading
import time
import weakref
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from openkeye.common.checks import InputError
from openkeye.engine import runner as runner_module
from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.events import ErrorEvent, FinishEvent
from openkeye.engine.loop import Engine
from openkeye.engine.request import Request
from openkeye.engine.service import EngineService
from openkeye.inputs import media_stream, video
from openkeye.inputs.encode import encode
from tests.engine.test_batching import Recorded, run
from tests.engine.test_loop import QUESTIONS, all_pages_are_accounted_for, chat
from tests.engine.test_service import DEMO, HELLO, SHORT, Caller, is_idle
from tests.inputs.clips import even_times, make_clip

PIXEL_BYTES = 112 * 84 * 3
# of a frame of the clips below, at the model's size


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", even_times(160, 4), rate=4).path


@pytest.fixture(scope="module")
def other_clip(tmp_path_factory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "other.mkv", even_times(48, 4)[8:], rate=4).path


@pytest.fixture
def service() -> Iterator[EngineService]:
    service = EngineService(Engine())
    service.start()
    yield service
    service.stop()
    no_decoder_is_left()


def no_decoder_is_left() -> None:
    for thread in threading.enumerate():
        if thread.name == "openkeye-decode":
            thread.join(5)
            assert not thread.is_alive(), "a decoding thread outlives its request"


def run_until_done(engine: Engine) -> None:
    while engine.scheduler.has_work:
        engine.step()


@cache
def text_by_frames(path: Path, question: str) -> str:
    """The answer from frames that are decoded before."""
    return Engine().open(path).ask(question, sampling=SHORT).text


def logits(engine: Engine, request: Request) -> torch.Tensor:
    """After the whole prompt."""
    engine.scheduler.add(request)
    while not request.is_prefilled:
        batch = engine.scheduler.wait_for_batch()
        last = engine.runner.run(batch)
        request.num_computed += batch.segments[0].count
        engine.scheduler.keep_full_pages(request)
    engine.scheduler.clear()
    no_decoder_is_left()
    return last[0]


def streamed(engine: Engine, messages: list[dict]) -> Request:
    return engine.prepare(messages, SHORT)


def whole(engine: Engine, messages: list[dict]) -> Request:
    return engine._request(encode(messages, engine.processor), SHORT)


def test_streamed_logits_are_those_of_decoded_frames_to_the_bit(clip):
    for messages in (chat(DEMO, QUESTIONS[0]), chat(clip, QUESTIONS[1])):
        assert torch.equal(*(logits(engine, make(engine, messages)) for make in (streamed, whole) for engine in [Engine()]))


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk_tokens": 37, "vision_slice_pictures": 3, "decode_ahead_bytes": 5 * PIXEL_BYTES},
        {"prefill_chunk_tokens": 21, "vision_slice_pictures": 1, "decode_ahead_bytes": 1},
        {"prefill_chunk_tokens": 500, "vision_slice_pictures": 7, "page_size": 16, "vision_cache_bytes": 1},
    ],
)
def test_streamed_logits_do_not_depend_on_slices_chunks_and_look_ahead(options):
    messages, engine, expected = chat(DEMO, QUESTIONS[0]), Engine(config=EngineConfig(**options)), Engine()
    found = logits(engine, streamed(engine, messages))
    torch.testing.assert_close(found, logits(expected, whole(expected, messages)), atol=1e-4, rtol=1e-4)


def test_pictures_and_several_videos_in_one_prompt(clip, other_clip, video):
    picture = {"type": "image", "image": PIL.Image.fromarray(video.pixels[3])}
    parts = [picture, {"type": "video", "video": clip, "end": 20.0}, {"type": "text", "text": "Then"}]
    parts += [{"type": "video", "video": video}, picture, {"type": "video", "video": other_clip, "fps": 4}, picture]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "What is new?"}]}]
    config = EngineConfig(prefill_chunk_tokens=200, decode_ahead_bytes=6 * PIXEL_BYTES)
    engine, expected = Engine(config=config), Engine(config=config)
    found = streamed(engine, messages)
    torch.testing.assert_close(logits(engine, found), logits(expected, whole(expected, messages)), atol=1e-4, rtol=1e-4)
    assert len(found.prompt.videos) == 3 and found.media.is_complete


def test_ask_streams_and_says_what_open_says():
    told: list[tuple[str, int, int]] = []
    for options in ({}, {"start_seconds": 2.0, "end_seconds": 7.5, "fps": 3.0}):
        answer = Engine().ask(DEMO, QUESTIONS[0], on_progress=lambda *what: told.append(what), **options)
        expected = Engine().open(DEMO, **options).ask(QUESTIONS[0])
        differing = {"stage_seconds"}
        assert {key: value for key, value in vars(answer).items() if key not in differing} == {
            key: value for key, value in vars(expected).items() if key not in differing
        }
        assert answer.stage_seconds["decode_video"] > 0
        decoded = [what[1:] for what in told if what[0] == "decode_video"]
        assert decoded == [(number, answer.num_frames) for number in range(1, answer.num_frames + 1)]
        assert ("prefill", answer.num_prompt_tokens, answer.num_prompt_tokens) in told
        told.clear()
    with pytest.raises(InputError, match="question is empty"):
        Engine().ask(DEMO, " ")


class Live:
    """How many arrays of a kind are in memory, and how many were at most."""

    def __init__(self) -> None:
        self.num_now = self.num_at_most = 0
        self.lock = threading.Lock()

    def count(self, array, num: int = 1):
        with self.lock:
            self.num_now += num
            self.num_at_most = max(self.num_at_most, self.num_now)
        weakref.finalize(array, self.drop, num)
        return array

    def drop(self, num: int) -> None:
        with self.lock:
            self.num_now -= num


@pytest.fixture
def live(monkeypatch) -> dict[str, Live]:
    """Pictures from the decoder, and patches (a picture each) made for the vision tower."""
    found = {"pictures": Live(), "patches": Live()}
    picture, patches = video._picture, runner_module.patches_from_pixels

    def counted_patches(pixels, patch_size):
        made = patches(pixels, patch_size)
        found["patches"].count(made.pixels, len(pixels))
        return made

    monkeypatch.setattr(video, "_picture", lambda *arguments: found["pictures"].count(picture(*arguments)))
    monkeypatch.setattr(runner_module, "patches_from_pixels", counted_patches)
    return found


def test_few_frames_are_in_memory_at_any_time(clip, live):
    config = EngineConfig(prefill_chunk_tokens=128, decode_ahead_bytes=12 * PIXEL_BYTES, vision_slice_pictures=4)
    engine = Engine(config=config)
    answer = engine.ask(clip, QUESTIONS[0], sampling=SHORT)
    assert answer.num_frames == 80 and live["pictures"].num_now == live["patches"].num_now == 0
    # As many as may wait, the one being decoded, and the one that is kept in case the next is damaged.
    assert live["pictures"].num_at_most <= 12 + 2 and live["patches"].num_at_most <= 4
    frames = Engine(config=config).open(clip)
    assert frames.ask(QUESTIONS[0], sampling=SHORT).text == answer.text
    assert live["patches"].num_at_most <= 4, "of frames at hand too, patches are made slice by slice"


def test_large_pictures_are_encoded_by_themselves():
    engine = Engine()
    sizes = {"min_pixels": 1024 * 1024, "max_pixels": 1024 * 1024}
    parts = [{"type": "image", "image": PIL.Image.new("RGB", (1024, 1024), (n, 0, 0)), **sizes} for n in range(3)]
    request = engine.prepare([{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}], SHORT)
    named = [(str(picture.number), picture) for picture in request.pictures]
    assert [picture.num_tokens for _, picture in named] == [1296] * 3
    assert [len(part) for part in engine.runner._slices(named * 2)] == [3, 3]
    small = [(str(n), request.pictures[0].__class__(n, 0, 16, True)) for n in range(20)]
    assert [len(part) for part in engine.runner._slices(small)] == [16, 4]


class CountedTower:
    """How many pictures the vision tower is given."""

    def __init__(self, engine: Engine, monkeypatch) -> None:
        self.num_pictures = 0
        encode_patches = engine.runner.model.encode_patches

        def counted(patches):
            self.num_pictures += len(patches.grid_thw)
            return encode_patches(patches)

        monkeypatch.setattr(engine.runner.model, "encode_patches", counted)


@pytest.mark.parametrize("vision_cache_bytes", [1, 64 << 20])
def test_a_file_asked_about_again_is_computed_once(clip, other_clip, monkeypatch, vision_cache_bytes):
    config = EngineConfig(vision_cache_bytes=vision_cache_bytes, decode_ahead_bytes=20 * PIXEL_BYTES)
    engine = Engine(config=config)
    tower = CountedTower(engine, monkeypatch)
    engine.ask(clip, QUESTIONS[0], sampling=SHORT)
    assert tower.num_pictures == 80
    again = engine.ask(clip, QUESTIONS[1], sampling=SHORT)
    assert again.num_cached_tokens > 0.95 * again.num_prompt_tokens
    # Only the page in which video and question meet is computed again.
    assert tower.num_pictures <= 80 + (3 if vision_cache_bytes == 1 else 0)
    assert again.text == text_by_frames(clip, QUESTIONS[1])
    by_frames = engine.open(clip).ask(QUESTIONS[1], sampling=SHORT)
    assert by_frames.num_cached_tokens >= again.num_cached_tokens and by_frames.text == again.text
    assert engine.ask(DEMO, QUESTIONS[1], sampling=SHORT).num_cached_tokens < 64
    # Its first frames are the other's too, at the same times: equal pixels, though in another file.
    assert 64 <= engine.ask(other_clip, QUESTIONS[1], sampling=SHORT).num_cached_tokens < 256
    assert all_pages_are_accounted_for(engine)


def test_a_second_question_leaves_the_pages_that_it_will_match(clip, monkeypatch):
    """In a cache that holds the video once and a half, its pages must not be given up before its frames are named."""
    take_arrived = Request.take_arrived
    # Time for the decoder to fill its store while the scheduler looks at what was there before.
    monkeypatch.setattr(Request, "take_arrived", lambda request: (take_arrived(request), time.sleep(0.01)))
    engine = Engine(config=EngineConfig(page_size=16, cache_tokens=2496, decode_ahead_bytes=4 * PIXEL_BYTES))
    first = engine.ask(clip, QUESTIONS[0], sampling=SHORT)
    assert engine.config.cache_tokens < 1.6 * first.num_prompt_tokens
    again = engine.ask(clip, QUESTIONS[1], sampling=SHORT)
    assert again.num_cached_tokens > 0.95 * again.num_prompt_tokens
    assert all_pages_are_accounted_for(engine)


def test_a_preempted_prompt_decodes_its_video_again(other_clip):
    prompts = (chat(DEMO, QUESTIONS[0]), chat(other_clip, QUESTIONS[0]))
    sampling = SamplingParameters(max_new_tokens=150, logprobs=0)
    sizes = [Engine().prepare(messages, sampling).num_prompt for messages in prompts]
    config = EngineConfig(
        page_size=16, cache_tokens=(sum(sizes) + 120) // 16 * 16, vision_cache_bytes=1, prefill_chunk_tokens=500
    )
    engine = Engine(config=config)
    recorded = [Recorded(engine, messages, sampling) for messages in prompts]
    run_until_done(engine)
    assert recorded[1].request.num_preemptions >= 1
    for entry, messages in zip(recorded, prompts, strict=True):
        roomy = Engine()
        expected = Recorded(roomy, messages, sampling)
        run_until_done(roomy)
        assert entry.tokens == expected.tokens
        torch.testing.assert_close(entry.logprobs, expected.logprobs, atol=1e-4, rtol=1e-4)
    assert all_pages_are_accounted_for(engine)
    no_decoder_is_left()


def test_a_damaged_file_is_answered_from_what_can_be_decoded(clip, tmp_path):
    path, content = tmp_path / "damaged.mp4", bytearray(clip.read_bytes())
    for place in np.random.default_rng(0).integers(len(content) // 3, 2 * len(content) // 3, 40):
        content[place] ^= 0xFF
    path.write_bytes(content)
    answer = Engine().ask(path, QUESTIONS[0], sampling=SHORT)
    assert answer.num_frames == 80 and answer.text
    assert any(note.startswith(f"{path}: ") and "packets could not be decoded" in note for note in answer.notes)


class Gate:
    """Decoding that stops before a frame until it is let on, or breaks there."""

    def __init__(self, monkeypatch, number: int, error: BaseException | None = None) -> None:
        self.is_reached, self.may_go_on = threading.Event(), threading.Event()
        self.num_open = self.num_open_at_most = 0
        iterate_shown = media_stream.iterate_shown

        def gated(asked, health):
            self.num_open += 1
            self.num_open_at_most = max(self.num_open, self.num_open_at_most)
            try:
                for place, picture in enumerate(iterate_shown(asked, health)):
                    if place == number:
                        self.is_reached.set()
                        if error is not None:
                            raise error
                        while not (self.may_go_on.wait(0.01) or health.stop.is_set()):
                            pass
                    yield picture
            finally:
                self.num_open -= 1

        monkeypatch.setattr(media_stream, "iterate_shown", gated)


def test_others_are_answered_and_nobody_spins_while_frames_are_waited_for(service, monkeypatch, clip):
    gate, num_batches = Gate(monkeypatch, 50), []
    next_batch = service._engine.scheduler.next_batch
    monkeypatch.setattr(service._engine.scheduler, "next_batch", lambda: num_batches.append(1) or next_batch())
    waiting = Caller(service, chat(clip, QUESTIONS[0]))
    assert gate.is_reached.wait(30)
    assert Caller(service, HELLO).wait().num_output_tokens == Caller(service, HELLO).wait().num_output_tokens > 0
    time.sleep(0.1)
    before, cpu_seconds = len(num_batches), time.process_time()
    time.sleep(0.5)
    assert len(num_batches) == before and time.process_time() - cpu_seconds < 0.2
    assert not waiting.events
    gate.may_go_on.set()
    assert waiting.wait().text == text_by_frames(clip, QUESTIONS[0])
    assert is_idle(service)


@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
def test_the_end_of_a_request_ends_its_decoder(service, monkeypatch, clip, reason):
    gate = Gate(monkeypatch, 3)
    begin = time.monotonic()
    caller = Caller(service, chat(clip, QUESTIONS[0]), deadline_seconds=0.5 if reason == "deadline" else None)
    assert gate.is_reached.wait(30)
    if reason == "cancelled":
        caller.ticket.cancel()
    last = caller.wait()
    assert isinstance(last, FinishEvent) and last.finish_reason == reason and last.num_output_tokens == 0
    assert time.monotonic() - begin < 5
    no_decoder_is_left()
    assert gate.num_open == 0 and is_idle(service)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [InputError("the disk is\ngone"), ZeroDivisionError("of a library")])
def test_an_error_amid_the_frames_ends_its_own_request(service, monkeypatch, clip, error):
    good = Caller(service, chat(DEMO, QUESTIONS[0]), SamplingParameters(max_new_tokens=200))
    while not good.ticket.request or not good.ticket.request.media.is_complete:
        time.sleep(0.001)
    Gate(monkeypatch, 50, error)
    last = Caller(service, chat(clip, QUESTIONS[0])).wait()
    if isinstance(error, InputError):
        assert last == ErrorEvent("input", "the disk is gone")
    else:
        assert last == ErrorEvent("internal", "the request could not be decoded: ZeroDivisionError: of a library")
    assert isinstance(good.wait(), FinishEvent) and is_idle(service)
    with pytest.raises(type(error)):
        Engine().ask(clip, QUESTIONS[0])


def test_a_file_that_vanishes_fails_its_request_and_leaves_the_engine_clean(clip, tmp_path):
    path, engine = tmp_path / "clip.mp4", Engine()
    path.write_bytes(clip.read_bytes())
    request = engine.prepare(chat(path, QUESTIONS[0]), SHORT)
    path.unlink()
    engine.scheduler.add(request)
    with pytest.raises(InputError, match=r"clip\.mp4: no such file"):
        engine.step()
        engine.step()
    engine.scheduler.clear()
    assert engine.ask(DEMO, QUESTIONS[0], sampling=SHORT).text and all_pages_are_accounted_for(engine)


def test_few_videos_are_decoded_at_a_time(clip, other_clip, monkeypatch):
    gate = Gate(monkeypatch, -1)
    engine = Engine(config=EngineConfig(num_decoders=2, decode_ahead_bytes=3 * PIXEL_BYTES, prefill_chunk_tokens=256))
    asked = [(path, question) for path in (other_clip, DEMO, clip) for question in QUESTIONS[:2]]
    recorded = [engine.prepare(chat(*what), SHORT) for what in asked]
    for request in recorded:
        engine.scheduler.add(request)
    assert gate.num_open_at_most == 0, "what waits decodes nothing"
    run_until_done(engine)
    assert gate.num_open_at_most == 2
    no_decoder_is_left()
    engine_texts = [request.text for request in recorded]
    assert engine_texts == [text_by_frames(*what) for what in asked]


def test_an_answer_is_scored_behind_a_streamed_video():
    engine = Engine()
    scores = engine.score(chat(DEMO, QUESTIONS[0]), "Never.")
    frames = engine.open(DEMO).frames
    expected = Engine().score(chat(frames, QUESTIONS[0]), "Never.")
    assert [token for token, *_ in scores] == [token for token, *_ in expected]
    assert [score for *_, score in scores] == pytest.approx([score for *_, score in expected], abs=1e-5)
    assert run(engine) == []
