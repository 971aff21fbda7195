"""Long clips of few events: spread out, seen by sampling, with every question's answer in them; needles at their depth."""

from itertools import pairwise

import numpy as np
import pytest

from openkeye.common.checks import InputError
from openkeye.frameforge.needles import make_needle, make_sparse_scene
from openkeye.frameforge.questions import TASKS, make_questions
from openkeye.frameforge.scene import MIN_GAP_SECONDS, overlap_seconds
from openkeye.frameforge.scoring import temporal_iou
from openkeye.frameforge.writer import TIERS, make_clip, needle_of
from openkeye.inputs.intervals import parse_intervals


def scenes(seconds: float, num: int = 30):
    return [make_sparse_scene(np.random.default_rng([5, n]), 100.0, 100.0 + seconds) for n in range(num)]


@pytest.mark.parametrize("seconds", [60.0, 600.0, 3600.0])
def test_events_are_short_and_far_apart(seconds):
    for scene in scenes(seconds):
        events = sorted(interval for track in scene.tracks for interval in track.intervals)
        assert all(100.0 <= first < last <= 100.0 + seconds for first, last in events)
        assert all(2.0 <= last - first <= 8.0 for first, last in events)
        assert sum(last - first for first, last in events) < (0.85 if seconds == 60.0 else 0.3) * seconds
        for track in scene.tracks:
            assert all(later[0] - earlier[1] >= MIN_GAP_SECONDS for earlier, later in pairwise(track.intervals))
        # Two words are never on screen together.
        captions = sorted(track.intervals[0] for track in scene.captions)
        assert all(earlier[1] < later[0] for earlier, later in pairwise(captions))
        assert len({scene.name(track) for track in scene.objects}) == len(scene.objects) >= 4


def test_an_hour_reaches_from_its_first_minutes_to_its_last():
    for scene in scenes(3600.0):
        events = sorted(interval for track in scene.tracks for interval in track.intervals)
        gaps = [later[0] - earlier[1] for earlier, later in pairwise(events)]
        assert max(gaps) < 1200.0 and max(gaps) > 120.0
        assert events[0][0] < 900.0 and events[-1][1] > 2900.0


def test_some_objects_meet_and_most_do_not():
    for scene in scenes(1800.0):
        margins = [overlap_seconds(a, b) for n, a in enumerate(scene.objects) for b in scene.objects[:n]]
        assert max(margins) >= 1.0 and sum(margin > 0 for margin in margins) <= 3


def test_a_minute_is_the_least():
    with pytest.raises(InputError, match="a clip of 59 s cannot hold sparse events; give at least 60 s"):
        make_sparse_scene(np.random.default_rng(0), 0.0, 59.0)
    with pytest.raises(InputError, match="give at least 60 s"):
        make_clip(0, 0, "hour", seconds=(10.0, 20.0))


def test_every_task_is_asked_of_an_hour_and_spans_are_seen():
    for index in range(10):
        clip = make_clip(2, index, "hour")
        assert clip.num_frames == 7200 and clip.duration_seconds == 3600.0 and len(clip.questions) == 16
        assert {question.task for question in clip.questions} == set(TASKS)
        for question in clip.questions:
            if question.intervals:
                said = [(first - 0.25, last + 0.25) for first, last in parse_intervals(question.answer)]
                assert len(said) == len(question.intervals) and temporal_iou(said, question.intervals) > 0.7


def test_tiers_have_seeds_of_their_own():
    numbers = [tier.number for tier in TIERS.values()]
    assert len(set(numbers)) == len(numbers) == 3 and 3 not in numbers


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_needle_lies_at_its_depth_and_nothing_beside_it(depth):
    for index in range(10):
        needle = needle_of(1, index, 5.0, depth)
        when, which = needle.questions
        first, last = when.intervals[0]
        assert 3.0 <= last - first <= 4.0 and first >= 0.0 and last <= 300.0
        assert abs((first + last) / 2 - depth * 300.0) < 2.01
        assert len(needle.frame_times) == 600
        scene, names = needle.scene, [needle.scene.name(track) for track in needle.scene.objects]
        assert names.count(names[0]) == 1 and names[0] in when.text
        shown = [track for track in scene.tracks if overlap_seconds(track, scene.tracks[0]) > -2.99]
        assert len(shown) == 2 and len(scene.tracks) >= 13
        words = [track.sprite for track in scene.captions]
        assert words.count(words[0]) == 1 and which.answer


def test_a_needle_looks_the_same_at_every_length_and_depth():
    near, far = needle_of(1, 4, 1.0, 0.1), needle_of(1, 4, 20.0, 0.9)
    assert near.questions[0].text == far.questions[0].text and near.questions[1].answer == far.questions[1].answer
    other = make_needle(np.random.default_rng(9), 1.0, 0.1, 2.0)
    assert other.questions[0].text != near.questions[0].text


def test_questions_can_be_asked_for_many_rounds():
    scene = scenes(600.0, 1)[0]
    questions = make_questions(scene, np.random.default_rng(0), 100.0 + 0.5 * np.arange(1200), 4)
    assert len(questions) == 32
