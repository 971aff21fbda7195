"""How a run goes, for people: a bar on a terminal, lines elsewhere, and TensorBoard's event files beside the log."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

Record = Mapping[str, float | int | str]
TENSORBOARD_DIR = "tensorboard"
UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


class Run(Protocol):
    """What is to be known of a run's settings."""

    @property
    def run_dir(self) -> str: ...

    @property
    def num_steps(self) -> int: ...

    @property
    def has_tensorboard(self) -> bool: ...


class TrainProgress:
    """A `Reporter` on standard error. Use it as a context manager."""

    def __init__(self, config: Run, lines_every_seconds: float = 10.0, console: Console | None = None) -> None:
        """lines_every_seconds: where standard error is no terminal."""
        self.num_steps = config.num_steps
        self.step_number = 0
        # of the last record
        self._console = console or Console(stderr=True, highlight=False)
        self._lines_every, self._last_line = lines_every_seconds, -float("inf")
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._stage_steps = 0
        self._events = _open_events(config, self.say) if config.has_tensorboard else None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self._progress.stop()
        if self._events is not None:
            self._events.close()

    def stage(self, name: str, num_steps: int) -> None:
        """See `Reporter.stage`."""
        self._stage_steps = num_steps
        self._last_line = -float("inf")
        self._task = self._progress.add_task(name, total=num_steps, figures="")
        if self._progress.disable:
            self.say(f"stage {name}: {num_steps} steps")

    def step(self, record: Record) -> None:
        """See `Reporter.step`."""
        self.step_number = int(record["step"])
        if self._events is not None:
            _write_events(self._events, record)
        done = int(record.get("step_in_stage", self.step_number))
        if self._task is not None and not self._progress.disable:
            self._progress.update(self._task, completed=done, figures=figures_text(record))
            return
        now = time.monotonic()
        if now - self._last_line >= self._lines_every or done == self._stage_steps:
            self._last_line = now
            self.say(f"step {self.step_number} of {self.num_steps}  {record.get('stage', '')}  {figures_text(record)}")

    def say(self, text: str) -> None:
        """See `Reporter.say`."""
        self._console.print(text, markup=False, soft_wrap=True)


def figures_text(record: Record) -> str:
    """Loss, reward, divergence, speed, share of the device's peak, memory and time left; what a record lacks is left out."""
    shown: tuple[tuple[str, Callable[[float], str]], ...] = (
        ("loss", lambda value: f"loss {value:.4g}"),
        ("reward/outcome", lambda value: f"outcome {value:.2f}"),
        ("kl", lambda value: f"{value:.3g} nats from its teachers"),
        ("length", lambda value: f"{value:.0f} tokens a rollout"),
        ("indexer_recall", lambda value: f"recall {value:.2f}"),
        ("tokens_per_second", lambda value: f"{_short(value)} tokens/s"),
        ("peak_share", lambda value: f"{value:.0%} of peak"),
        ("memory_bytes", lambda value: f"{value / 2**30:.1f} GiB"),
        ("seconds_left", lambda value: f"{duration_text(value)} left"),
    )
    return "  ".join(form(float(record[name])) for name, form in shown if name in record)


def duration_text(seconds: float) -> str:
    """Two units at most: `1 d 4 h`, `3 min`, `45 s`."""
    for (size, unit), (smaller, smaller_unit) in zip(UNITS, (*UNITS[1:], (1.0, "")), strict=True):
        if seconds >= size:
            whole, rest = divmod(round(seconds / smaller) * smaller, size)
            has_rest = unit in ("d", "h") and rest >= smaller
            return f"{whole:.0f} {unit} {rest / smaller:.0f} {smaller_unit}" if has_rest else f"{whole:.0f} {unit}"
    return "0 s"


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _open_events(config: Run, say: Callable[[str], None]) -> Any:
    """TensorBoard's own writer, which needs neither TensorFlow nor PyTorch; None where it is not installed."""
    try:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        say('no TensorBoard files: it is not installed (pip install "openkeye[train]", or has_tensorboard=false)')
        return None
    return EventFileWriter(str(Path(config.run_dir) / TENSORBOARD_DIR))


def _write_events(events: Any, record: Record) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    numbers = {name: value for name, value in record.items() if isinstance(value, (int, float)) and name != "step"}
    values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in numbers.items()]
    events.add_event(Event(wall_time=time.time(), step=int(record["step"]), summary=Summary(value=values)))
