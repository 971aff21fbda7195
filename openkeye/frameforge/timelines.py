"""A scene in words: one sentence for everything that happens, in the words of the questions' answers."""

import numpy as np

from openkeye.frameforge.catalogue import FIRST_NUMBER, SPRITES
from openkeye.frameforge.questions import Question, say_spans, seen_spans
from openkeye.frameforge.scene import Interval, Scene, Track

NOTHING = "No objects are visible."


def track_sentence(scene: Scene, track: Track, spans: list[Interval]) -> str:
    """`The red circle is visible from 4.5 to 12.0 seconds.`; a word is shown."""
    when = say_spans(spans)
    when = when[0].lower() + when[1:]
    if track.is_caption:
        kind = "number" if track.sprite >= FIRST_NUMBER else "word"
        return f"The {kind} {SPRITES[track.sprite]} is shown {when}"
    return f"The {scene.name(track)} is visible {when}"


def caption(scene: Scene, frame_times: np.ndarray) -> str:
    """What is visible in some frames and when, in the order of its coming, and which way things move.

    Something that moves is told to where the frames hold all of its way up to its turn.
    """
    events = [(spans[0], number) for number, spans in _spans(scene, frame_times).items()]
    sentences = []
    for _, number in sorted(events):
        track = scene.tracks[number]
        sentences.append(track_sentence(scene, track, _spans(scene, frame_times)[number]))
        last = track.turn_seconds or track.intervals[0][1]
        if track.direction is not None and frame_times[0] <= track.intervals[0][0] and last <= frame_times[-1]:
            sentences.append(_motion_sentence(scene, track))
    return " ".join(sentences) or NOTHING


def timeline(scene: Scene, rng: np.random.Generator, frame_times: np.ndarray) -> str:
    """Everything that the questions about a scene ask for, as text; sentences in random order half of the time."""
    spans = _spans(scene, frame_times)
    numbers = sorted(spans, key=lambda number: spans[number])
    if rng.random() < 0.5:
        numbers = [numbers[place] for place in rng.permutation(len(numbers))]
    sentences = []
    for number in numbers:
        track = scene.tracks[number]
        sentences.append(track_sentence(scene, track, spans[number]))
        if track.direction is not None:
            sentences.append(_motion_sentence(scene, track))
        if track.turn_seconds is not None:
            moment = float(frame_times[np.abs(frame_times - track.turn_seconds).argmin()])
            sentences.append(f"The {scene.name(track)} turns around at {moment:.1f} seconds.")
    return " ".join(sentences)


def is_answered_by_text(question: Question, scene: Scene, frame_times: np.ndarray) -> bool:
    """Whether a timeline decides a question about two things: not where they come, or part, between two of its moments."""
    if question.task not in ("before_after", "co_occurrence"):
        return True
    spans = _spans(scene, frame_times)
    first, second = (spans[number] for number, _ in question.mentions)
    if question.task == "before_after":
        return first[0][0] != second[0][0]
    overlap = any(a[0] < b[1] and b[0] < a[1] for a in first for b in second)
    return overlap == (question.answer == "Yes.")


def _motion_sentence(scene: Scene, track: Track) -> str:
    first = " at first" if track.turn_seconds is not None else ""
    return f"The {scene.name(track)} moves {track.direction}{first}."


def _spans(scene: Scene, frame_times: np.ndarray) -> dict[int, list[Interval]]:
    """When each track is seen in the frames; tracks that no frame shows are left out."""
    seen = {number: seen_spans(track.intervals, frame_times) for number, track in enumerate(scene.tracks)}
    return {number: spans for number, spans in seen.items() if spans}
