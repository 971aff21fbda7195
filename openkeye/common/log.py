"""One JSON line per event, so that any tool can read a run."""

import json
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
