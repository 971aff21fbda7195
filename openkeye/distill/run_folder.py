"""Whose a run's folder is: the settings that it was begun with are written down, and a run with others is refused."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from openkeye.common.checks import InputError, writing_to
from openkeye.distill.config import DistillRun

SETTINGS_FILE = "settings.json"
MAY_CHANGE = {"run_dir", "out_dir", "num_steps", "save_every_steps", "has_tensorboard"}
# between two starts of a run: where it lies, and how long it goes on


def claim_run_dir(run: DistillRun) -> None:
    """Write the settings down, so that a later start knows whose folder it is.

    Raises:
        InputError: the folder holds a run with other settings, which are named; or it cannot be written.
    """
    folder, own = Path(run.run_dir), _as_json(run)
    path = folder / SETTINGS_FILE
    if path.is_file():
        before, now = (_flat({**settings, **dict.fromkeys(MAY_CHANGE)}) for settings in (json.loads(path.read_text()), own))
        told = [
            f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
            for name in {**before, **now}
            if before.get(name) != now.get(name)
        ]
        if told:
            raise InputError(f"{folder} belongs to a run with other settings ({'; '.join(told)}); give another run_dir")
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{SETTINGS_FILE}.unfinished"
        unfinished.write_text(json.dumps(own, indent=1) + "\n")
        os.replace(unfinished, path)


def _as_json(run: DistillRun) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(run)))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by path, as the words of a command line name them."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
