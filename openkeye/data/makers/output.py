"""The folder that a maker writes: `data.jsonl` with a sample a line, media files, and a journal of the jobs that are done.

A job is done when its line stands in `journal.jsonl`; the line says how long `data.jsonl` was then. Whatever a crash left
behind that length is cut off when the folder is opened again, so no job is there half or twice.
"""

import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from openkeye.common.checks import InputError, writing_to
from openkeye.data.makers.made_sample import MadeSample, Message

DATA, JOURNAL, COPIES = "data.jsonl", "journal.jsonl", "media"


class OutputFolder:
    """What was made so far, and the way to add to it. One process at a time."""

    def __init__(self, folder: Path, recipe: str, settings: Mapping[str, Any], is_copying_media: bool = False) -> None:
        """Open a folder, made if missing, to go on where the last run ended.

        Args:
            settings: plain data, compared with those under which the folder was begun.
            is_copying_media: whether media are copied into the folder; else lines name them where they are.

        Raises:
            InputError: the folder was begun by another recipe or under other settings, or cannot be written.
        """
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: a file; give a folder for the output")
        self.folder = folder.resolve()
        self.is_copying_media = is_copying_media
        self.done: dict[str, int] = {}
        # number of samples of each job that is done
        with writing_to(folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            size, journal_size = self._read_journal(json.loads(json.dumps({"recipe": recipe, "settings": dict(settings)})))
            self._data = self._opened_at(self.folder / DATA, size)
            self._journal = self._opened_at(self.folder / JOURNAL, journal_size)
            if not journal_size:
                self._append(self._journal, {"recipe": recipe, "settings": dict(settings)})

    def __enter__(self) -> "OutputFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self._data.close()
        self._journal.close()

    @property
    def num_samples(self) -> int:
        """Lines of `data.jsonl`."""
        return sum(self.done.values())

    def add(self, job: str, samples: Sequence[MadeSample]) -> None:
        """Write what a job made: its files, then its lines, then that it is done.

        Raises:
            InputError: the folder cannot be written.
        """
        with writing_to(self.folder):
            for sample in samples:
                for name, content in sample.files.items():
                    self._write_file(name, content)
            lines = [self._line(job, number, sample) for number, sample in enumerate(samples)]
            for line in lines:
                self._data.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._data.flush()
            os.fsync(self._data.fileno())
            self._append(self._journal, {"job": job, "num_samples": len(lines), "data_bytes": self._data.tell()})
        self.done[job] = len(lines)

    def _read_journal(self, header: dict[str, Any]) -> tuple[int, int]:
        """Lengths in bytes of what is whole of the data and of the journal; fills `done`."""
        path = self.folder / JOURNAL
        if not path.exists():
            if (self.folder / DATA).exists():
                raise InputError(f"{self.folder}: holds a {DATA} that no maker began here; give another folder")
            return 0, 0
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            records = [json.loads(line) for line in whole.splitlines()]
            if records and records[0] != header:
                raise InputError(f"{self.folder}: {_difference(records[0], header)}; give another folder, or the same options")
            self.done = {record["job"]: record["num_samples"] for record in records[1:]}
            size = records[-1]["data_bytes"] if len(records) > 1 else 0
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not a maker's journal ({error}); give another folder") from error
        data = self.folder / DATA
        if (data.stat().st_size if data.exists() else 0) < size:
            raise InputError(f"{data}: shorter than its journal says; remove the folder and make it again")
        return size, len(whole)

    @staticmethod
    def _opened_at(path: Path, size: int) -> Any:
        file = path.open("ab")
        file.truncate(size)
        file.seek(size)
        return file

    @staticmethod
    def _append(file: Any, record: Mapping[str, Any]) -> None:
        file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        file.flush()

    def _line(self, job: str, number: int, sample: MadeSample) -> dict[str, Any]:
        messages = [self._with_names(message) for message in sample.messages]
        line: dict[str, Any] = {"id": f"{job}/{number}", "messages": messages, "task": sample.task}
        return line | ({"truth": sample.truth} if sample.truth else {})

    def _with_names(self, message: Message) -> Message:
        if isinstance(message["content"], str):
            return message
        return message | {"content": [{key: self._name(value) for key, value in part.items()} for part in message["content"]]}

    def _name(self, value: Any) -> Any:
        """A file's path as it stands in a line: relative to the folder."""
        if not isinstance(value, Path):
            return value
        path = value.resolve()
        if self.is_copying_media:
            # Two folders may hold files of one name: a number from the whole path tells them apart.
            copy = Path(COPIES, f"{path.stem}-{zlib.crc32(str(path).encode()):08x}{path.suffix}")
            if not (self.folder / copy).exists():
                self._copy(path, copy)
            return copy.as_posix()
        return Path(os.path.relpath(path, self.folder)).as_posix()

    def _copy(self, path: Path, copy: Path) -> None:
        target = self.folder / copy
        target.parent.mkdir(exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        shutil.copyfile(path, part)
        os.replace(part, target)

    def _write_file(self, name: str, content: bytes) -> None:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        part.write_bytes(content)
        os.replace(part, target)


def _difference(before: Any, now: Mapping[str, Any]) -> str:
    """What differs between the folder's beginning and this run, in words."""
    begun_by = before.get("recipe") if isinstance(before, dict) else before
    if begun_by != now["recipe"]:
        return f"was begun by {begun_by}, not by {now['recipe']}"
    old, new = before.get("settings", {}), now["settings"]
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return "was begun with " + ", ".join(f"{name} {old.get(name)!r} (now {new.get(name)!r})" for name in names)
