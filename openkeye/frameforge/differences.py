"""Pairs of drawn pictures that differ by a known set of edits (report, 5.2), or by nothing but disturbances that do not count.

Letters: T tracks. Places are shares of the picture; boxes are thousandths of its sides, of the thing without its dark rim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, floor

import numpy as np

from openkeye.common.checks import InputError
from openkeye.frameforge.catalogue import COLOUR_NAMES, FIRST_NUMBER, FIRST_WORD, SHAPES, SPRITES, TEXTURES, sprite_noun
from openkeye.frameforge.render import OUTLINE, RenderJob, render, scene_job
from openkeye.frameforge.scene import Background, Scene, Track, draw_background
from openkeye.frameforge.stills import SHOWN

EDITS = ("add", "remove", "move", "recolour", "resize", "retext")
DISTURBANCES = ("colour_jitter", "layout_change", "slot_shuffle", "semantic_no_op", "viewpoint")
REPLACES_PLACES = ("layout_change", "slot_shuffle", "viewpoint")
# beside these a moved thing could not be told from an unmoved one
COLUMNS, ROWS = 4, 3
SPREAD = 0.015
# around a slot's middle, and less than what a move moves by
SIZE_SHARE = 0.75
# of a thing's usual size, so that neighbours do not meet
BOX_SIDE = 224
# pixels of the drawing that boxes are measured in

Box = tuple[int, int, int, int]
# x1, y1, x2, y2


@dataclass(frozen=True)
class View:
    """From where a picture is seen: everything is scaled around its middle, then shifted."""

    scale: float = 1.0
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True)
class Edit:
    """One thing that differs."""

    kind: str
    # of EDITS
    before: int | None
    # the thing in the first scene's tracks; None where it was added
    after: int | None
    # and in the second's; None where it was removed
    description: str
    # `move the red circle`, for logs
    box: Box
    # in the second picture; of what was removed, in the first


@dataclass(frozen=True)
class PicturePair:
    """Two scenes and what differs between them."""

    scenes: tuple[Scene, Scene]
    views: tuple[View, View]
    gains: tuple[tuple[float, float, float], tuple[float, float, float]]
    # by which red, green and blue are multiplied
    edits: tuple[Edit, ...]
    # empty for a negative
    disturbances: tuple[str, ...]
    # of DISTURBANCES

    @property
    def boxes(self) -> list[Box]:
        """Of all edits, from left to right."""
        return sorted(edit.box for edit in self.edits)

    def draw(self, side: int, device: str = "cpu") -> tuple[np.ndarray, np.ndarray]:
        """Both pictures: [side, side, 3] uint8."""
        drawn = []
        for scene, view, gain in zip(self.scenes, self.views, self.gains, strict=True):
            pixels = render(_viewed(scene_job(scene, np.zeros(1)), view), side, device)[0].cpu().numpy()
            drawn.append((pixels * np.asarray(gain)).clip(0, 255).round().astype(np.uint8))
        return drawn[0], drawn[1]


@dataclass(frozen=True)
class PairSettings:
    """Bounds of the generator."""

    min_things: int = 4
    max_things: int = 8
    max_edits: int = 3
    negative_share: float = 0.2
    # pairs without an edit
    max_disturbances: int = 2

    def __post_init__(self) -> None:
        if not 2 <= self.min_things <= self.max_things <= COLUMNS * ROWS - 3:
            raise InputError(f"{self.min_things} to {self.max_things} things; give 2 to {COLUMNS * ROWS - 3}, ascending")
        if not 1 <= self.max_edits < self.min_things or not 0 <= self.max_disturbances <= len(DISTURBANCES):
            raise InputError(
                f"max_edits {self.max_edits}, max_disturbances {self.max_disturbances}; give 1 to fewer than the things, "
                f"and 0 to {len(DISTURBANCES)}"
            )
        if not 0.0 <= self.negative_share <= 1.0:
            raise InputError(f"negative_share is {self.negative_share:g}; give 0 to 1")


def make_pair(rng: np.random.Generator, settings: PairSettings = PairSettings()) -> PicturePair:
    """Draw things in free slots, edit some of them, then disturb the second picture in ways that do not count."""
    slots = rng.permutation(COLUMNS * ROWS).tolist()
    num_things = int(rng.integers(settings.min_things, settings.max_things + 1))
    things = _things(rng, slots[:num_things])
    free = slots[num_things:]
    is_negative = rng.random() < settings.negative_share
    # A pair without edits is disturbed always, so that "not the same pixels" is never the answer.
    least = 1 if is_negative and settings.max_disturbances else 0
    names = rng.permutation(DISTURBANCES).tolist()[: int(rng.integers(least, settings.max_disturbances + 1))]
    background = draw_background(rng)
    first = Scene(0.0, 1.0, tuple(things), background)
    changed: list[Track | None] = list(things)
    added: list[Track] = []
    kinds = [kind for kind in EDITS if kind != "move" or not set(names) & set(REPLACES_PLACES)]
    planned: list[tuple[str, int | None]] = []
    untouched = rng.permutation(num_things).tolist()
    for _ in range(0 if is_negative else int(rng.integers(1, settings.max_edits + 1))):
        kind = kinds[int(rng.integers(len(kinds)))]
        if kind == "add":
            added.append(_add(rng, things + added, free.pop()))
            planned.append((kind, None))
            continue
        place = next((n for n in untouched if kind != "retext" or things[n].is_caption), untouched[0])
        kind = "recolour" if kind == "retext" and not things[place].is_caption else kind
        kind = "recolour" if kind == "resize" and things[place].is_caption else kind
        untouched.remove(place)
        changed[place] = _edited(rng, kind, things[place], free, [*things, *(t for t in changed if t is not None), *added])
        planned.append((kind, place))
    kept = [track for track in changed if track is not None]
    gains, views = ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0)), (View(), View())
    places = [track.path[0][1:] for track in (*kept, *added)]
    second = Scene(0.0, 1.0, (*kept, *added), background)
    if "colour_jitter" in names:
        gains = (gains[0], tuple((rng.uniform(0.86, 1.0) * rng.uniform(0.96, 1.0, 3)).tolist()))
    if "viewpoint" in names:
        views = (View(), _other_view(rng))
    if "semantic_no_op" in names:
        second = replace(second, background=draw_background(rng))
    if "layout_change" in names:
        places = _laid_out(rng, places)
    if "slot_shuffle" in names:
        places = [places[n] for n in rng.permutation(len(places))]
    moved = tuple(replace(t, path=((0.0, x, y),)) for t, (x, y) in zip(second.tracks, places, strict=True))
    second = replace(second, tracks=moved)
    edits = _described((first, second), views, changed, planned)
    return PicturePair((first, second), views, gains, edits, tuple(sorted(names)))


def thing_boxes(tracks: Sequence[Track], view: View = View()) -> list[Box]:
    """Box of each thing in thousandths of a square picture, measured in a drawing of it alone; outwards."""
    times = np.arange(len(tracks), dtype=float)
    alone = [replace(t, intervals=((n, n + 1.0),)) for n, t in zip(times.tolist(), tracks, strict=True)]
    # (the dark rim has the background's colour here, and so belongs to no box)
    dark = (OUTLINE, OUTLINE, OUTLINE)
    still = Scene(0.0, len(alone), tuple(alone), Background("plain", dark, dark, 0.0))
    pixels_THW = render(_viewed(scene_job(still, times), view), BOX_SIDE, "cpu").numpy().astype(int)
    boxes = []
    for picture in pixels_THW:
        is_thing = np.abs(picture - round(OUTLINE)).max(-1) > 64
        rows, columns = np.flatnonzero(is_thing.any(1)), np.flatnonzero(is_thing.any(0))
        low = [floor(1000 * edge / BOX_SIDE) for edge in (columns[0], rows[0])]
        high = [ceil(1000 * (edge + 1) / BOX_SIDE) for edge in (columns[-1], rows[-1])]
        boxes.append((low[0], low[1], high[0], high[1]))
    return boxes


def thing_name(track: Track) -> str:
    """`large striped red circle`, `blue word apple`."""
    colour = COLOUR_NAMES[track.colour]
    if track.is_caption:
        return f"{colour} {'number' if track.sprite >= FIRST_NUMBER else 'word'} {SPRITES[track.sprite]}"
    texture = "" if not track.texture else f"{TEXTURES[track.texture]} "
    return f"{('small', 'large')[track.size]} {texture}{colour} {sprite_noun(track.sprite)}"


def _viewed(job: RenderJob, view: View) -> RenderJob:
    rows = job.instances.copy()
    rows[:, 2] = 0.5 + (rows[:, 2] - 0.5) * view.scale + view.x
    rows[:, 3] = 0.5 + (rows[:, 3] - 0.5) * view.scale + view.y
    rows[:, 4] *= view.scale * SIZE_SHARE
    return replace(job, instances=rows)


def _other_view(rng: np.random.Generator) -> View:
    """Seen from further away, and aside as far as everything stays in the picture."""
    scale = float(rng.uniform(0.7, 0.92))
    slack = (1.0 - scale) / 2
    return View(scale, float(rng.uniform(-slack, slack)), float(rng.uniform(-slack, slack)))


def _slot_place(rng: np.random.Generator, slot: int) -> tuple[float, float]:
    x, y = (slot % COLUMNS + 0.5) / COLUMNS, (slot // COLUMNS + 0.5) / ROWS
    return 0.06 + 0.88 * x + float(rng.uniform(-SPREAD, SPREAD)), y + float(rng.uniform(-SPREAD, SPREAD))


def _thing(rng: np.random.Generator, slot: int, taken: set[tuple[int, int]]) -> Track:
    """A shape, a digit or now and then a number, of a sprite and colour that nothing else has."""
    while True:
        kind = rng.random()
        if kind < 0.7:
            sprite = int(rng.integers(len(SHAPES) if rng.random() < 0.6 else FIRST_WORD))
        else:
            sprite = int(rng.integers(FIRST_NUMBER, len(SPRITES)))
        colour = int(rng.integers(len(COLOUR_NAMES)))
        if (sprite, colour) not in taken:
            break
    is_shape = sprite < len(SHAPES)
    texture = int(rng.integers(len(TEXTURES))) if is_shape and rng.random() < 0.3 else 0
    place = (0.0, *_slot_place(rng, slot))
    return Track(sprite, colour, texture, int(rng.integers(2)) if sprite < FIRST_WORD else 0, SHOWN, (place,), 0)


def _things(rng: np.random.Generator, slots: list[int]) -> list[Track]:
    tracks: list[Track] = []
    for slot in slots:
        tracks.append(_thing(rng, slot, {(track.sprite, track.colour) for track in tracks}))
    return tracks


def _add(rng: np.random.Generator, tracks: list[Track], slot: int) -> Track:
    return _thing(rng, slot, {(track.sprite, track.colour) for track in tracks})


def _edited(rng: np.random.Generator, kind: str, track: Track, free: list[int], tracks: list[Track]) -> Track | None:
    """The thing after the edit; None where it is gone."""
    if kind == "remove":
        return None
    if kind == "move":
        return replace(track, path=((0.0, *_slot_place(rng, free.pop())),))
    if kind == "resize":
        return replace(track, size=1 - track.size)
    taken = {(other.sprite, other.colour) for other in tracks}
    if kind == "recolour":
        colours = [colour for colour in range(len(COLOUR_NAMES)) if (track.sprite, colour) not in taken]
        return replace(track, colour=colours[int(rng.integers(len(colours)))])
    texts = [sprite for sprite in range(FIRST_NUMBER, len(SPRITES)) if (sprite, track.colour) not in taken]
    return replace(track, sprite=texts[int(rng.integers(len(texts)))])


def _laid_out(rng: np.random.Generator, places: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same arrangement, mirrored from left to right, from top to bottom, or both."""
    way = int(rng.integers(1, 4))
    return [(1 - x if way & 1 else x, 1 - y if way & 2 else y) for x, y in places]


def _described(
    scenes: tuple[Scene, Scene],
    views: tuple[View, View],
    changed: list[Track | None],
    planned: list[tuple[str, int | None]],
) -> tuple[Edit, ...]:
    kept = [number for number, track in enumerate(changed) if track is not None]
    found: list[tuple[str, int | None, int | None]] = []
    next_added = len(kept)
    for kind, before in planned:
        if before is None:
            found.append((kind, None, next_added))
            next_added += 1
        else:
            found.append((kind, before, None if changed[before] is None else kept.index(before)))
    edits = []
    for kind, before, after in found:
        named = scenes[1].tracks[after] if before is None and after is not None else scenes[0].tracks[before or 0]
        # Of what is gone, the box is where it was.
        side, number = (0, before) if after is None else (1, after)
        assert number is not None
        (box,) = thing_boxes([scenes[side].tracks[number]], views[side])
        edits.append(Edit(kind, before, after, f"{kind} the {thing_name(named)}", box))
    return tuple(edits)
