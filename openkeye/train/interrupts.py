"""Ctrl-C and a polite request to end: noted, so that the run can save; the second one ends the process at once."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While the block runs the first SIGINT or SIGTERM only sets `is_asked`; Python hands signals to the main thread alone."""

    def __init__(self) -> None:
        self.is_asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_asked:
            # No clean-up: whatever it would wait for may be what hangs. The last good checkpoint is whole at any moment.
            os._exit(128 + number)
        self.is_asked = True
