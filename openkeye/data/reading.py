"""From a draw to a document, or to the reason why there is none; in this process or, by `reading_pool.py`, in others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from openkeye.common.checks import InputError
from openkeye.data.document import Document
from openkeye.data.mixture import Draw
from openkeye.data.sample import Sample, Source, UnfitError


@dataclass(frozen=True)
class BadSample:
    """A sample that is left out."""

    name: str
    reason: str
    is_too_long: bool = False
    # nothing is wrong with it but its length


@dataclass(frozen=True)
class SampleReader:
    """Reads and converts single samples."""

    sources: Mapping[str, Source]
    convert: Callable[[Sample], Document]
    # not called where a source hands out finished documents
    context: int
    # tokens of the longest document

    def __call__(self, draw: Draw) -> Document | BadSample:
        """The document of a draw; what source and `convert` say against it (an InputError) is a bad sample's reason."""
        name = draw.name
        try:
            sample = self.sources[draw.source].read(draw.index)
            name = sample.name
            document = sample if isinstance(sample, Document) else self.convert(sample)
        except InputError as error:
            return BadSample(name, str(error), is_too_long=isinstance(error, UnfitError))
        if document.num_tokens > self.context:
            reason = f"{document.num_tokens:,} tokens, the stage's context is {self.context:,}"
            return BadSample(name, reason, is_too_long=True)
        return document


class ReadingStoppedError(Exception):
    """`stop` was called while a document was awaited."""


class Reading(Protocol):
    """Where draws are read: they are asked for ahead, and taken by the number that they then got."""

    def submit(self, draw: Draw) -> int:
        """Ask for a document; returns a number for `take`."""
        ...

    def take(self, number: int) -> Document | BadSample:
        """The document asked for, once; waits until it is there.

        Raises:
            ReadingStoppedError: `stop` was called.
        """
        ...

    def stop(self) -> None:
        """End a `take` under way and all later ones; from any thread."""
        ...

    def close(self) -> None:
        """Release everything; after `stop`, on any thread, once no `take` is under way."""
        ...


class InProcessReading:
    """Reads when a document is taken, on the caller's thread."""

    def __init__(self, reader: SampleReader) -> None:
        self._reader = reader
        self._draws: dict[int, Draw] = {}
        self._num_submitted = 0
        self._is_stopped = False

    def submit(self, draw: Draw) -> int:
        """See `Reading.submit`."""
        number = self._num_submitted
        self._num_submitted += 1
        self._draws[number] = draw
        return number

    def take(self, number: int) -> Document | BadSample:
        """See `Reading.take`."""
        if self._is_stopped:
            raise ReadingStoppedError
        return self._reader(self._draws.pop(number))

    def stop(self) -> None:
        """See `Reading.stop`: the sample being read is read to its end."""
        self._is_stopped = True

    def close(self) -> None:
        """See `Reading.close`."""
        self._draws.clear()
