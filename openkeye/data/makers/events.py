"""Annotations of events: JSON lines `{"video", "duration", "events": [{"start", "end", "text"}]}`, times in seconds.

QVHighlights and Charades come to this form line by line; an event may also carry a `score`, how remarkable it is.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from openkeye.common.checks import InputError
from openkeye.data.makers.media_folder import VIDEO_ENDINGS
from openkeye.inputs.intervals import Interval
from openkeye.inputs.video_scan import scan_video

CLOCK_SLACK_SECONDS = 1.0
# by which annotations may run past the file's end; they are clipped


@dataclass(frozen=True)
class Event:
    """One sentence that is true of a part of a video."""

    start: float
    end: float
    text: str
    score: float | None = None


@dataclass(frozen=True)
class Happening:
    """A sentence with every window that it is true of, in order."""

    text: str
    windows: tuple[Interval, ...]
    score: float | None = None
    # the highest of its events


@dataclass(frozen=True)
class VideoEvents:
    """One line of annotations: a video's events in the order of their starts."""

    video: str
    duration: float
    events: tuple[Event, ...]

    @cached_property
    def happenings(self) -> tuple[Happening, ...]:
        """Events of one sentence together, in the order in which they first happen; windows that touch are one."""
        groups: dict[str, list[Event]] = {}
        for event in self.events:
            groups.setdefault(sentence_key(event.text), []).append(event)
        return tuple(
            Happening(
                group[0].text,
                tuple(merge_windows([(event.start, event.end) for event in group])),
                max((event.score for event in group if event.score is not None), default=None),
            )
            for group in groups.values()
        )


def sentence_key(text: str) -> str:
    """By which two sentences are the same: case, outer blanks and the full stop do not count."""
    return " ".join(text.split()).rstrip(".!?").casefold()


def merge_windows(windows: list[Interval]) -> list[Interval]:
    """The union of windows, ascending, those that touch joined."""
    merged: list[Interval] = []
    for start, end in sorted(windows):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


@dataclass(frozen=True)
class AnnotatedVideos:
    """Annotations of the videos of a folder. Jobs are lines, and a line is checked only when its job is made."""

    annotations: Path
    videos: Path

    @cached_property
    def lines(self) -> Mapping[str, str]:
        """Job name (`LINE:VIDEO`) to line.

        Raises:
            InputError: the file cannot be read or holds no line.
        """
        try:
            content = self.annotations.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.annotations}: cannot be read ({error}); give a file of JSON lines in UTF-8") from error
        lines = {_job_name(number, line): line for number, line in enumerate(content.split("\n"), 1) if line.strip()}
        if not lines:
            raise InputError(f"{self.annotations}: an empty file; give a line of JSON for each video")
        return lines

    def read(self, job: str) -> tuple[Path, VideoEvents]:
        """A job's video and its events.

        Raises:
            InputError: the line is not of this form, its times make no sense, or the video cannot be read.
        """
        events = self._parsed[job]
        if isinstance(events, InputError):
            raise events
        path = self._path(events.video)
        seconds = scan_video(path).duration_seconds
        if events.duration > seconds + CLOCK_SLACK_SECONDS:
            raise InputError(
                f"{path}: {seconds:.1f} s long, but its annotation says {events.duration:g} s; is it another file?"
            )
        return path, events

    def _path(self, video: str) -> Path:
        """The file of a video that an annotation may call by its name without the ending."""
        paths = [self.videos / name for name in (video, *(f"{video}{ending}" for ending in VIDEO_ENDINGS))]
        return next((path for path in paths if path.is_file()), paths[0])

    def others(self, job: str, rng: np.random.Generator, count: int) -> list[VideoEvents]:
        """At most `count` annotations of other videos, by chance; bad lines are left out: their own jobs tell of them."""
        own = self._parsed[job]
        names = list(self._parsed)
        found: list[VideoEvents] = []
        for number in rng.permutation(len(names)):
            events = self._parsed[names[number]]
            if not isinstance(events, InputError) and not (isinstance(own, VideoEvents) and events.video == own.video):
                found.append(events)
            if len(found) == count:
                break
        return found

    @cached_property
    def _parsed(self) -> Mapping[str, VideoEvents | InputError]:
        """Every line's events, or what is wrong with it."""
        parsed: dict[str, VideoEvents | InputError] = {}
        for job, line in self.lines.items():
            try:
                parsed[job] = _parse(line)
            except (ValueError, KeyError, TypeError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else str(error)
                parsed[job] = InputError(
                    f"{self.annotations}:{job.partition(':')[0]}: {reason}; expected "
                    '{"video", "duration", "events": [{"start", "end", "text"}]} with times in seconds'
                )
        return parsed


def _parse(line: str) -> VideoEvents:
    record = json.loads(line)
    duration = float(record["duration"])
    if not (isinstance(record["video"], str) and math.isfinite(duration)):
        raise TypeError(f"the video {record['video']!r} of {duration:g} s")
    events = sorted((_event(entry, duration) for entry in record["events"]), key=lambda event: (event.start, event.end))
    return VideoEvents(record["video"], duration, tuple(events))


def _job_name(number: int, line: str) -> str:
    try:
        video = json.loads(line)["video"]
    except (ValueError, KeyError, TypeError):
        # (told when the job is made)
        video = "?"
    return f"{number}:{video}"


def _event(entry: Any, duration: float) -> Event:
    start, end, text = float(entry["start"]), min(float(entry["end"]), duration), entry["text"]
    if not (0.0 <= start < end and float(entry["end"]) <= duration + CLOCK_SLACK_SECONDS):
        raise ValueError(f"an event from {entry['start']} to {entry['end']} in a video of {duration:g} s")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"an event whose text is {text!r}")
    return Event(start, end, " ".join(text.split()), None if entry.get("score") is None else float(entry["score"]))
