"""Charades-STA: lines of `VIDEO start end##sentence.` (seconds)."""

import re
from pathlib import Path

from openkeye.data.sources.files import existing_file
from openkeye.data.sources.grounding import QUESTION, Annotation, GroundingSource, checked_annotation

LINE = re.compile(r"(\S+)\s+(\d+(?:\.\d+)?)\s+(\d+(?:\.\d+)?)\s*##(.*)")


class CharadesSta(GroundingSource):
    """A `Source`: each video with the sentences about it."""

    def __init__(
        self, path: str | Path = "", *, annotations: str = "", videos: str = "", question: str = QUESTION, groups: bool = True
    ) -> None:
        """annotations: the file, where `path` says none; see `GroundingSource` for the others."""
        file = existing_file(annotations or path, "the annotations, for example charades_sta_train.txt")
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        found = (_annotation(f"{file.name}:{number}", line) for number, line in enumerate(lines, 1) if line.strip())
        super().__init__(found, videos, file, question, groups)


def _annotation(where: str, line: str) -> Annotation:
    match = LINE.fullmatch(line.strip())
    if match is None:
        return Annotation(where, "", error=f"{line!r:.80}; expected VIDEO start end##sentence.")
    return checked_annotation(where, match[1], match[4], [(float(match[2]), float(match[3]))])
