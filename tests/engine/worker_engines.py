"""What workers of tests open: functions that another process finds by their names."""

import os
from pathlib import Path

from openkeye.common.checks import InputError
from openkeye.engine.config import EngineConfig
from openkeye.engine.loop import Engine


class EndlessEngine(Engine):
    """No token ends an answer."""

    def _read_stop_ids(self) -> frozenset[int]:
        return frozenset()


def open_endless(**config: int) -> Engine:
    return EndlessEngine(config=EngineConfig(**config))


def open_while(folder: Path) -> Engine:
    """An engine while a folder is there; every try leaves a file beside it."""
    (folder.parent / f"try-{os.getpid()}").touch()
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; make it again")
    return EndlessEngine()


def die() -> Engine:
    os._exit(7)
