"""Scenes: what is where and when. Built for their answers, then everything else is filled in at random.

Times are seconds from the start of the stream; places are shares of the canvas, (0, 0) top left.
"""

from dataclasses import dataclass, field

import numpy as np

from openkeye.frameforge.catalogue import (
    CAPTION_HALF_HEIGHT,
    COLOUR_NAMES,
    FIRST_NUMBER,
    FIRST_WORD,
    HALF_SIZES,
    NUM_OBJECT_SPRITES,
    SIZES,
    SPRITES,
    TEXTURES,
    sprite_noun,
)

Interval = tuple[float, float]

BACKGROUNDS = ("plain", "gradient", "noisy", "photographic")
DIRECTIONS = {"to the left": (-1.0, 0.0), "to the right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
MIN_GAP_SECONDS = 1.25
# between two appearances of one object, so that sampling at 2 fps sees the gap


@dataclass(frozen=True)
class Track:
    """One thing on the canvas: an object, or a caption (a word or number)."""

    sprite: int
    colour: int
    texture: int
    size: int
    intervals: tuple[Interval, ...]
    # when it is visible, ascending, half open
    path: tuple[tuple[float, float, float], ...]
    # (time, x, y) waypoints, linear in between, constant outside
    layer: int
    direction: str | None = None
    # for a mover: a key of DIRECTIONS
    turn_seconds: float | None = None
    # for an object that turns around once

    @property
    def is_caption(self) -> bool:
        return self.sprite >= NUM_OBJECT_SPRITES

    @property
    def half_height(self) -> float:
        return CAPTION_HALF_HEIGHT if self.is_caption else HALF_SIZES[self.size]


@dataclass(frozen=True)
class Background:
    """One of four kinds, still for the whole clip."""

    kind: str
    first: tuple[float, float, float]
    second: tuple[float, float, float]
    # RGB, 0 to 255; plain has both alike
    angle: float
    photograph: int = 0
    crop: tuple[float, float, float] = (0.0, 0.0, 1.0)
    # centre x, y in -1..1 and scale of the photograph
    seed: int = 0


@dataclass(frozen=True)
class Scene:
    """Everything about one clip."""

    start_seconds: float
    end_seconds: float
    tracks: tuple[Track, ...]
    background: Background
    roles: dict[str, int] = field(default_factory=dict)
    # which track was built for which question: "mover", "turner", "repeated"
    counted: tuple[str, int] | None = None
    # the attribute whose count was chosen first: ("colour" | "shape", index)

    @property
    def objects(self) -> list[Track]:
        return [track for track in self.tracks if not track.is_caption]

    @property
    def captions(self) -> list[Track]:
        return [track for track in self.tracks if track.is_caption]

    def name(self, track: Track) -> str:
        """The shortest name that only this object has: `red circle`, `large red circle`, `striped red circle`."""
        name = f"{COLOUR_NAMES[track.colour]} {sprite_noun(track.sprite)}"
        alike = [t for t in self.objects if t is not track and (t.colour, t.sprite) == (track.colour, track.sprite)]
        if not alike:
            return name
        if all(other.size != track.size for other in alike):
            return f"{SIZES[track.size]} {name}"
        assert all(other.texture != track.texture for other in alike), "look-alikes differ in size or texture"
        return f"{TEXTURES[track.texture]} {name}"


@dataclass(frozen=True)
class SceneSettings:
    """Bounds of the generator."""

    min_event_seconds: float = 1.5
    max_objects: int = 6


def make_scene(
    rng: np.random.Generator, start_seconds: float, end_seconds: float, settings: SceneSettings = SceneSettings()
) -> Scene:
    """Draw one scene. The count to be asked for is drawn first, so that every answer is equally likely.

    Scenes are drawn again (a few times at most) until one pair of objects clearly meets and one clearly does not, so that
    either answer about meeting can be asked for.
    """
    for _ in range(8):
        scene = _draw_scene(rng, start_seconds, end_seconds, settings)
        margins = [overlap_seconds(a, b) for n, a in enumerate(scene.objects) for b in scene.objects[:n]]
        if max(margins) >= 1.0 and min(margins) <= -1.0:
            break
    return scene


def overlap_seconds(first: Track, second: Track) -> float:
    """How long both are visible together; where never, minus the smallest gap between them."""
    gaps = [min(a[1], b[1]) - max(a[0], b[0]) for a in first.intervals for b in second.intervals]
    return sum(gap for gap in gaps if gap > 0) or max(gaps)


def _draw_scene(rng: np.random.Generator, start_seconds: float, end_seconds: float, settings: SceneSettings) -> Scene:
    counted, looks = draw_looks(rng, settings.max_objects)
    tracks: list[Track] = []
    roles = dict(zip(("mover", "repeated"), (int(n) for n in rng.permutation(len(looks))[:2]), strict=True))
    mover_kind = "mover" if rng.random() < 0.6 else "turner"
    roles[mover_kind] = roles.pop("mover")
    layers = rng.permutation(len(looks))
    intervals: tuple[Interval, ...]
    for number, (sprite, colour, texture, size) in enumerate(looks):
        if number == roles.get("mover"):
            intervals = (_event(rng, start_seconds, end_seconds, 2.5, 9.0),)
            path, direction, turn = straight_path(rng, intervals[0])
        elif number == roles.get("turner"):
            intervals = (_event(rng, start_seconds, end_seconds, 4.0, 12.0),)
            path, direction, turn = turning_path(rng, intervals[0])
        else:
            times = int(rng.integers(1, 4)) if number == roles["repeated"] else 1 + int(rng.random() < 0.2)
            intervals = _events(rng, start_seconds, end_seconds, settings.min_event_seconds, times)
            path, direction, turn = idle_path(rng, intervals, tracks), None, None
        tracks.append(Track(sprite, colour, texture, size, intervals, path, int(layers[number]), direction, turn))
    tracks += _captions(rng, start_seconds, end_seconds, len(looks))
    return Scene(start_seconds, end_seconds, tuple(tracks), draw_background(rng), roles, counted)


def draw_looks(
    rng: np.random.Generator, max_objects: int, min_objects: int = 2
) -> tuple[tuple[str, int], list[tuple[int, int, int, int]]]:
    """Sprite, colour, texture and size of every object, with a chosen number of one colour or shape."""
    kind = "colour" if rng.random() < 0.5 else "shape"
    target = int(rng.integers(0, 5))
    num_objects = int(rng.integers(max(min_objects, target), max_objects + 1))
    wanted = int(rng.integers(len(COLOUR_NAMES) if kind == "colour" else 6))
    looks: list[tuple[int, int, int, int]] = []
    while len(looks) < num_objects:
        sprite = int(rng.integers(6)) if rng.random() < 0.75 else int(rng.integers(6, NUM_OBJECT_SPRITES))
        colour = int(rng.integers(len(COLOUR_NAMES)))
        is_wanted = len(looks) < target
        if kind == "colour":
            colour = wanted if is_wanted else (wanted + 1 + colour % (len(COLOUR_NAMES) - 1)) % len(COLOUR_NAMES)
        elif is_wanted:
            sprite = wanted
        elif sprite == wanted:
            continue
        texture = int(rng.integers(4)) if rng.random() < 0.4 else 0
        size = int(rng.integers(2))
        alike = [look for look in looks if look[:2] == (sprite, colour)]
        if len(alike) > 1 or (alike and rng.random() < 0.5):
            continue
        if alike:
            # A look-alike differs in exactly one way that a name can tell.
            _, _, texture, size = alike[0]
            if rng.random() < 0.5:
                size = 1 - size
            else:
                texture = (texture + int(rng.integers(1, 4))) % 4
        looks.append((sprite, colour, texture, size))
    order = rng.permutation(num_objects)
    return (kind, wanted), [looks[number] for number in order]


def _event(rng: np.random.Generator, start: float, end: float, shortest: float, longest: float) -> Interval:
    longest = min(longest, 0.8 * (end - start))
    length = float(np.exp(rng.uniform(np.log(min(shortest, longest)), np.log(longest))))
    first = start + float(rng.uniform(0.0, end - start - length))
    return first, first + length


def _events(rng: np.random.Generator, start: float, end: float, shortest: float, times: int) -> tuple[Interval, ...]:
    """`times` intervals with gaps that can be seen; short, long, at the very start and to the very end."""
    span = end - start
    while times * shortest + (times - 1) * MIN_GAP_SECONDS > 0.8 * span:
        times -= 1
    if times == 1:
        first, last = _event(rng, start, end, shortest, 0.75 * span)
        # Some are there from the first frame or stay to the last.
        if rng.random() < 0.15:
            first, last = start, max(start + shortest, last - (first - start))
        elif rng.random() < 0.15:
            first, last = end - (last - first), end
        return ((first, last),)
    free = span - times * shortest - (times - 1) * MIN_GAP_SECONDS
    cuts = np.sort(rng.uniform(0.0, free, 2 * times))
    intervals = []
    for number in range(times):
        offset = start + number * (shortest + MIN_GAP_SECONDS)
        intervals.append((offset + float(cuts[2 * number]), offset + shortest + float(cuts[2 * number + 1])))
    return tuple(intervals)


def straight_path(rng: np.random.Generator, interval: Interval) -> tuple[tuple, str, None]:
    direction = str(rng.choice(list(DIRECTIONS)))
    step_x, step_y = DIRECTIONS[direction]
    length = float(rng.uniform(0.4, 0.7))
    x, y = _lane(rng, step_x, step_y, length)
    first, last = interval
    return ((first, x, y), (last, x + step_x * length, y + step_y * length)), direction, None


def turning_path(rng: np.random.Generator, interval: Interval) -> tuple[tuple, str, float]:
    direction = str(rng.choice(list(DIRECTIONS)))
    step_x, step_y = DIRECTIONS[direction]
    first, last = interval
    turn = float(rng.uniform(first + 0.3 * (last - first), last - 0.3 * (last - first)))
    length = float(rng.uniform(0.45, 0.65))
    x, y = _lane(rng, step_x, step_y, length)
    # The same speed both ways, so that only the direction changes.
    back = length * min(1.0, (last - turn) / (turn - first))
    path = ((first, x, y), (turn, x + step_x * length, y + step_y * length))
    end = turn + (turn - first) * back / length
    return (*path, (end, x + step_x * (length - back), y + step_y * (length - back))), direction, turn


def _lane(rng: np.random.Generator, step_x: float, step_y: float, length: float) -> tuple[float, float]:
    """Where a straight run of this length begins, so that it stays on the canvas."""
    low, high = 0.14, 0.86
    slack = high - low - length
    begin = low + float(rng.uniform(0.0, slack))
    across = float(rng.uniform(0.2, 0.8))
    if step_x:
        return (begin if step_x > 0 else begin + length), across
    return across, (begin if step_y > 0 else begin + length)


def idle_path(rng: np.random.Generator, intervals: tuple[Interval, ...], others: list[Track]) -> tuple:
    """Standing, drifting or bobbing, in the freest of a few random places."""
    places = rng.uniform(0.15, 0.85, (6, 2))
    taken = np.array([track.path[0][1:] for track in others]).reshape(-1, 2)
    if len(taken):
        distance = np.linalg.norm(places[:, None] - taken[None], axis=-1).min(axis=1)
        x, y = places[int(distance.argmax())]
    else:
        x, y = places[0]
    first, last = intervals[0][0], intervals[-1][1]
    kind = rng.random()
    if kind < 0.4:
        return ((first, float(x), float(y)),)
    if kind < 0.7:
        drift = rng.uniform(-0.12, 0.12, 2)
        return (
            (first, float(x), float(y)),
            (last, float(np.clip(x + drift[0], 0.1, 0.9)), float(np.clip(y + drift[1], 0.1, 0.9))),
        )
    times = np.arange(first, last, 1.0)
    bob = rng.uniform(0.02, 0.06) * np.sin(times * rng.uniform(0.8, 2.0) + rng.uniform(0, 6))
    if rng.random() < 0.5:
        return tuple((float(t), float(x + b), float(y)) for t, b in zip(times, bob, strict=True))
    return tuple((float(t), float(x), float(y + b)) for t, b in zip(times, bob, strict=True))


def _captions(rng: np.random.Generator, start: float, end: float, num_objects: int) -> list[Track]:
    """Words in one band and numbers in the other, never two of a kind at one time."""
    tracks: list[Track] = []
    bands = [0.12, 0.88]
    if rng.random() < 0.5:
        bands.reverse()
    span = end - start
    for kind, band in zip(("word", "number"), bands, strict=True):
        count = int(rng.integers(1, 4)) if kind == "word" or rng.random() < 0.5 else 0
        intervals = _events(rng, start, end, 2.0, count) if count else ()
        first, last = (FIRST_WORD, FIRST_NUMBER) if kind == "word" else (FIRST_NUMBER, len(SPRITES))
        sprites = rng.choice(np.arange(first, last), len(intervals), replace=False)
        for sprite, interval in zip(sprites, intervals, strict=True):
            shown = interval
            if interval[1] - interval[0] > 0.5 * span:
                shown = (interval[0], interval[0] + 0.5 * span)
            place = (shown[0], float(rng.uniform(0.3, 0.7)), band)
            tracks.append(Track(int(sprite), int(rng.integers(len(COLOUR_NAMES))), 0, 0, (shown,), (place,), num_objects))
    return tracks


def draw_background(rng: np.random.Generator) -> Background:
    kind = str(rng.choice(BACKGROUNDS))
    first = _colour(rng, 150)
    second = first if kind in ("plain", "noisy") else _colour(rng, 190)
    return Background(
        kind,
        first,
        second,
        float(rng.uniform(0, 2 * np.pi)),
        int(rng.integers(1 << 16)),
        (float(rng.uniform(-0.4, 0.4)), float(rng.uniform(-0.4, 0.4)), float(rng.uniform(0.35, 0.6))),
        int(rng.integers(1 << 31)),
    )


def _colour(rng: np.random.Generator, brightest: float) -> tuple[float, float, float]:
    red, green, blue = rng.uniform(20, brightest, 3).tolist()
    return red, green, blue
