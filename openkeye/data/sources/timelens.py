"""TimeLens: the benchmark's JSON object of videos with `spans` and `queries`, and the training set's JSON lines of `events`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openkeye.common.checks import InputError
from openkeye.data.sources.files import LineIndex, existing_file, read_json_text
from openkeye.data.sources.grounding import QUESTION, Annotation, GroundingSource, checked_annotation


class TimeLens(GroundingSource):
    """A `Source`: each video with the queries about it."""

    def __init__(
        self, path: str | Path = "", *, annotations: str = "", videos: str = "", question: str = QUESTION, groups: bool = True
    ) -> None:
        """annotations: the file (`.json` or `.jsonl`), where `path` says none; see `GroundingSource` for the others."""
        file = existing_file(annotations or path, "the annotations, for example charades-timelens.json")
        found = _events(LineIndex(file)) if file.suffix == ".jsonl" else _videos(file)
        super().__init__(found, videos, file, question, groups)


def _videos(file: Path) -> Iterator[Annotation]:
    """`{VIDEO: {"duration", "spans": [[start, end], ...], "queries": [words, ...]}}`, a span for each query."""
    content = read_json_text(file.read_bytes(), str(file))
    if not isinstance(content, dict):
        raise InputError(f"{file}: holds a {type(content).__name__}, expected an object with an entry for each video")
    for video, entry in content.items():
        where = f"{file.name}:{video}"
        spans, queries = (entry.get(name) if isinstance(entry, dict) else None for name in ("spans", "queries"))
        if not isinstance(spans, list) or not isinstance(queries, list) or len(spans) != len(queries):
            yield Annotation(where, "", error=f"{entry!r:.80}; expected spans and queries, as many of both")
            continue
        for number, (span, query) in enumerate(zip(spans, queries, strict=True), 1):
            yield checked_annotation(f"{where}:{number}", video, query, _windows(span), entry.get("duration"))


def _events(lines: LineIndex) -> Iterator[Annotation]:
    """`{"video_path", "duration", "events": [{"query", "span": [[start, end], ...]}]}`"""
    for index in range(len(lines)):
        where = lines.where(index)
        try:
            record = read_json_text(lines.read(index), where)
        except InputError as error:
            yield Annotation(where, "", error=str(error).removeprefix(f"{where}: "))
            continue
        events = record.get("events") if isinstance(record, dict) else None
        if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
            yield Annotation(where, "", error=f"{record!r:.80}; expected video_path and events with query and span")
            continue
        for number, event in enumerate(events, 1):
            windows = _windows(event.get("span"))
            yield checked_annotation(
                f"{where}:{number}", record.get("video_path"), event.get("query"), windows, record.get("duration")
            )


def _windows(span: Any) -> Any:
    """One [start, end] or a list of them, as a list."""
    is_one = isinstance(span, list) and len(span) == 2 and not any(isinstance(bound, list) for bound in span)
    return [span] if is_one else span
