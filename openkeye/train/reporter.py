"""`Reporter`: whoever shows people how a run goes."""

from typing import Protocol


class Reporter(Protocol):
    """Told by rank 0 alone."""

    def stage(self, name: str, num_steps: int) -> None:
        """A stage begins, or goes on after a restart."""
        ...

    def step(self, record: dict[str, float | int | str]) -> None:
        """What went into the log just now; `step` counts the steps of the whole run, `seconds_left` is of the whole run too."""
        ...

    def say(self, text: str) -> None:
        """One line for people."""
        ...


class SilentReporter:
    """Shows nothing and keeps everything, for tests and for programs that read `records` themselves."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.records: list[dict[str, float | int | str]] = []
        self.lines: list[str] = []

    def stage(self, name: str, num_steps: int) -> None:
        """See `Reporter.stage`."""
        self.stages.append((name, num_steps))

    def step(self, record: dict[str, float | int | str]) -> None:
        """See `Reporter.step`."""
        self.records.append(record)

    def say(self, text: str) -> None:
        """See `Reporter.say`."""
        self.lines.append(text)
