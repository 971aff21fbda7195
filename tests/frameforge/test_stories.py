"""Stories and questions about two moments: counted again from the scene, without the code that made them."""

from itertools import pairwise

import numpy as np
import pytest

from openkeye.common.checks import InputError
from openkeye.frameforge.catalogue import FIRST_NUMBER, SPRITES
from openkeye.frameforge.scene import MIN_GAP_SECONDS, overlap_seconds
from openkeye.frameforge.stories import StorySettings, make_story
from openkeye.frameforge.two_moments import KINDS, make_two_moment_question

ORDINALS = {"first": 0, "second": 1, "third": 2, "fourth": 3, "fifth": 4}
LENGTHS = (30.0, 60.0, 300.0, 3600.0)


def story(number: int, seconds: float):
    return make_story(np.random.default_rng([7, number]), 10.0, 10.0 + seconds)


def asked(kind: str, seconds: float, num: int = 40):
    frame_times = 10.0 + np.arange(int(2 * seconds)) / 2
    for number in range(num):
        scene = story(number, seconds)
        question = make_two_moment_question(kind, scene, np.random.default_rng([8, number]), frame_times)
        if question is not None:
            yield scene, question


@pytest.mark.parametrize("seconds", LENGTHS)
def test_events_lie_in_the_clip_and_words_never_meet(seconds):
    for number in range(25):
        scene = story(number, seconds)
        for track in scene.tracks:
            assert track.intervals
            assert all(10.0 <= first < last <= 10.0 + seconds for first, last in track.intervals)
            assert all(last - first >= 1.5 for first, last in track.intervals)
            assert all(later[0] - earlier[1] >= MIN_GAP_SECONDS - 0.1 for earlier, later in pairwise(track.intervals))
        for kind in (False, True):
            shown = sorted(i for track in scene.captions if (track.sprite >= FIRST_NUMBER) == kind for i in track.intervals)
            assert all(earlier[1] <= later[0] for earlier, later in pairwise(shown))
        assert len({scene.name(track) for track in scene.objects}) == len(scene.objects)
        assert len({track.sprite for track in scene.captions}) == len(scene.captions)


def test_stories_hold_returns_look_alikes_decoys_and_companions():
    scenes = [story(number, 300.0) for number in range(20)]
    for scene in scenes:
        first = scene.tracks[scene.roles["repeated"]]
        assert 2 <= len(first.intervals) <= 5
        assert any(t is not first and (t.sprite == first.sprite) != (t.colour == first.colour) for t in scene.objects)
        alone = [w for w in scene.captions if all(overlap_seconds(w, t) <= 0 for t in scene.objects)]
        assert alone, "a word that nothing stands beside"
    meets = [overlap_seconds(a, b) > 0 for scene in scenes for n, a in enumerate(scene.objects) for b in scene.objects[:n]]
    assert any(meets) and not all(meets)
    assert any(track.sprite >= FIRST_NUMBER for scene in scenes for track in scene.captions)
    assert np.mean([len(story(n, 3600.0).tracks) for n in range(10)]) > np.mean([len(s.tracks) for s in scenes])


def test_bounds_are_told():
    with pytest.raises(InputError, match="at least 30 s"):
        story(0, 20.0)
    with pytest.raises(InputError, match="give at least 5, 4 and 2"):
        StorySettings(max_events=3)


def named(scene, name: str):
    """The intervals of what a question names."""
    if name.startswith("word "):
        return next(t.intervals for t in scene.tracks if SPRITES[t.sprite] == name[5:])
    return next(t.intervals for t in scene.objects if scene.name(t) == name)


def words_at(scene, shown):
    return [
        SPRITES[t.sprite]
        for t in scene.tracks
        if t.is_caption and t.sprite < FIRST_NUMBER and any(a < shown[1] and shown[0] < b for a, b in t.intervals)
    ]


def recount(scene, text: str, times) -> str | None:
    """The answer to a question, read from its words alone; None where it makes no sense.

    `times`: name to intervals, in place of those of the scene.
    """

    def of(name):
        return times.get(name, named(scene, name))

    words = text.rstrip("?").replace("the same word", "one word")
    if "longer, the " in words:
        a, b = words.split("longer, the ")[1].split(" or the ")
        if not (of(a) and of(b)):
            return None
        (a0, a1), (b0, b1) = of(a)[0], of(b)[0]
        return f"The {a if a1 - a0 > b1 - b0 else b}."
    if words.startswith("Is the "):
        name, rest = words.removeprefix("Is the ").split(" visible longer the ")
        first, second = (ORDINALS[part] for part in rest.removesuffix(" time").split(" time or the "))
        shown = of(name)
        if len(shown) <= second:
            return None
        lengths = [shown[place][1] - shown[place][0] for place in (first, second)]
        return f"The {list(ORDINALS)[first if lengths[0] > lengths[1] else second]} time."
    if " seconds " in words:
        joint = " does the " if " does the " in words else " to the "
        a, b = words.split(" seconds after the " if "after" in words else " seconds from the ")[1].split(joint)
        a, b = of(a), of(b.removesuffix(" appear"))
        first, second = (np.ceil(2 * shown[0][0]) / 2 if shown else None for shown in (a, b))
        return None if first is None or second is None or second <= first else f"{second - first:.1f} seconds."
    if " and before the " in words:
        name, rest = words.removeprefix("How many times does the ").split(" appear after the ")
        if not all(of(word) for word in rest.split(" and before the ")):
            return None
        start, end = (of(word)[0] for word in rest.split(" and before the "))
        return f"{sum(start[1] < a and b < end[0] for a, b in of(name))}."
    name, rest = words.split(" when the ")[1].split(" appears the ")
    shown = of(name)
    if rest == "first time and the last time":
        if len(shown) < 2:
            return None
        return "Yes." if words_at(scene, shown[0]) == words_at(scene, shown[-1]) else "No."
    place = ORDINALS[rest.removesuffix(" time")]
    beside = words_at(scene, shown[place]) if place < len(shown) else []
    return f"{beside[0].capitalize()}." if len(beside) == 1 else None


@pytest.mark.parametrize("seconds", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_truths_are_those_of_the_scene_and_need_every_moment(kind, seconds):
    num_asked = 0
    for scene, question in asked(kind, seconds):
        num_asked += 1
        assert recount(scene, question.text, {}) == question.answer, question.text
        assert len(question.moments) >= 2 and len(set(question.moments)) == len(question.moments)
        for number, place in question.moments:
            track = scene.tracks[number]
            name = f"word {SPRITES[track.sprite]}" if track.is_caption else scene.name(track)
            left = tuple(shown for other, shown in enumerate(track.intervals) if other != place)
            assert recount(scene, question.text, {name: left}) != question.answer, (question.text, number, place)
    assert num_asked >= 5


def test_answers_are_not_to_be_guessed():
    same = [(len(s.tracks[q.terms[0]].intervals) > 3, q.answer == "Yes.") for s, q in asked("same_word", 3600.0, 100)]
    for is_often in (False, True):
        assert 0.3 < np.mean([is_same for often, is_same in same if often == is_often]) < 0.7
    firsts = [question.text.split(", the ")[1].startswith(question.answer[4:-1]) for _, question in asked("longer", 300.0, 150)]
    assert 0.35 < np.mean(firsts) < 0.65
    words = [question.answer for _, question in asked("word_at_time", 300.0, 150)]
    assert max(words.count(word) for word in words) < 0.12 * len(words)
