"""JSON lines of chat messages, the form in which most people keep samples, and in which `openkeye make-data` writes them."""

from pathlib import Path

from openkeye.data.sample import Sample
from openkeye.data.sources.files import LineIndex, existing_file, existing_folder, media_below, read_json_text
from openkeye.data.sources.records import sample_of_record


class ChatJsonLines:
    """A `Source`: a record on each line (`records.sample_of_record`), read by number without loading the others."""

    def __init__(self, path: str | Path, *, media: str = "") -> None:
        """media: the folder that paths in the records are relative to; default: the file's own.

        Raises:
            InputError: no such file or folder.
        """
        file = existing_file(path, "a file of JSON lines")
        self._media = existing_folder(media, "the folder of the media") if media else file.parent
        self._lines = LineIndex(file)

    @property
    def num_samples(self) -> int:
        return len(self._lines)

    def read(self, index: int) -> Sample:
        """See `Source.read`."""
        where = self._lines.where(index)
        record = read_json_text(self._lines.read(index), where)
        return sample_of_record(record, where, media_below(self._media, where))
