"""`Task`: examples by number, how they are asked, and how an answer is scored; the same for training and evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from openkeye.agents.environment import Environment
from openkeye.agents.model_client import Message

MODALITIES = ("text", "image", "video")


@dataclass(frozen=True)
class Example:
    """One question. The same task and number give the same example in every process, so that only ids travel."""

    task: str
    # name of its task, the label by which teachers are chosen
    number: int
    modality: str
    # of MODALITIES
    messages: tuple[Message, ...]
    # may hold pictures and `Frames` themselves (`openkeye.inputs.messages`)
    tools: tuple[Mapping[str, Any], ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    # what scoring needs to know: truth, reference solution, tolerances; plain values
    environment: Environment | None = None
    # the world of an agent's episode, which then gives the messages; None where one answer ends it

    def __post_init__(self) -> None:
        if self.modality not in MODALITIES:
            raise ValueError(f"{self.task}: modality is {self.modality!r}; give one of {', '.join(MODALITIES)}")
        if bool(self.messages) == (self.environment is not None):
            raise ValueError(f"{self.task}: an example has messages, or an environment that gives them")

    @property
    def name(self) -> str:
        return f"{self.task}:{self.number}"


@dataclass(frozen=True)
class Response:
    """What a model said to an example: its last message, and how it came about."""

    text: str
    reasoning: str = ""
    finish_reason: str = "stop"
    # "stop" or "length"
    num_tokens: int = 0
    transcript: Sequence[Message] = ()
    # of an episode, everything behind its opening


class Task(Protocol):
    """Questions of one kind."""

    @property
    def name(self) -> str: ...

    @property
    def num_examples(self) -> int | None:
        """None for a task without end."""
        ...

    def read(self, number: int) -> Example:
        """The example of a number from 0 on."""
        ...

    async def score(self, example: Example, response: Response) -> Mapping[str, float]:
        """Rewards by name; a pure function of its arguments (and of the named judges it was made with), limited in time.

        "outcome" is among them, from 0 to 1. Answers that cannot be read score 0, they never raise.
        """
        ...
