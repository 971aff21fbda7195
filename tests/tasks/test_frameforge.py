"""FrameForge's tasks: the same example everywhere, truths that score as such, pictures only when asked for."""

import asyncio
import multiprocessing
import pickle
import time

import numpy as np
import pytest

from openkeye.common.checks import InputError
from openkeye.frameforge.questions import TASKS
from openkeye.frameforge.writer import TIERS, Clip, film
from openkeye.inputs.encode import lay_out
from openkeye.inputs.intervals import parse_intervals
from openkeye.inputs.processor import BUNDLED_MODEL, Processor, load_limits
from openkeye.inputs.video import Frames, read_video
from openkeye.tasks.drawn_frames import PICTURES, PictureCache
from openkeye.tasks.frameforge import TASK_KINDS, FrameForgeOptions, FrameForgeTask
from openkeye.tasks.task import Response


def score(task, example, text: str, finish: str = "stop"):
    return asyncio.run(task.score(example, Response(text, finish_reason=finish)))


def frames_of(example):
    return example.messages[0]["content"][0]["video"]


def told(example):
    """What identifies an example, as plain data."""
    frames = frames_of(example)
    return example.name, example.facts, frames.times_seconds, frames.scene, frames.key, frames.damage_seed


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("scenes", ["usual", "story"])
def test_references_are_right_in_every_tier_and_nothing_is_drawn(tier, scenes):
    num_drawn, start = PICTURES.num_drawn, time.monotonic()
    for kind in TASK_KINDS:
        task = FrameForgeTask(kind, FrameForgeOptions(tier=tier, scenes=scenes))
        for number in range(12):
            example = task.read(number)
            assert (example.task, example.modality) == (f"frameforge_{kind}", "video")
            rewards = score(task, example, example.facts["reference"])
            assert rewards["outcome"] == rewards["format"] == 1.0 and rewards["total"] == pytest.approx(1.1), example.facts
            assert score(task, example, example.facts["reference"], "length")["format"] == 0.0
    assert PICTURES.num_drawn == num_drawn
    assert time.monotonic() - start < 20.0


@pytest.mark.parametrize("kind", TASK_KINDS)
def test_wrong_answers_earn_nothing(kind):
    task = FrameForgeTask(kind)
    for number in range(8):
        example = task.read(number)
        for text in ("", "seconds", "Banana.", "9" * 5000, "<think>" + example.facts["reference"], "From 9.0 to 2.0 seconds."):
            assert score(task, example, text)["outcome"] == 0.0, text
        reference = example.facts["reference"]
        assert score(task, example, f"<think>hm</think><answer>{reference}</answer>")["outcome"] == 1.0
        assert score(task, example, reference.rstrip("."))["format"] == 0.0
        other = {"Yes.": "No.", "No.": "Yes."}.get(reference)
        if other:
            assert score(task, example, other)["outcome"] == 0.0
            assert score(task, example, other)["format"] == 1.0


def test_localisation_is_worth_its_overlap():
    task = FrameForgeTask("timestamp_localisation")
    for number in range(20):
        example = task.read(number)
        spans, step = parse_intervals(example.facts["reference"]), example.facts["frame_spacing_seconds"]
        seconds = sum(last - first + step for first, last in spans)
        shifted = " and ".join(f"from {first + 1:.1f} to {last + 1:.1f}" for first, last in spans)
        if len(spans) == 1 and spans[0][0] > 1.0 and spans[0][1] + 1.5 < example.facts["duration_seconds"]:
            expected = max(0.0, seconds - 1) / (max(seconds, 0) + 1)
            assert score(task, example, f"{shifted} seconds.")["temporal_iou"] == pytest.approx(expected, abs=0.02)
        # The whole clip, and a span with one that ends before it begins.
        whole = score(task, example, f"From 0.0 to {example.facts['duration_seconds']:.1f} seconds.")
        assert whole["temporal_iou"] == pytest.approx(min(1.0, seconds / example.facts["duration_seconds"]), abs=0.06)
        assert score(task, example, f"{example.facts['reference']} From 9.0 to 2.0 seconds.")["temporal_iou"] == 0.0
        assert score(task, example, example.facts["reference"])["temporal_iou_continuous"] > 0.5


def test_differences_of_times_may_be_off_by_a_step():
    task = FrameForgeTask("two_moments", FrameForgeOptions(kinds=("later",), tier="hour"))
    example = task.read(3)
    truth = float(example.facts["answer"].split()[0])
    assert [score(task, example, f"{truth + off:.1f} seconds.")["exact"] for off in (-1.0, -0.5, 0.5, 1.0)] == [0, 1, 1, 0]
    assert score(task, example, f"{truth:.1f} seconds or 3.0 seconds.")["exact"] == 0.0


def _told_elsewhere(job):
    kind, tier, number = job
    return told(FrameForgeTask(kind, FrameForgeOptions(tier=tier)).read(number))


