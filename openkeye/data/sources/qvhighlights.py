"""QVHighlights: JSON lines with `query`, `vid`, `duration` and `relevant_windows` (seconds)."""

from collections.abc import Iterator
from pathlib import Path

from openkeye.common.checks import InputError
from openkeye.data.sources.files import LineIndex, existing_file, read_json_text
from openkeye.data.sources.grounding import QUESTION, Annotation, GroundingSource, checked_annotation


class QvHighlights(GroundingSource):
    """A `Source`: each video with the queries about it; what lies between windows counts as not relevant."""

    def __init__(
        self, path: str | Path = "", *, annotations: str = "", videos: str = "", question: str = QUESTION, groups: bool = True
    ) -> None:
        """annotations: the file, where `path` says none; see `GroundingSource` for the others."""
        file = existing_file(annotations or path, "the annotations, for example highlight_train_release.jsonl")
        super().__init__(_annotations(LineIndex(file)), videos, file, question, groups)


def _annotations(lines: LineIndex) -> Iterator[Annotation]:
    for index in range(len(lines)):
        where = lines.where(index)
        try:
            record = read_json_text(lines.read(index), where)
        except InputError as error:
            yield Annotation(where, "", error=str(error).removeprefix(f"{where}: "))
            continue
        if not isinstance(record, dict):
            yield Annotation(where, "", error=f"{record!r:.80}; expected an object with query, vid and relevant_windows")
            continue
        yield checked_annotation(
            where, record.get("vid"), record.get("query"), record.get("relevant_windows"), record.get("duration")
        )
