"""Long videos in which little happens: a few events of seconds, spread over minutes or an hour; one needle at a given depth."""

from dataclasses import dataclass

import numpy as np

from openkeye.common.checks import InputError
from openkeye.frameforge.catalogue import COLOUR_NAMES, FIRST_NUMBER, FIRST_WORD, NUM_OBJECT_SPRITES, SPRITES
from openkeye.frameforge.questions import Question, say_spans, seen_spans
from openkeye.frameforge.scene import (
    Interval,
    Scene,
    Track,
    draw_background,
    draw_looks,
    idle_path,
    straight_path,
    turning_path,
)

MIN_SPARSE_SECONDS = 60.0
# below it events would stand as close as in any other clip
EVENT_SECONDS = (3.0, 8.0)
NEEDLE_SECONDS = (3.0, 4.0)
SECONDS_PER_DISTRACTOR = 20.0
BANDS = (0.12, 0.88)
# heights of captions, as in other scenes


def make_sparse_scene(rng: np.random.Generator, start_seconds: float, end_seconds: float) -> Scene:
    """A scene of 4 to 14 objects, words and numbers, each there for 3-8 s once or a few times, nothing in between.

    The clip is cut into as many equal parts as there are events, in random order, and each event lies somewhere in its own, so
    that gaps are as long as the clip allows. Only companions meet: two objects in ten, each there while another one is.

    Raises:
        InputError: a clip below MIN_SPARSE_SECONDS.
    """
    span = end_seconds - start_seconds
    if span < MIN_SPARSE_SECONDS - 1e-6:
        raise InputError(f"a clip of {span:g} s cannot hold sparse events; give at least {MIN_SPARSE_SECONDS:g} s")
    most = int(np.clip(4 + span / 300.0, 4, 14))
    counted, looks = draw_looks(rng, most, min_objects=4)
    mover, repeated, *others = (int(number) for number in rng.permutation(len(looks)))
    mover_kind = "mover" if rng.random() < 0.6 else "turner"
    companions = dict(zip(others[: max(1, len(looks) // 5)], others[::-1], strict=False))
    companions = {number: host for number, host in companions.items() if number != host and host not in companions}
    num_words, num_numbers = int(rng.integers(2, 3 + min(4, most // 3))), int(rng.integers(0, 3))
    times = [1 + (number not in (mover, repeated) and rng.random() < 0.2) for number in range(len(looks))]
    times[repeated] = int(rng.integers(1, 5))
    num_events = sum(times[number] for number in range(len(looks)) if number not in companions) + num_words + num_numbers
    parts = iter(rng.permutation(num_events).tolist())
    length = span / num_events

    def event() -> Interval:
        return _event(rng, start_seconds + next(parts) * length, length)

    intervals = {n: tuple(sorted(event() for _ in range(times[n]))) for n in range(len(looks)) if n not in companions}
    for number, host in companions.items():
        intervals[number] = (_beside(rng, intervals[host][0], start_seconds, end_seconds),)
    layers = rng.permutation(len(looks))
    tracks: list[Track] = []
    for number, (sprite, colour, texture, size) in enumerate(looks):
        shown = intervals[number]
        direction: str | None = None
        turn: float | None = None
        if number != mover:
            path = idle_path(rng, shown, tracks)
        elif mover_kind == "mover":
            path, direction, turn = straight_path(rng, shown[0])
        else:
            path, direction, turn = turning_path(rng, shown[0])
        tracks.append(Track(sprite, colour, texture, size, shown, path, int(layers[number]), direction, turn))
    words = rng.choice(np.arange(FIRST_WORD, FIRST_NUMBER), num_words, replace=False)
    numbers = rng.choice(np.arange(FIRST_NUMBER, len(SPRITES)), num_numbers, replace=False)
    for sprite in (*words.tolist(), *numbers.tolist()):
        tracks.append(_caption(rng, sprite, event(), BANDS[sprite >= FIRST_NUMBER], len(looks)))
    roles = {mover_kind: mover, "repeated": repeated}
    return Scene(start_seconds, end_seconds, tuple(tracks), draw_background(rng), roles, counted)


def _event(rng: np.random.Generator, part_start: float, part_length: float) -> Interval:
    shortest, longest = EVENT_SECONDS
    length = min(float(rng.uniform(shortest, longest)), 0.7 * part_length)
    # An eighth of the part stays free at both ends, so that sampling at 2 fps sees the gap to any neighbour.
    first = part_start + float(rng.uniform(0.125, 0.875 - length / part_length)) * part_length
    return first, first + length


def _beside(rng: np.random.Generator, host: Interval, start: float, end: float) -> Interval:
    """An event that shares at least half of another one's time."""
    length = host[1] - host[0]
    first = float(np.clip(host[0] + rng.uniform(-0.5, 0.5) * length, start, end - length))
    return first, first + length


def _caption(rng: np.random.Generator, sprite: int, shown: Interval, band: float, layer: int) -> Track:
    place = (shown[0], float(rng.uniform(0.3, 0.7)), band)
    return Track(sprite, int(rng.integers(len(COLOUR_NAMES))), 0, 0, (shown,), (place,), layer)


@dataclass(frozen=True)
class Needle:
    """A video of minutes with one object and one word at a given depth, and its two questions."""

    scene: Scene
    frame_times: np.ndarray
    # [N] seconds
    questions: tuple[Question, Question]
    # when the object is visible, and which word is shown then
    minutes: float
    depth: float
    # share of the video before the needle, as asked for


def make_needle(rng: np.random.Generator, minutes: float, depth: float, fps: float) -> Needle:
    """An object and a word that are there for 3-4 s, once, together, at `depth` (0 to 1) of a video; others elsewhere.

    Every 20 s of the rest show a distractor, an object or a word, at least 3 s away from the needle. No distractor has the
    needle's colour and shape, or its word. The word is asked for by its moment.
    """
    span = 60.0 * minutes
    length = float(rng.uniform(*NEEDLE_SECONDS))
    first = float(np.clip(depth * span - length / 2, 0.0, span - length))
    needle = (first, first + length)
    looks = [(s, c) for s in range(NUM_OBJECT_SPRITES) for c in range(len(COLOUR_NAMES))]
    order = rng.permutation(len(looks)).tolist()
    words = (FIRST_WORD + rng.permutation(FIRST_NUMBER - FIRST_WORD)).tolist()
    sprite, colour = looks[order[0]]
    tracks = [
        Track(sprite, colour, 0, 1, (needle,), idle_path(rng, (needle,), []), 0),
        _caption(rng, words[0], needle, BANDS[0], 1),
    ]
    for number in range(max(1, int(span / SECONDS_PER_DISTRACTOR))):
        start = number * SECONDS_PER_DISTRACTOR + float(rng.uniform(0.0, 10.0))
        shown = (start, start + float(rng.uniform(*EVENT_SECONDS)))
        if shown[0] - 3.0 < needle[1] and needle[0] < shown[1] + 3.0:
            continue
        if rng.random() < 0.25:
            tracks.append(_caption(rng, words[1 + number % (len(words) - 1)], shown, BANDS[0], 1))
        else:
            sprite, colour = looks[order[1 + number % (len(looks) - 1)]]
            tracks.append(Track(sprite, colour, 0, int(rng.integers(2)), (shown,), idle_path(rng, (shown,), []), 0))
    scene = Scene(0.0, span, tuple(tracks), draw_background(rng))
    frame_times = np.arange(int(span * fps)) / fps
    name = scene.name(tracks[0])
    moment = first + length / 2
    spans = say_spans(seen_spans((needle,), frame_times))
    when = Question("timestamp_localisation", f"When is the {name} visible?", spans, (needle,), track=0, mentions=((0, name),))
    word = SPRITES[words[0]].capitalize()
    which = Question("reading", f"Which word is on screen at {moment:.1f} seconds?", f"{word}.", track=1)
    return Needle(scene, frame_times, (when, which), minutes, depth)
