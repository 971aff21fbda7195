"""Harder scenes for questions about two moments: things that come back with words beside them, look-alikes, decoys.

A story fits 30 seconds as well as an hour. Times are seconds, places shares of the canvas.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from openkeye.common.checks import InputError
from openkeye.frameforge.catalogue import COLOUR_NAMES, FIRST_NUMBER, FIRST_WORD, SHAPES, SPRITES
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

MIN_STORY_SECONDS = 30.0
SECONDS_PER_EVENT = 6.0
LONG_EVENT_SECONDS = 4.0
# from which something may turn around
BANDS = (0.12, 0.88)
# heights of words and of numbers

Look = tuple[int, int, int, int]


@dataclass(frozen=True)
class StorySettings:
    """Bounds of a story."""

    min_event_seconds: float = 2.0
    max_event_seconds: float = 14.0
    max_events: int = 40
    max_objects: int = 14
    max_returns: int = 5
    # appearances of one thing

    def __post_init__(self) -> None:
        if not 1.5 <= self.min_event_seconds < self.max_event_seconds:
            raise InputError(
                f"events of {self.min_event_seconds:g} to {self.max_event_seconds:g} s; give 1.5 or more, ascending"
            )
        if self.max_events < 5 or self.max_objects < 4 or self.max_returns < 2:
            raise InputError(
                f"max_events {self.max_events}, max_objects {self.max_objects}, max_returns {self.max_returns}; "
                "give at least 5, 4 and 2"
            )


@dataclass
class _Draft:
    """What has been decided so far."""

    rng: np.random.Generator
    events: Iterator[Interval]
    # none of them meet
    looks: list[Look]
    intervals: list[list[Interval]]
    # of each look
    words: dict[int, list[Interval]]
    # by sprite

    def put(self, number: int) -> Interval:
        """Let an object be there during the next free event."""
        shown = next(self.events)
        self.intervals[number].append(shown)
        return shown


def num_story_events(seconds: float, settings: StorySettings = StorySettings()) -> int:
    """How many events a story of a length has: 5 in 30 s, 10 in a minute, 14 in 5 minutes, 32 in an hour."""
    return max(5, min(int(seconds / SECONDS_PER_EVENT), settings.max_events, 12 + int(seconds / 180.0)))


def make_story(
    rng: np.random.Generator, start_seconds: float, end_seconds: float, settings: StorySettings = StorySettings()
) -> Scene:
    """Draw a story: one or two things that come back, with a word beside them each time (half of the time the same again);
    look-alikes of theirs; things that come once and last unequally long; words and numbers without them.

    The clip is cut into equal parts in random order, one event in each, so that nothing meets by chance. Companions meet: some
    things that are there together with another one.

    Raises:
        InputError: a clip below MIN_STORY_SECONDS.
    """
    span = end_seconds - start_seconds
    if span < MIN_STORY_SECONDS - 1e-6:
        raise InputError(f"a clip of {span:g} s cannot hold a story; give at least {MIN_STORY_SECONDS:g} s")
    num_events = num_story_events(span, settings)
    counted, looks = draw_looks(rng, min(6, settings.max_objects), min_objects=4)
    looks += _look_alikes(rng, looks, min(settings.max_objects - len(looks), num_events // 3))
    draft = _Draft(rng, _events(rng, start_seconds, span, num_events, settings), looks, [[] for _ in looks], {})
    repeated, second_star, mover = 0, 1, 2
    budget = num_events - _bring_back(draft, repeated, num_events, settings)
    if num_events >= 10:
        budget -= _bring_back(draft, second_star, num_events, settings)
    once = [mover, *(number for number in range(len(looks)) if number != mover and not draft.intervals[number])]
    # One event stays for a word that stands alone; who gets none of his own comes with another.
    num_alone = min(max(1, len(once) - max(1, len(once) // 4)), budget - 1)
    hosts, companions = once[:num_alone], once[num_alone:]
    for number in hosts:
        draft.put(number)
    budget -= num_alone
    for number in companions:
        host = hosts[int(rng.integers(len(hosts)))]
        draft.intervals[number].append(_beside(rng, draft.intervals[host][0], start_seconds, end_seconds))
    numbers = _captions(draft, budget, hosts)
    tracks, role = _object_tracks(draft, mover)
    captions = [*draft.words.items(), *numbers.items()]
    tracks += [_caption(rng, sprite, tuple(sorted(shown)), len(tracks)) for sprite, shown in captions]
    return Scene(start_seconds, end_seconds, tuple(tracks), draw_background(rng), role | {"repeated": repeated}, counted)


def _events(
    rng: np.random.Generator, start: float, span: float, num_events: int, settings: StorySettings
) -> Iterator[Interval]:
    part = span / num_events
    for number in rng.permutation(num_events).tolist():
        # Lengths are drawn on a logarithmic scale, so that two of them mostly differ.
        longest = min(settings.max_event_seconds, 0.72 * part)
        shortest = min(settings.min_event_seconds, 0.7 * part)
        length = float(np.exp(rng.uniform(np.log(shortest), np.log(longest))))
        # A part's ends stay free, so that sampling at 2 frames a second sees every gap.
        free = part - length
        first = start + number * part + free * float(rng.uniform(0.4, 0.6) if free < 4.0 else rng.uniform(0.2, 0.8))
        yield first, first + length


def _look_alikes(rng: np.random.Generator, looks: list[Look], most: int) -> list[Look]:
    """For the things that come back: the same shape in another colour, another shape of the same colour, plain ones."""
    taken = {look[:2] for look in looks}
    found: list[Look] = []
    for place in rng.permutation(2 * min(2, len(looks))).tolist():
        sprite, colour, _, _ = looks[place % 2]
        if place < 2:
            choices = [(sprite, other) for other in range(len(COLOUR_NAMES)) if (sprite, other) not in taken]
        else:
            choices = [(other, colour) for other in range(len(SHAPES)) if (other, colour) not in taken]
        if choices and len(found) < most:
            look = choices[int(rng.integers(len(choices)))]
            taken.add(look)
            found.append((*look, 0, int(rng.integers(2))))
    return found


def _bring_back(draft: _Draft, number: int, num_events: int, settings: StorySettings) -> int:
    """Let a thing come two times or more, each time with a word; how many events that took."""
    rng = draft.rng
    most = min(settings.max_returns, max(2, num_events // 4))
    times = int(rng.integers(2, most + 1))
    shown = sorted(draft.put(number) for _ in range(times))
    fresh = [sprite for sprite in range(FIRST_WORD, FIRST_NUMBER) if sprite not in draft.words]
    words = [fresh[place] for place in rng.permutation(len(fresh))[:times]]
    # Every answer about "the same word" is equally likely for the first and the last appearance.
    if rng.random() < 0.5:
        words[-1] = words[0]
    elif times > 3:
        # Their neighbours are crossed, so that taking one away would make them the same.
        words[1], words[-2] = words[-1], words[0]
    for sprite, interval in zip(words, shown, strict=True):
        draft.words.setdefault(sprite, []).append(interval)
    return times


def _beside(rng: np.random.Generator, host: Interval, start: float, end: float) -> Interval:
    """A time that shares at least three quarters of another one's."""
    length = host[1] - host[0]
    first = float(np.clip(host[0] + rng.uniform(-0.25, 0.25) * length, start, end - length))
    return first, first + length


