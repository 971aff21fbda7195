"""Recipe `clue-choice`: multiple choice whose answer verifies candidate segments and names its clues (report, 5.1).

An answer reads, and `read_choice` understands:

    <think>
    The question needs ...
    [[00:05, 00:08]]: ... This fits option B.
    </think>
    B
    [[00:05, 00:08]]
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor
from typing import Any

import numpy as np

from openkeye.common.checks import InputError
from openkeye.data.makers.events import AnnotatedVideos, Happening, VideoEvents, sentence_key
from openkeye.data.makers.made_sample import MadeSample, assistant, job_rng, pick, text_part, user, video_part
from openkeye.inputs.intervals import Interval, seconds_of

NUM_STRANGERS = 64
# other videos whose sentences are wrong options
LETTERS = "ABCDEFGH"
CLUES = re.compile(r"\[\s*(\[[^\[\]]*\](?:\s*,\s*\[[^\[\]]*\])*)\s*\]")
CLUE = re.compile(r"\[\s*((?:\d+:)?\d+:\d+(?:\.\d+)?)\s*,\s*((?:\d+:)?\d+:\d+(?:\.\d+)?)\s*\]")
LETTER = re.compile(r"(?<![A-Za-z])\(?([A-H])\)?(?![A-Za-z])")

WHAT_PROMPTS = (
    "Which of these happens in the video?",
    "What can be seen in this video?",
    "One of these events takes place in the video. Which?",
)
NEXT_PROMPTS = (
    'What happens next after this: "{}"',
    'Which event follows this one: "{}"',
    'What comes right after "{}"',
)
COUNT_PROMPTS = (
    'How many times does this happen: "{}"',
    'How often is this seen: "{}"',
    'Count how many separate times this takes place: "{}"',
)
FORMAT = "Answer with the letter, then the clue intervals as [[mm:ss, mm:ss], ...]."


@dataclass(frozen=True)
class Choice:
    """What an answer chose, and on which grounds."""

    letter: str
    intervals: tuple[Interval, ...]
    # seconds


def say_clock(seconds: int) -> str:
    """`mm:ss`; minutes go on past 59."""
    return f"{seconds // 60:02d}:{seconds % 60:02d}"


def say_clues(intervals: Sequence[Interval]) -> str:
    """`[[00:05, 00:08], ...]`: whole seconds, outwards."""
    return f"[{', '.join(f'[{say_clock(floor(start))}, {say_clock(ceil(end))}]' for start, end in intervals)}]"


def read_choice(text: str) -> Choice | None:
    """The letter and the clue intervals that stand behind the reasoning; None where the answer is not of the form.

    The last list counts, and the last letter before it. An interval that ends before it begins makes the answer invalid.
    """
    said = text.rpartition("</think>")[2]
    lists = list(CLUES.finditer(said))
    # (reasoning that was never closed is no answer)
    if not lists or "<think>" in said:
        return None
    letters = LETTER.findall(said[: lists[-1].start()])
    inner = lists[-1][1]
    clues = CLUE.findall(inner)
    if not letters or len(clues) != inner.count("["):
        return None
    intervals = tuple((seconds_of(start), seconds_of(end)) for start, end in clues)
    return None if any(end < start for start, end in intervals) else Choice(letters[-1], intervals)


@dataclass(frozen=True)
class Question:
    """A question before its options have letters."""

    kind: str
    text: str
    right: str
    wrong: tuple[str, ...]
    clues: tuple[Interval, ...]
    candidates: tuple[tuple[Interval, str], ...]
    # segments that the reasoning looks at, in order, each with what it shows
    verdict: str
    # what follows from them


def _segments(happenings: Sequence[Happening]) -> tuple[tuple[Interval, str], ...]:
    return tuple(sorted((window, happening.text) for happening in happenings for window in happening.windows))


def ask_what(rng: np.random.Generator, events: VideoEvents, foreign: Sequence[str], num_wrong: int) -> Question | None:
    """One sentence of this video among sentences of others."""
    if len(foreign) < num_wrong or not events.happenings:
        return None
    right = pick(rng, events.happenings)
    wrong = tuple(foreign[number] for number in rng.permutation(len(foreign))[:num_wrong])
    looked_at = [right, *(happening for happening in _some(rng, events.happenings, 3) if happening is not right)]
    verdict = "No segment shows any of the other options."
    return Question("what", pick(rng, WHAT_PROMPTS), right.text, wrong, right.windows, _segments(looked_at), verdict)


def ask_next(rng: np.random.Generator, events: VideoEvents, foreign: Sequence[str], num_wrong: int) -> Question | None:
    """The event after a given one; the video's own other events mislead. Only events that happen once have one successor."""
    single = [happening for happening in events.happenings if len(happening.windows) == 1]
    pairs = [
        (first, second)
        for first, second in pairwise(single)
        if first.windows[0][1] <= second.windows[0][0]
        and not _begins_between(events, first.windows[0][1], second.windows[0][0], second)
    ]
    if not pairs:
        return None
    first, second = pick(rng, pairs)
    own = [happening.text for happening in events.happenings if happening not in (first, second)]
    wrong = [*(own[number] for number in rng.permutation(len(own))), *foreign][:num_wrong]
    if len(wrong) < num_wrong:
        return None
    clues = (*first.windows, *second.windows)
    looked_at = [first, second, *(happening for happening in events.happenings if happening.text in wrong)]
    verdict = "The first segment behind the event in question is the answer."
    return Question(
        "next", pick(rng, NEXT_PROMPTS).format(first.text), second.text, tuple(wrong), clues, _segments(looked_at), verdict
    )


