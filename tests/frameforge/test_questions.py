"""Every answer follows from the scene, and none from the question alone."""

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from openkeye.frameforge.catalogue import COLOUR_NAMES, FIRST_NUMBER, SHAPES, SPRITES
from openkeye.frameforge.questions import TASKS, Question, say_spans, seen_spans
from openkeye.frameforge.scene import Scene, overlap_seconds
from openkeye.frameforge.writer import Clip, make_clip

NUM_CLIPS = 300


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [make_clip(77, index) for index in range(NUM_CLIPS)]


def asked(clips: list[Clip], task: str) -> list[tuple[Clip, Question]]:
    return [(clip, question) for clip in clips for question in clip.questions if question.task == task]


def sampled_times(clip: Clip) -> np.ndarray:
    count = max(2, int(clip.duration_seconds * 2))
    return np.rint(np.linspace(0, clip.num_frames - 1, count)) / clip.tier.fps


def named(scene: Scene, question: Question) -> list:
    return [scene.tracks[number] for number, _ in question.mentions]


def test_every_clip_asks_every_task(clips):
    assert all({question.task for question in clip.questions} == set(TASKS) for clip in clips)
    assert all(len(clip.questions) == 8 for clip in clips)


def test_localisation_tells_the_frames_inside_the_intervals(clips):
    for clip, question in asked(clips, "timestamp_localisation"):
        (track,) = named(clip.scene, question)
        assert question.intervals == track.intervals
        times = sampled_times(clip)
        spans = []
        for first, last in track.intervals:
            seen = [t for t in times if first <= t < last]
            spans.append(f"from {seen[0]:.1f} to {seen[-1]:.1f}")
        assert question.answer.lower() == " and ".join(spans) + " seconds."


def test_counts_are_the_scenes_counts(clips):
    for clip, question in asked(clips, "counting"):
        number = int(question.answer.rstrip("."))
        objects = clip.scene.objects
        if question.mentions:
            assert number == len(named(clip.scene, question)[0].intervals)
        elif any(word in question.text for word in ("different objects", "in total", "all objects", "total number")):
            assert number == len(objects)
        else:
            colour = [name for name in COLOUR_NAMES if f" {name} objects" in question.text]
            shape = [name for name in SHAPES if f" {name}s" in question.text or f" {name}es" in question.text]
            matching = [
                track
                for track in objects
                if (colour and COLOUR_NAMES[track.colour] == colour[0]) or (shape and SPRITES[track.sprite] == shape[0])
            ]
            assert number == len(matching), question.text


def test_orders_and_meetings_are_the_scenes(clips):
    for clip, question in asked(clips, "before_after"):
        first, second = named(clip.scene, question)
        is_before = first.intervals[0][0] < second.intervals[0][0]
        assert abs(first.intervals[0][0] - second.intervals[0][0]) >= 1.0
        names = [name for _, name in question.mentions]
        expected = {
            "before": "Yes." if is_before else "No.",
            "after": "No." if is_before else "Yes.",
            "first": f"The {names[0] if is_before else names[1]}.",
            "later": f"The {names[1] if is_before else names[0]}.",
        }
        (kind,) = [word for word in expected if f" {word}" in question.text]
        assert question.answer == expected[kind]
    for clip, question in asked(clips, "co_occurrence"):
        margin = overlap_seconds(*named(clip.scene, question))
        assert question.answer == ("Yes." if margin > 0 else "No.") and abs(margin) >= 1.0


def test_reading_asks_for_what_is_shown_then(clips):
    for clip, question in asked(clips, "reading"):
        if question.kind == "intervals":
            continue
        moment = float(question.text.split(" at ")[1].split(" ")[0])
        is_number = "number" in question.text
        shown = [
            SPRITES[track.sprite]
            for track in clip.scene.captions
            if (track.sprite >= FIRST_NUMBER) == is_number and any(a + 0.5 <= moment <= b - 0.5 for a, b in track.intervals)
        ]
        assert [word.capitalize() + "." for word in shown] == [question.answer]


def test_motion_follows_the_path(clips):
    for clip, question in asked(clips, "motion"):
        (track,) = named(clip.scene, question)
        (t0, x0, y0), (t1, x1, y1) = track.path[:2]
        if question.kind == "moment":
            assert question.moment_seconds == t1
            said = float(question.answer.split()[1])
            assert abs(said - t1) <= 0.35
            continue
        direction = {
            (1, 0): "To the right.",
            (-1, 0): "To the left.",
            (0, 1): "Down.",
            (0, -1): "Up.",
        }[(int(np.sign(round(x1 - x0, 6))), int(np.sign(round(y1 - y0, 6))))]
        assert question.answer == direction and t0 < t1


def test_names_are_unique_and_answers_speak_of_one_thing(clips):
    for clip in clips:
        names = [clip.scene.name(track) for track in clip.scene.objects]
        assert len(set(names)) == len(names)


def test_captions_of_a_kind_never_share_a_moment(clips):
    for clip in clips:
        for is_number in (False, True):
            spans = sorted(span for t in clip.scene.captions if (t.sprite >= FIRST_NUMBER) == is_number for span in t.intervals)
            assert all(a[1] <= b[0] for a, b in pairwise(spans))


def test_no_trivial_strategy_pays(clips):
    by_phrasing: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for clip in clips:
        for question in clip.questions:
            if question.kind != "words":
                continue
            text = question.text
            for place, (_, name) in enumerate(question.mentions):
                text = text.replace(name, f"#{place}", 1)
            answer = question.answer
            for place, (_, name) in enumerate(question.mentions):
                answer = answer.replace(name, f"#{place}")
            by_phrasing[question.task, text.split(" at ")[0]][answer] += 1
    limits = {"before_after": 0.62, "co_occurrence": 0.68, "motion": 0.45, "reading": 0.2}
    for (task, text), answers in by_phrasing.items():
        if task in limits and sum(answers.values()) >= 60:
            share = max(answers.values()) / sum(answers.values())
            assert share <= limits[task], (text, answers)
    counts = Counter(question.answer for _, question in asked(clips, "counting"))
    assert max(counts.values()) / sum(counts.values()) < 0.35


def test_spans_are_said_and_seen():
    times = np.arange(0, 6, 0.5)
    assert seen_spans(((0.6, 2.1), (5.9, 5.95)), times) == [(1.0, 2.0)]
    assert say_spans([(1.0, 2.0), (3.0, 4.5)]) == "From 1.0 to 2.0 and from 3.0 to 4.5 seconds."
