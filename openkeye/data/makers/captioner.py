"""`Captioner`: whoever says in words what media show. It is a model by name, never a text of ours."""

from collections.abc import Sequence
from typing import Protocol

from openkeye.common.checks import InputError
from openkeye.data.makers.made_sample import Message


class CaptionerError(Exception):
    """The captioner does not answer any more: not the fault of one medium, so the run ends. One line with the mend."""


class Captioner(Protocol):
    """Answers chat messages with media; called from several threads at once."""

    @property
    def name(self) -> str:
        """Which model it is: two captioners of one name say the same."""
        ...

    def caption(self, messages: Sequence[Message]) -> str:
        """The answer, as it was said.

        Raises:
            InputError: this medium cannot be captioned: unreadable, too large, or refused.
            CaptionerError: nothing can be captioned.
        """
        ...

    def stop(self) -> None:
        """From now on nothing is asked, waited for or tried again: whoever calls `caption` gets a CaptionerError."""
        ...


def ask_captioner(captioner: Captioner, messages: Sequence[Message], about: str) -> str:
    """An answer that says something, without the reasoning before it; `about` names the medium in errors.

    Raises:
        InputError: the captioner said nothing.
        CaptionerError: see `Captioner.caption`.
    """
    text = captioner.caption(messages).rpartition("</think>")[2].strip()
    if not text or text.startswith("<think>"):
        raise InputError(f"{about}: the captioner {captioner.name} said nothing about it; try another --captioner")
    return text
