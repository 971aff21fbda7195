"""LLaVA-Video style: one JSON list of objects with `video` and `conversations`."""

import json
from pathlib import Path

import numpy as np

from openkeye.common.checks import InputError
from openkeye.data.sample import Sample
from openkeye.data.sources.files import existing_file, existing_folder, media_below, read_json_text
from openkeye.data.sources.records import sample_of_record


class LlavaVideo:
    """A `Source`: a sample for each object of the list, called by its number from 1 on."""

    def __init__(self, path: str | Path, *, videos: str = "") -> None:
        """videos: the folder that `video` is relative to; default: the file's own.

        Raises:
            InputError: no such file or folder, or a file that is no JSON list.
        """
        self._file = existing_file(path, "a JSON list of objects with video and conversations")
        self._videos = existing_folder(videos, "the folder of the videos") if videos else self._file.parent
        records = read_json_text(self._file.read_bytes(), str(self._file))
        if not isinstance(records, list):
            raise InputError(f"{self._file}: holds a {type(records).__name__}, expected a list; for lines use chat_json_lines")
        # As bytes: objects would cost every process that reads several times as much.
        lines = [json.dumps(record).encode() for record in records]
        self._bounds = np.cumsum([0, *(len(line) for line in lines)])
        self._content = b"".join(lines)

    @property
    def num_samples(self) -> int:
        return len(self._bounds) - 1

    def read(self, index: int) -> Sample:
        """See `Source.read`."""
        where = f"{self._file.name}:{index + 1}"
        record = json.loads(self._content[self._bounds[index] : self._bounds[index + 1]])
        return sample_of_record(record, where, media_below(self._videos, where))
