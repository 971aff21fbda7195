"""Parquet files whose rows are chat records, pictures as bytes in them or as paths."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from openkeye.common.checks import InputError
from openkeye.data.sample import Sample
from openkeye.data.sources.files import existing_folder, files_at, media_below
from openkeye.data.sources.records import RECORD_FIELDS, sample_of_record

NUM_HELD_GROUPS = 2
# row groups that stay decoded; neighbouring rows share one


class ParquetRows:
    """A `Source`: a row a sample (`records.sample_of_record`), file after file; only the row group asked for is decoded."""

    def __init__(self, path: str | Path, *, media: str = "") -> None:
        """Read the files' footers.

        Args:
            path: a file, or a folder of `*.parquet`.
            media: the folder that paths in the rows are relative to; default: each file's own.

        Raises:
            InputError: no such file or folder, a file that is no Parquet, or one without messages, conversations or text.
        """
        self._files = files_at(path, "*.parquet", "a Parquet file or a folder of them")
        self._media = existing_folder(media, "the folder of the media") if media else None
        self._groups: list[tuple[int, int, int]] = []
        # (file, its row group, rows of the file before it)
        sizes = [0]
        for number, file in enumerate(self._files):
            rows = _row_groups(file)
            self._groups += [(number, group, sum(rows[:group])) for group in range(len(rows))]
            sizes += rows
        self._bounds = np.cumsum(sizes, dtype=np.int64)
        # [groups + 1]: samples before each
        self._held: OrderedDict[int, pyarrow.Table] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": OrderedDict()}

    @property
    def num_samples(self) -> int:
        return int(self._bounds[-1])

    def read(self, index: int) -> Sample:
        """See `Source.read`."""
        group = int(np.searchsorted(self._bounds, index, side="right")) - 1
        number, _, num_before = self._groups[group]
        file, row = self._files[number], index - int(self._bounds[group])
        where = f"{file.name}:{num_before + row + 1}"
        try:
            record = self._table(group).slice(row, 1).to_pylist()[0]
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{where}: cannot be read ({error!s:.120}); copy or make {file} again") from error
        return sample_of_record(_without_nothing(record), where, media_below(self._media or file.parent, where))

    def _table(self, group: int) -> pyarrow.Table:
        if group in self._held:
            self._held.move_to_end(group)
            return self._held[group]
        number, group_of_file, _ = self._groups[group]
        with pyarrow.parquet.ParquetFile(self._files[number]) as file:
            columns = [name for name in file.schema_arrow.names if name in RECORD_FIELDS]
            table = file.read_row_group(group_of_file, columns=columns)
        self._held[group] = table
        if len(self._held) > NUM_HELD_GROUPS:
            self._held.popitem(last=False)
        return table


def _row_groups(path: Path) -> list[int]:
    """Rows of each row group."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names, metadata = file.schema_arrow.names, file.metadata
            groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a whole Parquet file ({error!s:.120}); copy or make it again") from error
    if not {"messages", "conversations", "text"} & set(names):
        raise InputError(f"{path}: columns {', '.join(names)}; expected messages, conversations or text among them")
    return groups


def _without_nothing(value: Any) -> Any:
    """The same without fields of None: a column's type gives every object all fields that any of them has."""
    if isinstance(value, dict):
        return {key: _without_nothing(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nothing(item) for item in value]
    return value