def _captions(draft: _Draft, budget: int, hosts: list[int]) -> dict[int, list[Interval]]:
    """Words where none of the returning things is, and numbers, partly beside the words of others: decoys."""
    rng = draft.rng
    fresh = [sprite for sprite in range(FIRST_WORD, FIRST_NUMBER) if sprite not in draft.words]
    order = rng.permutation(len(fresh)).tolist()
    for sprite in (fresh[place] for place in order[: max(0, budget)]):
        draft.words[sprite] = [next(draft.events)]
    # A look-alike has its own word now and then.
    for sprite, host in zip((fresh[place] for place in order[max(0, budget) :]), hosts, strict=False):
        if rng.random() < 0.3:
            draft.words[sprite] = [draft.intervals[host][0]]
    occupied = [shown for times in draft.words.values() for shown in times]
    numbers = rng.choice(np.arange(FIRST_NUMBER, len(SPRITES)), min(3, len(occupied)), replace=False).tolist()
    places = rng.permutation(len(occupied))[: len(numbers)].tolist()
    return {sprite: [occupied[place]] for sprite, place in zip(numbers, places, strict=True)}


def _object_tracks(draft: _Draft, mover: int) -> tuple[list[Track], dict[str, int]]:
    """Tracks of the objects in their own order, and the mover's role."""
    rng = draft.rng
    layers = rng.permutation(len(draft.looks))
    tracks: list[Track] = []
    first, last = draft.intervals[mover][0]
    role = "mover" if rng.random() < 0.6 or last - first < LONG_EVENT_SECONDS else "turner"
    for number, (sprite, colour, texture, size) in enumerate(draft.looks):
        shown = tuple(sorted(draft.intervals[number]))
        direction: str | None = None
        turn: float | None = None
        if number != mover:
            path = idle_path(rng, shown, tracks)
        elif role == "mover":
            path, direction, turn = straight_path(rng, shown[0])
        else:
            path, direction, turn = turning_path(rng, shown[0])
        tracks.append(Track(sprite, colour, texture, size, shown, path, int(layers[number]), direction, turn))
    return tracks, {role: mover}


def _caption(rng: np.random.Generator, sprite: int, shown: tuple[Interval, ...], layer: int) -> Track:
    place = (shown[0][0], float(rng.uniform(0.3, 0.7)), BANDS[sprite >= FIRST_NUMBER])
    return Track(sprite, int(rng.integers(len(COLOUR_NAMES))), 0, 0, shown, (place,), layer)
