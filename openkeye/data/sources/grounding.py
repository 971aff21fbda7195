"""Annotations of when something happens in a video, as questions with answers in the project's own words for times."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openkeye.common.checks import InputError
from openkeye.data.sample import Sample
from openkeye.data.sources.files import existing_folder, video_below
from openkeye.frameforge.questions import say_spans
from openkeye.inputs.intervals import Interval

QUESTION = "When does this happen in the video: {query}?"
TASK = "temporal_grounding"


@dataclass(frozen=True)
class Annotation:
    """One query about one video."""

    where: str
    # "charades_sta_train.txt:17"
    video: str
    query: str = ""
    windows: tuple[Interval, ...] = ()
    # seconds, as they are said
    error: str = ""
    # what is wrong with it; it is told when the sample is read


class GroundingSource:
    """A `Source`: the videos of annotations, the queries about each as branches behind it, or a sample for each query."""

    def __init__(self, annotations: Iterable[Annotation], videos: str, path: Path, question: str, groups: bool) -> None:
        """Sort annotations by video.

        Args:
            videos: the folder of the videos; "": that of the annotations, which `path` is.
            question: with {query} where the query stands.
            groups: whether the queries about a video share a sample.

        Raises:
            InputError: no such folder, no annotation, or a question without {query}.
        """
        if question.count("{query}") != 1 or question.replace("{query}", "").count("{"):
            raise InputError(f"question is {question!r}; it holds {{query}} once, and no other braces")
        self._question = question
        self._videos = existing_folder(videos, "the folder of the videos") if videos else path.parent
        grouped: dict[str, list[Annotation]] = {}
        for annotation in annotations:
            is_alone = not groups or annotation.error
            grouped.setdefault(annotation.where if is_alone else f"\n{annotation.video}", []).append(annotation)
        if not grouped:
            raise InputError(f"{path}: no annotation; give the file that the data set came with")
        self._groups = list(grouped.values())

    @property
    def num_samples(self) -> int:
        return len(self._groups)

    def read(self, index: int) -> Sample:
        """See `Source.read`."""
        first, *others = self._groups[index]
        if first.error:
            raise InputError(f"{first.where}: {first.error}")
        video = {"role": "user", "content": [{"type": "video", "video": video_below(self._videos, first.video, first.where)}]}
        branches = [self._turns(annotation) for annotation in (first, *others)]
        last = max(end for annotation in (first, *others) for _, end in annotation.windows)
        if not others:
            (question, answer), parts = branches[0], video["content"]
            asked = {"role": "user", "content": [*parts, {"type": "text", "text": question["content"]}]}
            return Sample(first.where, [asked, answer], task=TASK, last_told_seconds=last)
        return Sample(first.where, [video], branches, task=TASK, last_told_seconds=last)

    def _turns(self, annotation: Annotation) -> Sequence[dict[str, Any]]:
        query = annotation.query.strip().rstrip(".?! ")
        return (
            {"role": "user", "content": self._question.replace("{query}", query)},
            {"role": "assistant", "content": say_spans(list(annotation.windows))},
        )


def checked_annotation(where: str, video: Any, query: Any, windows: Any, duration_seconds: Any = None) -> Annotation:
    """An annotation of what a file says; one that makes no sense tells so when it is read."""

    def wrong(what: str) -> Annotation:
        return Annotation(where, "", error=what)

    if not isinstance(video, str) or not video:
        return wrong(f"video is {video!r:.80}; expected its name")
    if not isinstance(query, str) or not query.strip():
        return wrong(f"query is {query!r:.80}; expected words")
    if not isinstance(windows, (list, tuple)) or not windows:
        return wrong(f"windows are {windows!r:.80}; expected at least one [start, end]")
    spans: list[Interval] = []
    for window in windows:
        if not isinstance(window, (list, tuple)) or len(window) != 2 or not all(map(_is_time, window)):
            return wrong(f"window {window!r:.80}; expected [start, end] in seconds")
        start, end = map(float, window)
        if not start < end:
            return wrong(f"window {start:g} to {end:g} s ends before it begins; mend or remove it")
        if _is_time(duration_seconds) and start >= duration_seconds:
            return wrong(f"window {start:g} to {end:g} s begins behind the video's end at {duration_seconds:g} s")
        spans.append((start, end))
    return Annotation(where, video, query, tuple(sorted(spans)))


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
