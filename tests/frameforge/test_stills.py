"""Answers about still images, found again by reading the question and looking at the scene."""

import re
from collections import Counter

import numpy as np

from openkeye.frameforge.catalogue import CAPTION_HALF_HEIGHT, COLOUR_NAMES, SPRITES, sprite_noun
from openkeye.frameforge.stills import STILL_TASKS, make_still, still_questions


def look(scene, text: str) -> str:
    """The answer to a question, by its words."""
    things = {scene.name(track): track.path[0][1:] for track in scene.objects}
    plain = [f"{COLOUR_NAMES[track.colour]} {sprite_noun(track.sprite)}" for track in scene.objects]
    if found := re.search(r"(?:colour is|colour of) the (.*)\?", text):
        (name,) = [name for name in plain if name.endswith(found[1])]
        return name.split()[0].capitalize() + "."
    if found := re.match(r"(?:What|Which object) is (\w+)\?", text):
        (name,) = [name for name in plain if name.startswith(found[1])]
        return "The " + name.split(maxsplit=1)[1] + "."
    if found := re.match(r"Is there an? (.*)\?", text):
        return "Yes." if found[1] in plain else "No."
    if found := re.match(r"Which is (.*), the (.*) or the (.*)\?", text):
        axis, sign = {"to the left": (0, 1), "to the right": (0, -1), "higher up": (1, 1), "lower down": (1, -1)}[found[1]]
        return f"The {min((found[2], found[3]), key=lambda name: sign * things[name][axis])}."
    if found := re.match(r"Is the (.*) on the left or on the right\?", text):
        return "On the left." if things[found[1]][0] < 0.5 else "On the right."
    if found := re.match(r"Is the (.*) up or down\?", text):
        return "Up." if things[found[1]][1] < 0.5 else "Down."
    if "total" in text or text == "Count all objects.":
        return f"{len(plain)}."
    noun = re.match(r"(?:How many|Count the|What is the number of) (.*?)(?: are there)?[?.]$", text)[1]
    if noun.endswith(" objects"):
        return f"{sum(name.startswith(noun.split()[0]) for name in plain)}."
    singular = "cross" if noun == "crosses" else noun.removesuffix("s")
    return f"{sum(name.endswith(' ' + singular) for name in plain)}."


def test_answers_are_true():
    seen = Counter()
    for index in range(150):
        rng = np.random.default_rng([3, index])
        scene = make_still(rng)
        questions = still_questions(scene, rng, 8)
        assert len({question.text for question in questions}) == len(questions) >= 4
        for question in questions:
            seen[question.task] += 1
            if question.task == "reading":
                kind = "number" if "number" in question.text else "word"
                shown = [SPRITES[track.sprite] for track in scene.captions]
                assert question.answer.lower().rstrip(".") in shown
                assert question.answer[0].isdigit() == (kind == "number")
            else:
                assert look(scene, question.text) == question.answer, question
    assert set(seen) == set(STILL_TASKS) and min(seen.values()) > 40


def test_nothing_hides_anything():
    for index in range(200):
        scene = make_still(np.random.default_rng([4, index]))
        for number, track in enumerate(scene.objects):
            x, y = track.path[0][1:]
            assert x - track.half_height > 0 and x + track.half_height < 1.03
            assert y - track.half_height + 0.02 > 0.1 + CAPTION_HALF_HEIGHT
            for other in scene.objects[:number]:
                gap = np.abs(np.subtract(other.path[0][1:], (x, y)))
                assert (gap >= 0.95 * min(0.2, track.half_height + other.half_height)).any()