def _begins_between(events: VideoEvents, start: float, end: float, successor: Happening) -> bool:
    """Whether anything else begins in the gap, or together with the successor."""
    others = [happening for happening in events.happenings if happening is not successor]
    return any(start <= window[0] <= end for happening in others for window in happening.windows)


def ask_count(rng: np.random.Generator, events: VideoEvents, foreign: Sequence[str], num_wrong: int) -> Question | None:
    """How often one sentence comes true; only where one does several times, else the answer were always 1."""
    repeated = [happening for happening in events.happenings if len(happening.windows) > 1]
    if not repeated:
        return None
    counted = pick(rng, repeated)
    number = len(counted.windows)
    lowest = max(1, number - int(rng.integers(num_wrong + 1)))
    wrong = tuple(str(other) for other in range(lowest, lowest + num_wrong + 1) if other != number)
    verdict = f"That makes {number}."
    return Question(
        "count",
        pick(rng, COUNT_PROMPTS).format(counted.text),
        str(number),
        wrong,
        counted.windows,
        _segments([counted]),
        verdict,
    )


def _some(rng: np.random.Generator, happenings: Sequence[Happening], count: int) -> list[Happening]:
    return [happenings[number] for number in rng.permutation(len(happenings))[:count]]


KINDS = {"what": ask_what, "next": ask_next, "count": ask_count}


@dataclass(frozen=True)
class ClueChoice:
    """One question of every kind that a video's events allow."""

    annotated: AnnotatedVideos
    seed: int = 0
    num_options: int = 4

    name = "clue-choice"

    def __post_init__(self) -> None:
        if not 2 <= self.num_options <= len(LETTERS):
            raise InputError(f"{self.num_options} options; give 2 to {len(LETTERS)}")

    @property
    def settings(self) -> Mapping[str, Any]:
        """See `Recipe.settings`."""
        return {"seed": self.seed, "num_options": self.num_options}

    def jobs(self) -> Sequence[str]:
        """One for each line of annotations."""
        return list(self.annotated.lines)

    def make(self, job: str) -> list[MadeSample]:
        """See `Recipe.make`."""
        path, events = self.annotated.read(job)
        rng = job_rng(self.seed, job)
        own = {sentence_key(event.text) for event in events.events}
        strangers = self.annotated.others(job, rng, NUM_STRANGERS)
        others = {sentence_key(event.text): event.text for stranger in strangers for event in stranger.events}
        foreign = [text for key, text in others.items() if key not in own]
        foreign = [foreign[number] for number in rng.permutation(len(foreign))]
        samples = []
        for ask in KINDS.values():
            question = ask(rng, events, foreign, self.num_options - 1)
            if question is not None:
                samples.append(self._sample(rng, question, video_part(path)))
        return samples

    def _sample(self, rng: np.random.Generator, question: Question, video: dict[str, Any]) -> MadeSample:
        options = [question.right, *question.wrong]
        order = sorted(range(len(options)), key=lambda number: int(options[number])) if question.kind == "count" else None
        options = [options[number] for number in (order or rng.permutation(len(options)))]
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
        letter = LETTERS[options.index(question.right)]
        answer = f"<think>\n{_reasoning(question, options)}\n</think>\n{letter}\n{say_clues(question.clues)}"
        truth = {
            "letter": letter,
            "options": options,
            "intervals": [list(window) for window in question.clues],
        }
        text = f"{question.text}\n{listed}\n{FORMAT}"
        return MadeSample([user(video, text_part(text)), assistant(answer)], f"clue_choice_{question.kind}", truth)


def _reasoning(question: Question, options: Sequence[str]) -> str:
    """Candidate segments one by one, then what follows."""
    lines = [f"Candidate segments, checked one by one for: {question.text}"]
    for window, text in question.candidates:
        line = f"{say_clues([window])[1:-1]}: {text.rstrip('.')}."
        if question.kind == "count":
            line += " This is one."
        elif text in options:
            line += f" This is option {LETTERS[options.index(text)]}."
        elif question.kind == "what":
            line += " This is no option."
        lines.append(line)
    return "\n".join([*lines, question.verdict, f"So the answer is {LETTERS[options.index(question.right)]}."])
