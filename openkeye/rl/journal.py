"""The journal of a run: what has happened, event by event, so that a kill at any byte loses nothing that was acted on.

A segment is a pair of files. `000003.jsonl` holds a line an event: the checksum of the text behind it, and the event as JSON.
`000003.arrays` holds the arrays of its events one after the other; the event's line says where, and their checksum. Arrays are
on the disk before the line that names them, and the line before whoever appended it goes on. A segment is written by one
process only and never appended to by the next, so only the last line of each can be cut short, and it tells of nothing then.

Compaction writes what is still needed into a new segment whose first line says so, renames it into place, deletes the others.
"""

import fcntl
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from openkeye.common.checks import InputError, writing_to

LINES, ARRAYS, UNFINISHED = ".jsonl", ".arrays", ".unfinished"
COMPACTED = "compacted"
# kind of the first line of a segment that takes the place of all before it
CHECKSUM_DIGITS = 8


@dataclass(frozen=True)
class Stored:
    """Where arrays lie."""

    segment: int
    offset: int
    num_bytes: int
    checksum: int


@dataclass(frozen=True)
class Event:
    """One line of the journal."""

    kind: str
    facts: Mapping[str, Any]
    # plain values
    stored: Stored | None = None


class Journal:
    """One run's journal, open for one process at a time."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            InputError: the folder cannot be written, another process has it open, or a line of it is damaged.
        """
        self.folder = folder
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder} is open in another process; end that run first, or give another run_dir") from None
        for rest in folder.glob(f"*{UNFINISHED}"):
            rest.unlink()
        self._segments = self._whole_segments()
        self.events = [event for number in self._segments for event in self._read(number)]
        # what had happened before this process
        self._begin_segment(1 + max(self._segments, default=0))

    def append(self, kind: str, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> Event:
        """Write an event down; on the disk when this returns.

        Raises:
            InputError: the disk is full, or the folder is gone.
        """
        with writing_to(self.folder):
            stored = self._write_arrays(save({name: _contiguous(array) for name, array in arrays.items()})) if arrays else None
            event = Event(kind, facts, stored)
            self._write(self._lines, _line(event))
            _to_disk(self._lines)
        return event

    def arrays(self, event: Event) -> dict[str, np.ndarray]:
        """The arrays of an event; none where it has none.

        Raises:
            InputError: they are not what was written.
        """
        if event.stored is None:
            return {}
        content = self._content(event.stored)
        try:
            return load(content)
        except SafetensorError as error:
            raise self._damaged(event.stored, str(error)) from error

    @property
    def num_bytes(self) -> int:
        """Of all segments."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def compact(self, needed: Iterable[Event]) -> list[Event]:
        """Keep these events alone; returns them as they are from now on, in the same order.

        Raises:
            InputError: there is no room for the copy; the journal is as it was.
        """
        old, number = [*self._segments], self._segments[-1] + 1
        kept = []
        with writing_to(self.folder):
            self._open_files(number, UNFINISHED)
            self._write(self._lines, _line(Event(COMPACTED, {"before": number})))
            for event in needed:
                stored = None if event.stored is None else self._write_arrays(self._content(event.stored), is_synced=False)
                kept.append(Event(event.kind, event.facts, stored))
                self._write(self._lines, _line(kept[-1]))
            _to_disk(self._arrays)
            _to_disk(self._lines)
            # Lines last: a segment exists once they do.
            for ending in (ARRAYS, LINES):
                os.replace(self._path(number, ending + UNFINISHED), self._path(number, ending))
            _folder_to_disk(self.folder)
        self._segments = [number]
        for segment in old:
            self._delete(segment)
        return kept

    def close(self) -> None:
        """Let go of the files; another process may open the journal."""
        for file in (self._arrays, self._lines, self._lock):
            file.close()

    def _whole_segments(self) -> list[int]:
        """The segments that count; those whose place another one has taken are deleted."""
        numbers = sorted(int(path.stem) for path in self.folder.glob(f"*{LINES}"))
        for path in self.folder.glob(f"*{ARRAYS}"):
            if int(path.stem) not in numbers:
                # A kill came before their lines were renamed into place, or after those were deleted.
                path.unlink()
        first = 0
        for number in numbers:
            with self._path(number, LINES).open("rb") as file:
                event = _parsed(file.readline())
            if event is not None and event.kind == COMPACTED:
                first = number
        for number in numbers:
            if number < first:
                self._delete(number)
        return [number for number in numbers if number >= first]

    def _read(self, number: int) -> Iterator[Event]:
        path = self._path(number, LINES)
        lines = path.read_bytes().splitlines(keepends=True)
        for place, line in enumerate(lines):
            event = _parsed(line)
            if event is None:
                if place == len(lines) - 1:
                    # Cut short by a kill: nobody has acted on it.
                    return
                raise InputError(
                    f"{path}, line {place + 1} is damaged: restore the file, or give another run_dir to begin anew"
                )
            if event.kind != COMPACTED:
                yield event

    def _begin_segment(self, number: int) -> None:
        with writing_to(self.folder):
            self._open_files(number)
            _folder_to_disk(self.folder)
        self._segments.append(number)

    def _open_files(self, number: int, ending: str = "") -> None:
        if self._segments and hasattr(self, "_lines"):
            self._lines.close()
            self._arrays.close()
        self._number, self._offset = number, 0
        self._arrays: BufferedWriter = self._path(number, ARRAYS + ending).open("wb")
        self._lines: BufferedWriter = self._path(number, LINES + ending).open("wb")

    def _write_arrays(self, content: bytes, is_synced: bool = True) -> Stored:
        stored = Stored(self._number, self._offset, len(content), zlib.crc32(content))
        self._write(self._arrays, content)
        if is_synced:
            _to_disk(self._arrays)
        self._offset += len(content)
        return stored

    def _write(self, file: BufferedWriter, content: bytes) -> None:
        file.write(content)

    def _content(self, stored: Stored) -> bytes:
        if stored.segment == self._number:
            self._arrays.flush()
        path = next(
            (path for ending in ("", UNFINISHED) if (path := self._path(stored.segment, ARRAYS + ending)).is_file()), None
        )
        if path is None:
            raise self._damaged(stored, "the file is missing")
        with path.open("rb") as file:
            file.seek(stored.offset)
            content = file.read(stored.num_bytes)
        if len(content) != stored.num_bytes or zlib.crc32(content) != stored.checksum:
            raise self._damaged(stored, "the checksum differs")
        return content

    def _damaged(self, stored: Stored, why: str) -> InputError:
        path = self._path(stored.segment, ARRAYS)
        return InputError(
            f"{path}, byte {stored.offset}: arrays cannot be read ({why}); restore the file, or give another run_dir"
        )

    def _delete(self, number: int) -> None:
        # Lines first: arrays without lines are nobody's.
        for ending in (LINES, ARRAYS):
            self._path(number, ending).unlink(missing_ok=True)

    def _path(self, number: int, ending: str) -> Path:
        return self.folder / f"{number:06}{ending}"


def _line(event: Event) -> bytes:
    stored = event.stored
    place = {} if stored is None else {"stored": [stored.segment, stored.offset, stored.num_bytes, stored.checksum]}
    text = json.dumps({"kind": event.kind, **place, "facts": event.facts}, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parsed(line: bytes) -> Event | None:
    """None where the line is not whole."""
    checksum, text = line[:CHECKSUM_DIGITS], line[CHECKSUM_DIGITS + 1 : -1]
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        return None
    record = json.loads(text)
    return Event(record["kind"], record["facts"], Stored(*record["stored"]) if "stored" in record else None)


def _contiguous(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array)


def _to_disk(file: BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
