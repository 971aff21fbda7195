"""One JSON line per event, so that any tool can read a run."""

import json
import os
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends records to a file; each line is written whole."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", buffering=1)

    def write(self, **record: Any) -> None:
        """Append one record; floats are rounded to 6 significant digits."""
        rounded = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in record.items()}
        self._file.write(json.dumps(rounded) + "\n")

    def close(self) -> None:
        self._file.close()


def forget_after(path: Path, step: int) -> None:
    """Leave out the records of later steps: a run that was killed goes on from its checkpoint, and comes to them again."""
    if not path.is_file():
        return
    # The last line of a process that was killed may be cut short.
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
    os.replace(unfinished, path)
