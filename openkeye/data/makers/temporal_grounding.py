"""Recipe `temporal-grounding`: four forms of questions about when, from annotated events (the ETBench family; report, 3.2)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openkeye.common.checks import InputError
from openkeye.data.makers.events import AnnotatedVideos, Happening, VideoEvents, merge_windows
from openkeye.data.makers.made_sample import MadeSample, assistant, job_rng, pick, text_part, user, video_part
from openkeye.frameforge.questions import say_spans
from openkeye.inputs.intervals import Interval

ACTION_PROMPTS = (
    "What happens from {:.1f} to {:.1f} seconds?",
    "Describe the action between {:.1f} and {:.1f} seconds.",
    "Which event is seen from {:.1f} to {:.1f} seconds?",
    "Look at the part from {:.1f} to {:.1f} seconds. What is going on?",
)
HIGHLIGHT_PROMPTS = (
    'Find the highlight of the video that fits: "{}"',
    'Someone searches for "{}". When is it shown?',
    'Which moments of the video show this: "{}"',
    'When does the following happen? "{}"',
)
SUMMARY_PROMPTS = (
    "Which parts of the video would make a summary of it?",
    "Summarise the video by its most important parts: give their times.",
    "Choose the parts that tell what happens in this video.",
    "Shorten the video to what matters. Which spans stay?",
)
MATCH_PROMPTS = (
    "Look at what happens from {:.1f} to {:.1f} seconds. When does the same happen again?",
    "Find the other parts of the video in which the same happens as from {:.1f} to {:.1f} seconds.",
    "The part from {:.1f} to {:.1f} seconds shows an event. Where else does it take place?",
    "When else is the event between {:.1f} and {:.1f} seconds seen?",
)


@dataclass(frozen=True)
class Grounding:
    """A question with its answer and truth."""

    question: str
    answer: str
    truth: Mapping[str, Any]


def _windows(windows: Sequence[Interval]) -> list[list[float]]:
    return [list(window) for window in windows]


def referred_action(rng: np.random.Generator, events: VideoEvents) -> list[Grounding]:
    """A window is given, its sentence is asked; only where no other event overlaps it by half, so that one answer is right."""
    found = []
    for happening in events.happenings:
        clear = [window for window in happening.windows if not _is_shared(window, happening, events)]
        if clear:
            window = pick(rng, clear)
            truth = {"window": list(window), "text": happening.text}
            found.append(Grounding(pick(rng, ACTION_PROMPTS).format(*window), happening.text, truth))
    return found


def _is_shared(window: Interval, own: Happening, events: VideoEvents) -> bool:
    """Whether another event fills half of a window."""
    others = [other for happening in events.happenings if happening is not own for other in happening.windows]
    return any(min(window[1], end) - max(window[0], start) >= (window[1] - window[0]) / 2 for start, end in others)


def highlight(rng: np.random.Generator, events: VideoEvents) -> list[Grounding]:
    """A sentence is given, its windows are asked."""
    return [
        Grounding(
            pick(rng, HIGHLIGHT_PROMPTS).format(happening.text),
            say_spans(list(happening.windows)),
            {"text": happening.text, "intervals": _windows(happening.windows)},
        )
        for happening in events.happenings
    ]


def extractive_summary(rng: np.random.Generator, events: VideoEvents) -> list[Grounding]:
    """All that matters is asked: the union of the windows; where events have scores, of those that reach the mean score.

    There is none where that is one window, or nine tenths of the video: nothing would be left out.
    """
    scores = [event.score for event in events.events if event.score is not None]
    least = float(np.mean(scores)) if scores else None
    kept = [event for event in events.events if least is None or (event.score is not None and event.score >= least)]
    windows = merge_windows([(event.start, event.end) for event in kept])
    if len(windows) < 2 or sum(end - start for start, end in windows) >= 0.9 * events.duration:
        return []
    return [Grounding(pick(rng, SUMMARY_PROMPTS), say_spans(windows), {"intervals": _windows(windows)})]


def event_matching(rng: np.random.Generator, events: VideoEvents) -> list[Grounding]:
    """One window of a sentence is given, its others are asked."""
    found = []
    for happening in events.happenings:
        if len(happening.windows) < 2:
            continue
        shown = pick(rng, happening.windows)
        others = [window for window in happening.windows if window != shown]
        truth = {"window": list(shown), "text": happening.text, "intervals": _windows(others)}
        found.append(Grounding(pick(rng, MATCH_PROMPTS).format(*shown), say_spans(others), truth))
    return found


FORMS: dict[str, Callable[[np.random.Generator, VideoEvents], list[Grounding]]] = {
    "referred-action": referred_action,
    "highlight": highlight,
    "summary": extractive_summary,
    "matching": event_matching,
}


@dataclass(frozen=True)
class TemporalGrounding:
    """Some questions of every form for each annotated video."""

    annotated: AnnotatedVideos
    seed: int = 0
    forms: tuple[str, ...] = tuple(FORMS)
    max_per_form: int = 2
    # of one video

    name = "temporal-grounding"

    def __post_init__(self) -> None:
        unknown = set(self.forms) - set(FORMS)
        if unknown or not self.forms:
            raise InputError(f"forms {', '.join(sorted(unknown)) or 'none'}: choose from {', '.join(FORMS)}")
        if self.max_per_form < 1:
            raise InputError(f"{self.max_per_form} questions a form; give 1 or more")

    @property
    def settings(self) -> Mapping[str, Any]:
        """See `Recipe.settings`."""
        return {"seed": self.seed, "forms": list(self.forms), "max_per_form": self.max_per_form}

    def jobs(self) -> Sequence[str]:
        """One for each line of annotations."""
        return list(self.annotated.lines)

    def make(self, job: str) -> list[MadeSample]:
        """See `Recipe.make`."""
        path, events = self.annotated.read(job)
        rng = job_rng(self.seed, job)
        samples = []
        for form in self.forms:
            found = FORMS[form](rng, events)
            for number in sorted(rng.permutation(len(found))[: self.max_per_form].tolist()):
                messages = [user(video_part(path), text_part(found[number].question)), assistant(found[number].answer)]
                samples.append(MadeSample(messages, form.replace("-", "_"), found[number].truth))
        return samples
