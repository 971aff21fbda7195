"""`MadeSample`: one line of a maker's output; and what every recipe is."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Message = dict[str, Any]


@dataclass(frozen=True)
class MadeSample:
    """Chat messages with their truth as data."""

    messages: Sequence[Message]
    # contents as in `openkeye.inputs.messages`; media are a Path of a file that was there before, or the name of one in `files`
    task: str
    truth: Mapping[str, Any] = field(default_factory=dict)
    # plain data for JSON: what scoring compares with
    files: Mapping[str, bytes] = field(default_factory=dict)
    # made media: path below the output folder to content

    def __post_init__(self) -> None:
        roles = [message["role"] for message in self.messages]
        if "user" not in roles or roles[-1] != "assistant":
            raise ValueError(f"a made sample needs a question and ends with what is learnt, got the roles {roles}")


class Recipe(Protocol):
    """A way to make samples, as a list of jobs that do not depend on one another."""

    @property
    def name(self) -> str:
        """As the command line calls it."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What decides what a job makes, as plain data; jobs that were done under other settings cannot be gone on with."""
        ...

    def jobs(self) -> Sequence[str]:
        """A name for each job, none twice, the same in every run."""
        ...

    def make(self, job: str) -> list[MadeSample]:
        """The samples of a job; none where its medium gives nothing of this kind.

        Raises:
            InputError: the medium cannot be used.
            CaptionerError: the captioner does not answer.
        """
        ...


def job_rng(seed: int, job: str) -> np.random.Generator:
    """Chance that depends on the seed and the job's name alone, not on what was made before."""
    return np.random.default_rng([seed, zlib.crc32(job.encode())])


def pick(rng: np.random.Generator, choices: Sequence[Any]) -> Any:
    """One of several, each as likely."""
    return choices[int(rng.integers(len(choices)))]


def video_part(path: Path, start_seconds: float | None = None, end_seconds: float | None = None) -> Message:
    """A video, or a part of it, within a message."""
    part: Message = {"type": "video", "video": path}
    if start_seconds is not None:
        part["start_seconds"] = start_seconds
    if end_seconds is not None:
        part["end_seconds"] = end_seconds
    return part


def image_part(image: Path | str) -> Message:
    """A picture within a message: a file that is there, or the name of one in a sample's `files`."""
    return {"type": "image", "image": image}


def text_part(text: str) -> Message:
    """Words within a message."""
    return {"type": "text", "text": text}


def user(*parts: Message) -> Message:
    """A turn of the user."""
    return {"role": "user", "content": list(parts)}


def assistant(text: str) -> Message:
    """A turn of the assistant, which is learnt."""
    return {"role": "assistant", "content": text}
