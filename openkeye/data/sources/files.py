"""Files of samples: found at opening, read piece by piece."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from openkeye.common.checks import InputError
from openkeye.inputs.image import local_path

FindMedia = Callable[[str], str | bytes]
# from what a record calls a picture or a video to its path, or its content

CHUNK_BYTES = 1 << 24
VIDEO_ENDINGS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".gif")


def existing_file(path: str | Path, what: str) -> Path:
    """The file; InputError where there is none."""
    file = Path(path).expanduser()
    if not file.is_file():
        found = "a folder" if file.is_dir() else "no such file"
        raise InputError(f"{path or '(no path)'}: {found}; give {what}")
    return file


def existing_folder(path: str | Path, what: str) -> Path:
    """The folder; InputError where there is none."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InputError(f"{path or '(no path)'}: no such folder; give {what}")
    return folder


def files_at(path: str | Path, pattern: str, what: str) -> list[Path]:
    """A file itself, or the files of a folder and all below that fit a pattern, by name; InputError for none."""
    place = Path(path).expanduser()
    if not place.is_dir():
        return [existing_file(path, what)]
    found = sorted(file for file in place.rglob(pattern) if file.is_file())
    if not found:
        raise InputError(f"{path}: no file {pattern} in this folder; give {what}")
    return found


def media_below(folder: Path, where: str) -> FindMedia:
    """Finds files whose paths are relative to `folder`; data URLs are themselves. `where` is for errors."""

    def find(location: str) -> str:
        if location.startswith("data:"):
            return location
        try:
            path = folder / local_path(location)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if not path.is_file():
            raise InputError(f"{where}: no file {path}; check the path, or say with the option media which folder it is in")
        return str(path)

    return find


def video_below(folder: Path, name: str, where: str) -> str:
    """The path of a video that an annotation may call by its name without the ending."""
    for path in (folder / name, *(folder / f"{name}{ending}" for ending in VIDEO_ENDINGS)):
        if path.is_file():
            return str(path)
    raise InputError(f"{where}: no video {name} in {folder}; check the option videos, or remove the line")


def read_json_text(text: str | bytes, where: str) -> Any:
    """What JSON says; InputError naming the place."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({error}); mend or remove it") from error


class LineIndex:
    """Where the lines of a file begin, so that any is read alone. Blank lines do not count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bounds = _line_bounds(path)
        # No record is a single character; what is as short is a line break.
        self._numbers = np.flatnonzero(np.diff(self._bounds) > 2)

    def __len__(self) -> int:
        return len(self._numbers)

    def where(self, index: int) -> str:
        """`clips.jsonl:17`, counted from 1 over all lines."""
        return f"{self.path.name}:{int(self._numbers[index]) + 1}"

    def read(self, index: int) -> bytes:
        """A line without its break; InputError where the file has become shorter."""
        number = int(self._numbers[index])
        start, end = (int(bound) for bound in self._bounds[number : number + 2])
        line = read_bytes(self.path, start, end - start, self.where(index))
        return line.rstrip(b"\r\n")


def read_bytes(path: Path, start: int, size: int, where: str) -> bytes:
    """A piece of a file; InputError where it is gone or has become shorter."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(size)
    except OSError as error:
        raise InputError(f"{where}: {path} cannot be read ({error.strerror}); was it moved?") from error
    if len(content) < size:
        raise InputError(f"{where}: {path} has become shorter since it was opened; start again")
    return content


def _line_bounds(path: Path) -> np.ndarray:
    """[lines + 1] int64: where each line begins, and the file's end."""
    breaks, offset = [np.zeros(1, dtype=np.int64)], 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            breaks.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == 0x0A) + (offset + 1))
            offset += len(chunk)
    return np.unique(np.concatenate([*breaks, np.array([offset])]))
