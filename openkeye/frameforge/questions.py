"""Questions with answers computed from the scene (the report's four rule-checked tasks, and reading and motion)."""

from dataclasses import dataclass

import numpy as np

from openkeye.frameforge.catalogue import COLOUR_NAMES, FIRST_NUMBER, SHAPES, SPRITES
from openkeye.frameforge.scene import Interval, Scene, Track, overlap_seconds

QUESTIONS_PER_ROUND = 8
TASKS = ("timestamp_localisation", "counting", "before_after", "co_occurrence", "reading", "motion")


@dataclass(frozen=True)
class Question:
    """One question about one scene, its answer in words, and the truth that scoring compares with."""

    task: str
    text: str
    answer: str
    # as the model should say it, from the frames it sees
    intervals: tuple[Interval, ...] = ()
    # true continuous seconds, for questions that ask when something is visible
    moment_seconds: float | None = None
    # true moment, for questions that ask when something turns
    track: int | None = None
    # index in scene.tracks of the one thing that the question is about
    mentions: tuple[tuple[int, str], ...] = ()
    # index in scene.tracks and name of everything that the text names

    @property
    def kind(self) -> str:
        """How the answer is scored: "intervals", "moment" or "words"."""
        if self.intervals:
            return "intervals"
        return "words" if self.moment_seconds is None else "moment"


def make_questions(scene: Scene, rng: np.random.Generator, frame_times: np.ndarray, num_rounds: int = 1) -> list[Question]:
    """QUESTIONS_PER_ROUND questions a round, in random order.

    A round holds two localisations, one question of every other task, and one more of counting, co-occurrence, reading or
    motion.

    Args:
        frame_times: [N] seconds of the frames that the model will see; answers in words speak of these.
    """
    makers = []
    for _ in range(num_rounds):
        makers += [_localisation, _localisation, _counting, _before_after, _co_occurrence, _reading, _motion]
        makers.append((_counting, _reading, _motion, _co_occurrence)[int(rng.integers(4))])
    questions: list[Question] = []
    for maker in makers:
        # Asking the same thing twice teaches nothing; a few tries find another one where there is one.
        for _ in range(4):
            question = maker(scene, rng, frame_times)
            if question.text not in {other.text for other in questions}:
                break
        questions.append(question)
    return [questions[number] for number in rng.permutation(len(questions))]


def make_question(task: str, scene: Scene, rng: np.random.Generator, frame_times: np.ndarray) -> Question:
    """One question of one of TASKS."""
    makers = (_localisation, _counting, _before_after, _co_occurrence, _reading, _motion)
    return makers[TASKS.index(task)](scene, rng, frame_times)


def seen_spans(intervals: tuple[Interval, ...], frame_times: np.ndarray) -> list[Interval]:
    """First and last frame time inside each interval; intervals that no frame falls into are left out."""
    spans = []
    for first, last in intervals:
        inside = frame_times[(frame_times >= first) & (frame_times < last)]
        if len(inside):
            spans.append((float(inside[0]), float(inside[-1])))
    return spans


def say_spans(spans: list[Interval]) -> str:
    """`From 4.5 to 12.0 seconds.`, several joined by `and from`."""
    parts = [f"from {first:.1f} to {last:.1f}" for first, last in spans]
    return f"F{' and '.join(parts)[1:]} seconds."


def _index(scene: Scene, track: Track) -> int:
    return next(number for number, other in enumerate(scene.tracks) if other is track)


def _about(scene: Scene, track: Track) -> tuple[int, tuple[tuple[int, str], ...]]:
    """The last two fields of a question about one named thing."""
    number = _index(scene, track)
    return number, ((number, scene.name(track)),)


def _pick(rng: np.random.Generator, phrasings: tuple[str, ...]) -> str:
    return phrasings[int(rng.integers(len(phrasings)))]


def _localisation(scene: Scene, rng: np.random.Generator, frame_times: np.ndarray) -> Question:
    # Three appearances are for counting; telling all three would only test patience.
    objects = [track for track in scene.objects if len(track.intervals) <= 2]
    track = objects[int(rng.integers(len(objects)))]
    text = _pick(
        rng,
        (
            "When is the {} visible?",
            "When does the {} appear?",
            "At what times can the {} be seen?",
            "Find the {} in the video.",
            "During which seconds is the {} on screen?",
        ),
    ).format(scene.name(track))
    return Question(
        TASKS[0], text, say_spans(seen_spans(track.intervals, frame_times)), track.intervals, None, *_about(scene, track)
    )


def _counting(scene: Scene, rng: np.random.Generator, frame_times: np.ndarray) -> Question:
    kind = rng.random()
    if kind < 0.3:
        text = _pick(
            rng,
            (
                "How many different objects appear in the video?",
                "How many objects are there in total?",
                "Count all objects in the video.",
                "What is the total number of objects?",
            ),
        )
        return Question(TASKS[1], text, f"{len(scene.objects)}.")
    if kind < 0.65 and scene.counted is not None:
        attribute, wanted = scene.counted
        if attribute == "colour":
            noun = f"{COLOUR_NAMES[wanted]} objects"
            number = sum(track.colour == wanted for track in scene.objects)
        else:
            noun = {"cross": "crosses"}.get(SHAPES[wanted], f"{SHAPES[wanted]}s")
            number = sum(track.sprite == wanted for track in scene.objects)
        text = _pick(
            rng, ("How many {} appear?", "How many {} are in the video?", "Count the {}.", "What is the number of {}?")
        )
        return Question(TASKS[1], text.format(noun), f"{number}.")
    track = scene.tracks[scene.roles["repeated"]]
    text = _pick(
        rng,
        (
            "How many times does the {} appear?",
            "How often does the {} show up?",
            "Count the appearances of the {}.",
            "How many separate times is the {} visible?",
        ),
    )
    return Question(TASKS[1], text.format(scene.name(track)), f"{len(track.intervals)}.", (), None, *_about(scene, track))


