"""Sources for tests of the loader: small enough to know every sample, and able to fail in every way."""

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from openkeye.common.checks import InputError
from openkeye.data.document import Document
from openkeye.data.sample import Sample


def document(name: str, length: int, task: str = "") -> Document:
    """A text whose tokens are its number and places."""
    ids = torch.arange(length) + 1000 * (hash_of(name) % 1000)
    return Document(
        name=name,
        input_ids=ids,
        position_ids=torch.arange(length).expand(3, length),
        is_learnt=torch.ones(length, dtype=torch.bool),
        is_media=torch.zeros(length, dtype=torch.bool),
        task=task,
    )


def hash_of(name: str) -> int:
    """Small, and the same in every process."""
    return sum(name.encode())


@dataclass(frozen=True)
class TextSource:
    """Samples named NAME:INDEX, whose text `convert` turns into 3 to 3 + spread tokens."""

    name: str
    num_samples: int | None
    spread: int = 20
    bad_every: int = 0
    # every so many samples one cannot be read; 0: none

    def read(self, index: int) -> Sample | Document:
        if self.num_samples is not None:
            assert 0 <= index < self.num_samples
        if self.bad_every and index % self.bad_every == 0:
            raise InputError(f"{self.name}:{index}: the file ends early; copy it again")
        length = 3 + index * 7919 % (self.spread + 1)
        return Sample(f"{self.name}:{index}", [{"role": "user", "content": "x" * length}])


@dataclass(frozen=True)
class FinishedSource:
    """Hands out documents."""

    name: str
    num_samples: int | None
    length: int = 10

    def read(self, index: int) -> Document:
        return document(f"{self.name}:{index}", self.length, task=self.name)


@dataclass(frozen=True)
class DeadlySource:
    """Some samples end the process that reads them: so often, then they read well."""

    folder: str
    # where each attempt leaves a file INDEX_PROCESS
    ends: Mapping[int, tuple[str, int]]
    # by sample: how ("kill", "exit", "hang", "memory", "mistake") and how often
    num_samples: int = 40

    def read(self, index: int) -> Document:
        how, num_deaths = self.ends.get(index, ("", 0))
        if len(list(Path(self.folder).glob(f"{index}_*"))) < num_deaths:
            (Path(self.folder) / f"{index}_{os.getpid()}").touch()
            end_process(how)
        return document(f"deadly:{index}", 10)


def end_process(how: str) -> None:
    """In one of the ways of `DeadlySource`."""
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "exit":
        os._exit(9)
    elif how == "hang":
        time.sleep(1000)
    elif how == "memory":
        raise MemoryError
    else:
        raise KeyError("a mistake in code")


def convert(sample: Sample) -> Document:
    """One token a letter."""
    return document(sample.name, len(sample.messages[0]["content"]))