def test_the_same_number_is_the_same_example_in_another_process():
    jobs = [(kind, tier, 5) for kind in TASK_KINDS for tier in TIERS]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for job, elsewhere in zip(jobs, pool.map(_told_elsewhere, jobs), strict=True):
            assert elsewhere == _told_elsewhere(job)


def test_splits_seeds_and_numbers_differ_and_kinds_share_their_clip():
    def frames(kind="counting", number=0, **options):
        return frames_of(FrameForgeTask(kind, FrameForgeOptions(**options)).read(number))

    scenes = [frames().scene, frames(split="test").scene, frames(seed=1).scene, frames(number=1).scene]
    assert all(a != b for n, a in enumerate(scenes) for b in scenes[:n])
    assert len({frames(kind).key for kind in TASKS}) == 1


def test_pictures_are_drawn_once_and_travel_as_their_scene():
    frames = frames_of(FrameForgeTask("reading", FrameForgeOptions(seed=77)).read(0))
    assert isinstance(frames, Frames) and len(pickle.dumps(frames)) < 20_000
    again = frames_of(FrameForgeTask("motion", FrameForgeOptions(seed=77)).read(0))
    num_drawn = PICTURES.num_drawn
    pixels = frames.pixels
    assert pixels.shape == (len(frames.times_seconds), *frames.picture_size, 3) and pixels.dtype == np.uint8
    assert again.pixels is pixels and pickle.loads(pickle.dumps(frames)).pixels is pixels
    assert PICTURES.num_drawn == num_drawn + 1
    np.testing.assert_array_equal(frames.draw(), pixels)
    kept = frames.until(3.0)
    assert kept.times_seconds == [seconds for seconds in frames.times_seconds if seconds <= 3.0]
    assert kept.pixels.shape[0] == len(kept.times_seconds)
    assert frames.on("cuda").key == frames.key and frames.on("cuda").device == "cuda"


def test_the_cache_lets_go_of_what_was_seen_longest_ago():
    one, other = (frames_of(FrameForgeTask("counting").read(number)) for number in (0, 1))
    cache = PictureCache(max_bytes=one.draw().nbytes + 1)
    first = cache.get(one)
    cache.get(other)
    assert cache.num_bytes == cache.get(other).nbytes and cache.num_drawn == 2
    assert cache.get(one) is not first and cache.num_drawn == 3


def test_prompts_are_laid_out_without_drawing():
    example = FrameForgeTask("counting", FrameForgeOptions(seed=78, tier="hour")).read(0)
    num_drawn = PICTURES.num_drawn
    processor = Processor.load(BUNDLED_MODEL)
    prompt = lay_out(example.messages, processor, max_tokens=1 << 20)
    assert len(prompt.pictures) == 7200 and prompt.num_tokens > 7200 * 16
    assert PICTURES.num_drawn == num_drawn


@pytest.mark.parametrize(("options", "num_sampled"), [({}, None), ({"total_tokens": 160}, 10), ({"fps": 1.0}, None)])
def test_frames_are_those_of_a_file_of_the_same_clip(tmp_path, options, num_sampled):
    task = FrameForgeTask("counting", FrameForgeOptions(seconds=(8.0, 9.0), is_damaged=False, **options))
    frames = frames_of(task.read(2))
    tier = TIERS["standard"]
    film(Clip("clip.mp4", frames.scene, [], round(frames.duration_seconds * tier.fps), tier), tmp_path / "clip.mp4")
    limits = load_limits(BUNDLED_MODEL)[1].changed(**options)
    read = read_video(tmp_path / "clip.mp4", limits)
    assert read.times_seconds == frames.times_seconds
    assert read.duration_seconds == pytest.approx(frames.duration_seconds)
    assert read.pixels.shape == frames.pixels.shape
    assert num_sampled is None or len(frames.times_seconds) == num_sampled
    difference = np.abs(read.pixels.astype(int) - frames.pixels.astype(int)).mean((1, 2, 3))
    # (shown at the same moments: what the file shows half a second later differs far more where something comes or goes)
    assert difference.max() < 12.0


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("colours", {}, "kind 'colours' is unknown"),
        ("counting", {"split": "all"}, "split is 'all'"),
        ("counting", {"tier": "day"}, "tier is 'day'"),
        ("two_moments", {"kinds": ("sooner",)}, "kinds are"),
        ("two_moments", {"seconds": (10.0, 20.0)}, "give 30 s or more"),
        ("counting", {"seconds": (20.0, 10.0)}, "shortest and the longest"),
        ("counting", {"tier": "hour", "seconds": (30.0, 40.0)}, "give 60 s or more"),
        ("counting", {"fps": 0.1}, "fps is 0.1"),
        ("counting", {"format_weight": -1.0}, "give numbers from 0"),
    ],
)
def test_options_that_make_no_sense_are_told(kind, options, said):
    with pytest.raises(InputError, match=said):
        FrameForgeTask(kind, FrameForgeOptions(**options))
