"""`Sample`: one training example as people write it, chat messages with media; and what a source of them is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from openkeye.common.checks import InputError
from openkeye.data.document import Document


class UnfitError(InputError):
    """Nothing is wrong with a sample, but it is longer than the stage takes."""


@dataclass(frozen=True)
class Sample:
    """Messages with text, pictures, videos, reasoning and tool calls, of which the assistant's are learnt; or plain text."""

    name: str
    # where it comes from ("clips.jsonl:17"), for reports about it
    messages: Sequence[Mapping[str, Any]] = ()
    # see `openkeye.inputs.messages`; an assistant's message with "learn": False is read and not learnt
    branches: Sequence[Sequence[Mapping[str, Any]]] = ()
    # conversations that each go on from `messages` and never see one another: many questions about one video, read once;
    # where both are the user's, a branch's first message is the rest of the last of `messages`: the video, then the question
    tools: Sequence[Mapping[str, Any]] = ()
    task: str = ""
    # under which losses and scores are told apart
    video_options: Mapping[str, Any] = field(default_factory=dict)
    # limits of its videos that differ from the stage's (`inputs.messages.VIDEO_OPTIONS`)
    last_told_seconds: float = 0.0
    # the answers speak of the videos up to there; a stage that cuts them earlier refuses the sample
    text: str = ""
    # instead of messages: read without a template, every token learnt, cut at the stage's context

    def __post_init__(self) -> None:
        if bool(self.messages) == bool(self.text):
            raise ValueError(f"{self.name}: a sample needs at least one message, or text and no message")
        if self.text and self.branches:
            raise ValueError(f"{self.name}: plain text has no branches")


class Source(Protocol):
    """Samples by number: the same number gives the same sample on every rank and in every run."""

    @property
    def num_samples(self) -> int | None:
        """None for a source without end."""
        ...

    def read(self, index: int) -> Sample | Document:
        """The sample of a number from 0 on; a source may hand out finished documents.

        Raises:
            InputError: the sample cannot be used; the message names it. The loader counts it and goes on.
        """
        ...