def _pairs(scene: Scene, rng: np.random.Generator) -> list[tuple[Track, Track]]:
    objects = scene.objects
    pairs = [(a, b) for a in objects for b in objects if a is not b]
    return [pairs[number] for number in rng.permutation(len(pairs))]


def _before_after(scene: Scene, rng: np.random.Generator, frame_times: np.ndarray) -> Question:
    pairs = _pairs(scene, rng)
    apart = [(a, b) for a, b in pairs if abs(a.intervals[0][0] - b.intervals[0][0]) >= 1.0]
    # The pair that is farthest apart stands in where every pair is a tie.
    first, second = apart[0] if apart else max(pairs, key=lambda pair: abs(pair[0].intervals[0][0] - pair[1].intervals[0][0]))
    a, b = scene.name(first), scene.name(second)
    is_before = first.intervals[0][0] < second.intervals[0][0]
    text, answer = (
        (f"Does the {a} appear before the {b}?", "Yes." if is_before else "No."),
        (f"Does the {a} appear after the {b}?", "No." if is_before else "Yes."),
        (f"Which appears first, the {a} or the {b}?", f"The {a if is_before else b}."),
        (f"Which appears later, the {a} or the {b}?", f"The {b if is_before else a}."),
    )[int(rng.integers(4))]
    return Question(TASKS[2], text, answer, mentions=((_index(scene, first), a), (_index(scene, second), b)))


def _co_occurrence(scene: Scene, rng: np.random.Generator, frame_times: np.ndarray) -> Question:
    wanted = bool(rng.random() < 0.5)
    pairs = _pairs(scene, rng)
    margins = [overlap_seconds(a, b) for a, b in pairs]
    fitting = [pair for pair, margin in zip(pairs, margins, strict=True) if (margin >= 1.0 if wanted else margin <= -1.0)]
    # make_scene draws again until both answers exist; the clearest pair stands in where a caller's scene has only one.
    best = fitting[0] if fitting else pairs[int(np.argmax(np.abs(margins)))]
    text = _pick(
        rng,
        (
            "Are the {} and the {} ever visible at the same time?",
            "Do the {} and the {} appear together?",
            "Is there a moment with both the {} and the {}?",
            "Can the {} and the {} be seen at once?",
        ),
    )
    answer = "Yes." if overlap_seconds(*best) > 0 else "No."
    mentions = tuple((_index(scene, track), scene.name(track)) for track in best)
    return Question(TASKS[3], text.format(scene.name(best[0]), scene.name(best[1])), answer, mentions=mentions)


def _reading(scene: Scene, rng: np.random.Generator, frame_times: np.ndarray) -> Question:
    track = scene.captions[int(rng.integers(len(scene.captions)))]
    kind = "number" if track.sprite >= FIRST_NUMBER else "word"
    shown = SPRITES[track.sprite]
    first, last = track.intervals[0]
    if rng.random() < 0.3:
        text = _pick(
            rng,
            (
                "When is the {} {} shown?",
                "When can the {} {} be read?",
                "At what times is the {} {} on screen?",
                "During which seconds does the {} {} appear?",
            ),
        )
        return Question(
            TASKS[4],
            text.format(kind, shown),
            say_spans(seen_spans(track.intervals, frame_times)),
            track.intervals,
            None,
            _index(scene, track),
            ((_index(scene, track), shown),),
        )
    moment = float(rng.uniform(first + 0.75, last - 0.75))
    text = _pick(
        rng,
        (
            "Which {} is on screen at {:.1f} seconds?",
            "Which {} is shown at {:.1f} seconds?",
            "Read the {} at {:.1f} seconds.",
            "What {} can be read at {:.1f} seconds?",
        ),
    )
    return Question(TASKS[4], text.format(kind, moment), f"{shown.capitalize()}.", track=_index(scene, track))


def _motion(scene: Scene, rng: np.random.Generator, frame_times: np.ndarray) -> Question:
    if "turner" in scene.roles:
        track = scene.tracks[scene.roles["turner"]]
        assert track.turn_seconds is not None
        name = scene.name(track)
        if rng.random() < 0.7:
            nearest = float(frame_times[np.abs(frame_times - track.turn_seconds).argmin()])
            text = _pick(
                rng,
                (
                    "When does the {} turn around?",
                    "At what time does the {} change direction?",
                    "When does the {} reverse?",
                    "When does the {} start to move back?",
                ),
            )
            answer = f"At {nearest:.1f} seconds."
            return Question(TASKS[5], text.format(name), answer, (), track.turn_seconds, *_about(scene, track))
        text = _pick(rng, ("Which way does the {} move at first?", "In which direction does the {} start to move?"))
    else:
        track = scene.tracks[scene.roles["mover"]]
        name = scene.name(track)
        text = _pick(
            rng,
            (
                "Which way does the {} move?",
                "In which direction does the {} move?",
                "Where does the {} go?",
                "What is the direction of the {}?",
            ),
        )
    assert track.direction is not None
    answer = f"{track.direction[0].upper()}{track.direction[1:]}."
    return Question(TASKS[5], text.format(name), answer, (), None, *_about(scene, track))
