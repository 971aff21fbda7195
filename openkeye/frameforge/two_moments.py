"""Questions that need two moments of a video, with truths by construction.

A question is asked only where taking away any one of its moments changes its truth, or leaves none: whoever looks at one of
them alone cannot know.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from openkeye.frameforge.catalogue import FIRST_NUMBER, SPRITES
from openkeye.frameforge.questions import seen_spans
from openkeye.frameforge.scene import Interval, Scene

KINDS = ("longer", "later", "which_time_longer", "word_at_time", "same_word", "times_between")
ORDINALS = ("first", "second", "third", "fourth", "fifth")
MIN_MARGIN_SECONDS = 1.0
# by which one thing must last longer than another to be asked about: two frames
MIN_SHARED_SECONDS = 1.0
# that a word stands beside an appearance to belong to it
Moment = tuple[int, int]
# index in scene.tracks, and of one of its intervals
Terms = tuple[int, ...]
# what one question is about: tracks and ordinals, by kind


@dataclass(frozen=True)
class TwoMomentQuestion:
    """One question, its answer, and the moments that it needs."""

    kind: str
    # of KINDS
    text: str
    answer: str
    terms: Terms
    moments: tuple[Moment, ...]

    @property
    def task(self) -> str:
        return "two_moments"


@dataclass(frozen=True)
class _Kind:
    """How questions of one kind are made."""

    candidates: Callable[[Scene], Iterator[Terms]]
    answer: Callable[[Scene, np.ndarray, Terms, float], str | None]
    # None where there is no truth, or none by that margin (seconds)
    moments: Callable[[Scene, Terms], tuple[Moment, ...]]
    text: Callable[[Scene, Terms, np.random.Generator], str]


def make_two_moment_question(
    kind: str, scene: Scene, rng: np.random.Generator, frame_times: np.ndarray
) -> TwoMomentQuestion | None:
    """A question of one of KINDS; None where the scene holds none. Either answer of a question with two is equally likely,
    where the scene has both."""
    maker = _MAKERS[kind]
    found: dict[str, list[tuple[Terms, tuple[Moment, ...]]]] = {}
    for terms in maker.candidates(scene):
        answer = maker.answer(scene, frame_times, terms, MIN_MARGIN_SECONDS)
        if answer is None:
            continue
        moments = maker.moments(scene, terms)
        if all(maker.answer(without(scene, moment), frame_times, terms, 0.0) != answer for moment in moments):
            found.setdefault(answer, []).append((terms, moments))
    if not found:
        return None
    answer = sorted(found)[int(rng.integers(len(found)))]
    terms, moments = found[answer][int(rng.integers(len(found[answer])))]
    return TwoMomentQuestion(kind, maker.text(scene, terms, rng), answer, terms, moments)


def without(scene: Scene, moment: Moment) -> Scene:
    """The scene as it would be had one appearance not been; names and numbers of the tracks stay."""
    number, gone = moment
    tracks = list(scene.tracks)
    kept = tuple(shown for place, shown in enumerate(tracks[number].intervals) if place != gone)
    tracks[number] = replace(tracks[number], intervals=kept)
    return replace(scene, tracks=tuple(tracks))


def _numbers(scene: Scene, times: range) -> list[int]:
    """Objects with so many appearances."""
    return [n for n, track in enumerate(scene.tracks) if not track.is_caption and len(track.intervals) in times]


def _name(scene: Scene, number: int) -> str:
    track = scene.tracks[number]
    if track.is_caption:
        return f"{'number' if track.sprite >= FIRST_NUMBER else 'word'} {SPRITES[track.sprite]}"
    return scene.name(track)


def _seen_seconds(shown: Interval, frame_times: np.ndarray) -> float | None:
    """From the first frame that shows it to the last."""
    spans = seen_spans((shown,), frame_times)
    return spans[0][1] - spans[0][0] if spans else None


def _is_clear(first: Interval, second: Interval, frame_times: np.ndarray, margin: float) -> bool | None:
    """Whether the first lasts longer; None where it does by less than a margin, in truth or for eyes that see frames."""
    if not margin:
        return first[1] - first[0] > second[1] - second[0]
    seen = [_seen_seconds(shown, frame_times) for shown in (first, second)]
    truth = (first[1] - first[0]) - (second[1] - second[0])
    if seen[0] is None or seen[1] is None or min(abs(truth), abs(seen[0] - seen[1])) < margin:
        return None
    return truth > 0 if (seen[0] > seen[1]) == (truth > 0) else None


def _singles(scene: Scene) -> Iterator[Terms]:
    alone = _numbers(scene, range(1, 2))
    yield from ((a, b) for a in alone for b in alone if a != b)


def _all_moments(scene: Scene, terms: Terms) -> tuple[Moment, ...]:
    return tuple((number, 0) for number in terms)


def _longer(scene: Scene, frame_times: np.ndarray, terms: Terms, margin: float) -> str | None:
    first, second = (scene.tracks[number].intervals for number in terms)
    is_first = _is_clear(first[0], second[0], frame_times, margin) if first and second else None
    return None if is_first is None else f"The {_name(scene, terms[0] if is_first else terms[1])}."


def _later(scene: Scene, frame_times: np.ndarray, terms: Terms, margin: float) -> str | None:
    spans = [seen_spans(scene.tracks[number].intervals[:1], frame_times) for number in terms]
    if not all(spans):
        return None
    # As somebody says it who has read both times, each rounded.
    seconds = round(round(spans[1][0][0], 1) - round(spans[0][0][0], 1), 1)
    return f"{seconds:.1f} seconds." if seconds >= max(margin, 0.1) else None


def _returns(scene: Scene) -> Iterator[Terms]:
    # Of three different words, taking one away leaves two different ones: no such question needs both.
    yield from ((number,) for number in _numbers(scene, range(2, 6)) if len(scene.tracks[number].intervals) != 3)


def _twice(scene: Scene) -> Iterator[Terms]:
    for number in _numbers(scene, range(2, 6)):
        count = len(scene.tracks[number].intervals)
        yield from ((number, a, b) for a in range(count) for b in range(a + 1, count))


def _asked_times(scene: Scene, terms: Terms) -> tuple[Moment, ...]:
    number, *times = terms
    return tuple((number, time) for time in times)


def _which_time_longer(scene: Scene, frame_times: np.ndarray, terms: Terms, margin: float) -> str | None:
    number, a, b = terms
    shown = scene.tracks[number].intervals
    if max(a, b) >= len(shown):
        return None
    is_first = _is_clear(shown[a], shown[b], frame_times, margin)
    return None if is_first is None else f"The {ORDINALS[a if is_first else b]} time."


def word_beside(scene: Scene, shown: Interval) -> int | None:
    """The one word that stands on screen during an appearance, as its sprite; None for none, or several."""
    found = set()
    for track in scene.captions:
        if track.sprite < FIRST_NUMBER:
            shared = max((min(shown[1], b) - max(shown[0], a) for a, b in track.intervals), default=0.0)
            if shared > 0:
                found.add((track.sprite, shared >= MIN_SHARED_SECONDS))
    return found.pop()[0] if len(found) == 1 and next(iter(found))[1] else None


def _word_times(scene: Scene) -> Iterator[Terms]:
    for number in _numbers(scene, range(2, 6)):
        yield from ((number, time) for time in range(1, len(scene.tracks[number].intervals)))


def _up_to_time(scene: Scene, terms: Terms) -> tuple[Moment, ...]:
    """Who does not know of every earlier appearance does not know which one this is."""
    return tuple((terms[0], time) for time in range(terms[1] + 1))


def _word_at_time(scene: Scene, frame_times: np.ndarray, terms: Terms, margin: float) -> str | None:
    shown = scene.tracks[terms[0]].intervals
    word = word_beside(scene, shown[terms[1]]) if terms[1] < len(shown) else None
    return None if word is None else f"{SPRITES[word].capitalize()}."


def _same_word(scene: Scene, frame_times: np.ndarray, terms: Terms, margin: float) -> str | None:
    shown = scene.tracks[terms[0]].intervals
    if len(shown) < 2:
        return None
    first, last = word_beside(scene, shown[0]), word_beside(scene, shown[-1])
    if first is None or last is None:
        return None
    return "Yes." if first == last else "No."


def _first_and_last(scene: Scene, terms: Terms) -> tuple[Moment, ...]:
    return ((terms[0], 0), (terms[0], len(scene.tracks[terms[0]].intervals) - 1))


def _words_around(scene: Scene) -> Iterator[Terms]:
    """(thing that returns, word, later word), each word there once."""
    words = [
        n
        for n, track in enumerate(scene.tracks)
        if track.is_caption and track.sprite < FIRST_NUMBER and len(track.intervals) == 1
    ]
    for number in _numbers(scene, range(2, 6)):
        shown = scene.tracks[number].intervals
        for a in words:
            for b in words:
                start, end = scene.tracks[a].intervals[0][1], scene.tracks[b].intervals[0][0]
                if start < end and any(start <= first and last <= end for first, last in shown):
                    yield number, a, b


def _times_between(scene: Scene, frame_times: np.ndarray, terms: Terms, margin: float) -> str | None:
    number, *around = terms
    words = [scene.tracks[word].intervals for word in around]
    if not all(words):
        return None
    start, end = words[0][0][1], words[1][0][0]
    shown = scene.tracks[number].intervals
    if any(first < start < last or first < end < last for first, last in shown):
        return None
    # A word beside an appearance begins and ends with it: such an appearance is neither between nor outside.
    edges = [edge for word in words for edge in word[0]]
    if any(first <= edge <= last for first, last in shown for edge in edges):
        return None
    count = sum(start < first and last < end for first, last in shown)
    return f"{count}." if count else None


def _words_and_inside(scene: Scene, terms: Terms) -> tuple[Moment, ...]:
    number, first_word, last_word = terms
    start, end = scene.tracks[first_word].intervals[0][1], scene.tracks[last_word].intervals[0][0]
    inside = [place for place, shown in enumerate(scene.tracks[number].intervals) if start < shown[0] and shown[1] < end]
    return ((first_word, 0), (last_word, 0), *((number, place) for place in inside))


def _pick(rng: np.random.Generator, *phrasings: str) -> str:
    return phrasings[int(rng.integers(len(phrasings)))]


def _say_longer(scene: Scene, terms: Terms, rng: np.random.Generator) -> str:
    a, b = (_name(scene, number) for number in terms)
    return _pick(rng, f"Which is visible longer, the {a} or the {b}?", f"Which is on screen longer, the {a} or the {b}?")


def _say_later(scene: Scene, terms: Terms, rng: np.random.Generator) -> str:
    a, b = (_name(scene, number) for number in terms)
    return _pick(
        rng,
        f"How many seconds after the {a} does the {b} appear?",
        f"What is the number of seconds from the {a} to the {b}?",
    )


def _say_which_time(scene: Scene, terms: Terms, rng: np.random.Generator) -> str:
    number, a, b = terms
    return f"Is the {_name(scene, number)} visible longer the {ORDINALS[a]} time or the {ORDINALS[b]} time?"


def _say_word_at_time(scene: Scene, terms: Terms, rng: np.random.Generator) -> str:
    name, time = _name(scene, terms[0]), ORDINALS[terms[1]]
    return _pick(
        rng,
        f"Which word is shown when the {name} appears the {time} time?",
        f"What word can be read when the {name} appears the {time} time?",
    )


def _say_same_word(scene: Scene, terms: Terms, rng: np.random.Generator) -> str:
    name = _name(scene, terms[0])
    return f"Is the same word shown when the {name} appears the first time and the last time?"


def _say_between(scene: Scene, terms: Terms, rng: np.random.Generator) -> str:
    name, first, last = (_name(scene, number) for number in terms)
    return f"How many times does the {name} appear after the {first} and before the {last}?"


_MAKERS = {
    "longer": _Kind(_singles, _longer, _all_moments, _say_longer),
    "later": _Kind(_singles, _later, _all_moments, _say_later),
    "which_time_longer": _Kind(_twice, _which_time_longer, _asked_times, _say_which_time),
    "word_at_time": _Kind(_word_times, _word_at_time, _up_to_time, _say_word_at_time),
    "same_word": _Kind(_returns, _same_word, _first_and_last, _say_same_word),
    "times_between": _Kind(_words_around, _times_between, _words_and_inside, _say_between),
}
assert tuple(_MAKERS) == KINDS
