"""Still images with questions: colours, shapes, words, numbers of things, and where they are."""

from collections import Counter
from typing import TypeVar

import numpy as np

from openkeye.frameforge.catalogue import COLOUR_NAMES, FIRST_NUMBER, FIRST_WORD, SHAPES, SPRITES, sprite_noun
from openkeye.frameforge.questions import Question
from openkeye.frameforge.scene import Scene, Track, draw_background, draw_looks

Choice = TypeVar("Choice")

SHOWN = ((0.0, 1.0),)
APART = 0.2
# share of the picture by which two things must differ in place to be asked about
STILL_TASKS = ("colour", "shape", "counting", "presence", "place", "reading")


def make_still(rng: np.random.Generator) -> Scene:
    """One to six objects, no two of one name and no two in one place, and up to one word and one number."""
    _, looks = draw_looks(rng, 6, min_objects=1)
    # Three columns and two rows between the bands of captions: nothing hides anything.
    cells = rng.permutation(6)[: len(looks)].tolist()
    tracks = []
    for cell, (sprite, colour, texture, size) in zip(cells, looks, strict=True):
        x, y = 0.2 + 0.3 * (cell % 3), 0.36 + 0.28 * (cell // 3)
        spot = ((0.0, x + float(rng.uniform(-0.04, 0.04)), y + float(rng.uniform(-0.03, 0.03))),)
        tracks.append(Track(sprite, colour, texture, size, SHOWN, spot, 0))
    for low, high, band in ((FIRST_WORD, FIRST_NUMBER, 0.1), (FIRST_NUMBER, len(SPRITES), 0.9)):
        if rng.random() < 0.6:
            place = ((0.0, float(rng.uniform(0.3, 0.7)), band),)
            tracks.append(
                Track(int(rng.integers(low, high)), int(rng.integers(len(COLOUR_NAMES))), 0, 0, SHOWN, place, len(looks))
            )
    return Scene(0.0, 1.0, tuple(tracks), draw_background(rng))


def still_questions(scene: Scene, rng: np.random.Generator, most: int) -> list[Question]:
    """Up to `most` different questions, in random order; each kind only where the picture has one true answer."""
    makers = (_colour, _shape, _counting, _presence, _place, _reading)
    questions: dict[str, Question] = {}
    for _ in range(4 * most):
        if len(questions) == most:
            break
        question = makers[int(rng.integers(len(makers)))](scene, rng)
        if question is not None:
            questions.setdefault(question.text, question)
    return list(questions.values())


def _any(rng: np.random.Generator, choices: list[Choice]) -> Choice:
    return choices[int(rng.integers(len(choices)))]


def _colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    counts = Counter(track.sprite for track in scene.objects)
    alone = [track for track in scene.objects if counts[track.sprite] == 1]
    if not alone:
        return None
    track = _any(rng, alone)
    text = _any(rng, ["Which colour is the {}?", "What is the colour of the {}?"]).format(sprite_noun(track.sprite))
    return Question("colour", text, f"{COLOUR_NAMES[track.colour].capitalize()}.")


def _shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    counts = Counter(track.colour for track in scene.objects)
    alone = [track for track in scene.objects if counts[track.colour] == 1]
    if not alone:
        return None
    track = _any(rng, alone)
    text = _any(rng, ["What is {}?", "Which object is {}?"]).format(COLOUR_NAMES[track.colour])
    return Question("shape", text, f"The {sprite_noun(track.sprite)}.")


def _counting(scene: Scene, rng: np.random.Generator) -> Question:
    kind = rng.random()
    if kind < 0.4:
        text = _any(rng, ["How many objects are there in total?", "Count all objects.", "What is the total number of objects?"])
        return Question("counting", text, f"{len(scene.objects)}.")
    # Half of the time something that is there, so that the answer is not mostly zero.
    if kind < 0.7:
        colour = _any(rng, scene.objects).colour if rng.random() < 0.6 else int(rng.integers(len(COLOUR_NAMES)))
        noun, number = f"{COLOUR_NAMES[colour]} objects", sum(track.colour == colour for track in scene.objects)
    else:
        shapes = [track.sprite for track in scene.objects if track.sprite < len(SHAPES)]
        sprite = _any(rng, shapes) if shapes and rng.random() < 0.6 else int(rng.integers(len(SHAPES)))
        noun = "crosses" if SHAPES[sprite] == "cross" else f"{SHAPES[sprite]}s"
        number = sum(track.sprite == sprite for track in scene.objects)
    text = _any(rng, ["How many {} are there?", "Count the {}.", "What is the number of {}?"]).format(noun)
    return Question("counting", text, f"{number}.")


def _presence(scene: Scene, rng: np.random.Generator) -> Question:
    there = {(track.colour, track.sprite) for track in scene.objects}
    colour, sprite = _any(rng, sorted(there))
    if rng.random() < 0.5:
        # Nearly right: the same shape in another colour.
        missing = [other for other in range(len(COLOUR_NAMES)) if (other, sprite) not in there]
        colour = _any(rng, missing)
    name = f"{COLOUR_NAMES[colour]} {sprite_noun(sprite)}"
    article = "an" if name[0] in "aeiou" else "a"
    return Question("presence", f"Is there {article} {name}?", "Yes." if (colour, sprite) in there else "No.")


def _place(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Left or right, above or below: of two objects, or of one and the picture's middle."""
    axis = int(rng.integers(2))
    low, high = (("left", "right"), ("up", "down"))[axis]
    pairs = [(a, b) for a in scene.objects for b in scene.objects if b.path[0][1 + axis] - a.path[0][1 + axis] >= APART]
    if pairs and rng.random() < 0.7:
        first, second = (scene.name(track) for track in _any(rng, pairs))
        names = (first, second) if rng.random() < 0.5 else (second, first)
        side = int(rng.integers(2))
        phrase = (("to the left", "to the right"), ("higher up", "lower down"))[axis][side]
        return Question("place", f"Which is {phrase}, the {names[0]} or the {names[1]}?", f"The {(first, second)[side]}.")
    aside = [track for track in scene.objects if abs(track.path[0][1 + axis] - 0.5) >= APART / 2]
    if not aside:
        return None
    track = _any(rng, aside)
    text = (
        f"Is the {scene.name(track)} on the left or on the right?" if axis == 0 else f"Is the {scene.name(track)} up or down?"
    )
    where = low if track.path[0][1 + axis] < 0.5 else high
    return Question("place", text, f"On the {where}." if axis == 0 else f"{where.capitalize()}.")


def _reading(scene: Scene, rng: np.random.Generator) -> Question | None:
    if not scene.captions:
        return None
    track = _any(rng, scene.captions)
    kind = "number" if track.sprite >= FIRST_NUMBER else "word"
    text = _any(rng, ["What {} can be read?", "Which {} is shown?", "Read the {}.", "What does the {} say?"]).format(kind)
    return Question("reading", text, f"{SPRITES[track.sprite].capitalize()}.")
