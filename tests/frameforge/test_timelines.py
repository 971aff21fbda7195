"""Timelines answer the questions: a reader who knows nothing but the text finds every answer."""

import re

import numpy as np

from openkeye.frameforge.catalogue import COLOUR_NAMES, SHAPES
from openkeye.frameforge.needles import make_sparse_scene
from openkeye.frameforge.questions import Question, make_questions
from openkeye.frameforge.scene import Scene, Track, make_scene
from openkeye.frameforge.timelines import NOTHING, caption, is_answered_by_text, timeline


class Reader:
    """What a text says, and answers from it."""

    def __init__(self, text: str) -> None:
        self.times: dict[str, list[tuple[float, float]]] = {}
        self.words: dict[str, tuple[str, tuple[float, float]]] = {}
        self.moves: dict[str, str] = {}
        self.turns: dict[str, str] = {}
        for sentence in re.findall(r"The .*?[a-z]\.(?: |$)", text):
            spans = [(float(a), float(b)) for a, b in re.findall(r"from ([\d.]+) to ([\d.]+)", sentence)]
            if found := re.match(r"The (word|number) (\w+) is shown", sentence):
                self.words[found[2]] = (found[1], spans[0])
            elif found := re.match(r"The (.*) is visible", sentence):
                self.times[found[1]] = spans
            elif found := re.match(r"The (.*) moves (.*?)( at first)?\.", sentence):
                self.moves[found[1]] = found[2]
            elif found := re.match(r"The (.*) turns around at ([\d.]+) seconds", sentence):
                self.turns[found[1]] = found[2]
            else:
                raise AssertionError(sentence)

    def answer(self, task: str, text: str) -> str:
        names = sorted((name for name in self.times if f"the {name}" in text), key=text.index)
        first = {name: spans[0][0] for name, spans in self.times.items()}
        if task == "timestamp_localisation":
            return self.say(self.times[names[0]])
        if task == "counting":
            if names:
                return f"{len(self.times[names[0]])}."
            before, noun = re.sub(r" (appear|are in the video)$", "", text.rstrip("?.")).split()[-2:]
            if before in COLOUR_NAMES:
                return f"{sum(before in name.split() for name in self.times)}."
            singular = "cross" if noun == "crosses" else noun.removesuffix("s")
            if singular in SHAPES:
                return f"{sum(name.endswith(singular) for name in self.times)}."
            return f"{len(self.times)}."
        if task == "before_after":
            a, b = names
            if text.startswith("Does"):
                return "Yes." if (first[a] < first[b]) == ("before" in text) else "No."
            return f"The {min(names, key=first.get) if 'first' in text else max(names, key=first.get)}."
        if task == "co_occurrence":
            a, b = (self.times[name] for name in names)
            return "Yes." if any(x[0] < y[1] and y[0] < x[1] for x in a for y in b) else "No."
        if task == "reading":
            if found := re.search(r" at ([\d.]+) seconds", text):
                kind = "number" if "number" in text else "word"
                moment = float(found[1])
                (word,) = [w for w, (k, (a, b)) in self.words.items() if k == kind and a - 0.06 <= moment <= b + 0.06]
                return f"{word.capitalize()}."
            word = re.search(r"(?:word|number) (\w+)", text)[1]
            return self.say([self.words[word][1]])
        if names and names[0] in self.turns and ("turn" in text or "reverse" in text or "change" in text or "back" in text):
            return f"At {self.turns[names[0]]} seconds."
        return self.moves[names[0]].capitalize() + "."

    def say(self, spans: list[tuple[float, float]]) -> str:
        return "From " + " and from ".join(f"{a:.1f} to {b:.1f}" for a, b in spans) + " seconds."


def test_the_text_alone_answers():
    num_asked = 0
    for index in range(60):
        rng = np.random.default_rng([6, index])
        start, seconds = 50.0 * index, 40.0 if index % 2 else 400.0
        maker = make_scene if index % 4 < 3 else make_sparse_scene
        seconds = max(seconds, 60.0) if maker is make_sparse_scene else seconds
        scene = maker(rng, start, start + seconds)
        moments = start + 0.1 * np.arange(int(10 * seconds))
        reader = Reader(timeline(scene, rng, moments))
        for question in make_questions(scene, rng, moments):
            if is_answered_by_text(question, scene, moments):
                assert reader.answer(question.task, question.text) == question.answer, (question, reader.times)
                num_asked += 1
    assert num_asked > 460


def test_a_caption_tells_what_its_frames_show_and_no_more():
    scene = make_scene(np.random.default_rng(8), 0.0, 60.0)
    told = set()
    for first in range(0, 60, 15):
        times = first + 0.5 * np.arange(30)
        text = caption(scene, times)
        seconds = [float(number) for number in re.findall(r"\d+\.\d", text)]
        assert text == NOTHING or (min(seconds) >= first and max(seconds) <= first + 14.5)
        for track in scene.objects:
            is_shown = any(((times >= a) & (times < b)).any() for a, b in track.intervals)
            assert (f"The {scene.name(track)} is visible from" in text) == is_shown
        told |= set(re.findall(r"The (.*?) (?:is|moves)", text))
    assert {scene.name(track) for track in scene.objects} <= told
    assert caption(scene, 100.0 + 0.5 * np.arange(30)) == NOTHING


def test_what_falls_between_two_moments_is_not_asked():
    moments = 0.5 * np.arange(40)
    background = make_scene(np.random.default_rng(0), 0.0, 20.0).background

    def scene(*events: tuple[float, float]) -> Scene:
        tracks = [Track(n, n, 0, 0, (event,), ((0.0, 0.5, 0.5),), n) for n, event in enumerate(events)]
        return Scene(0.0, 20.0, tuple(tracks), background)

    mentions = ((0, "red circle"), (1, "orange square"))
    order = Question("before_after", "Does the red circle appear before the orange square?", "Yes.", mentions=mentions)
    # 2.1 and 2.4 s are both seen first at 2.5 s.
    assert not is_answered_by_text(order, scene((2.1, 5.0), (2.4, 6.0)), moments)
    assert is_answered_by_text(order, scene((2.1, 5.0), (2.6, 6.0)), moments)
    meeting = Question("co_occurrence", "Do the red circle and the orange square appear together?", "Yes.", mentions=mentions)
    assert not is_answered_by_text(meeting, scene((2.1, 5.2), (5.1, 6.0)), moments)
    assert is_answered_by_text(meeting, scene((2.1, 5.2), (4.1, 6.0)), moments)
