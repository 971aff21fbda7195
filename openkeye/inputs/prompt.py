"""`Prompt`: tokens and positions of a chat, and the media in it, whose pixels may be still to come."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from openkeye.inputs.model_input import ModelInput
from openkeye.inputs.video import Frames, VideoRequest

Medium = np.ndarray | Frames | VideoRequest
# A still image as [H, W, 3] uint8; frames at hand; a video file that is scanned and not decoded.


@dataclass(frozen=True)
class Picture:
    """A run of pads in the prompt that one still image or one frame fills."""

    number: int
    # among all pictures of the prompt
    first_token: int
    num_tokens: int
    is_frame: bool
    # of a video; otherwise a still image

    @property
    def end_token(self) -> int:
        """Index of the first token behind it."""
        return self.first_token + self.num_tokens


@dataclass(frozen=True)
class Prompt:
    """A prompt whose tokens are all known. Its `model_input` holds no patches: pixels come from the media."""

    model_input: ModelInput
    text: str
    # as the template wrote it, one placeholder per picture or video
    media: Sequence[Medium]
    # in the order of the prompt
    pictures: Sequence[Picture]
    # every still image and every frame, in the same order
    template_ids: Sequence[int] = ()
    # tokens of `text`

    @property
    def videos(self) -> list[Frames | VideoRequest]:
        """The media that are videos."""
        return [item for item in self.media if not isinstance(item, np.ndarray)]

    @property
    def frames(self) -> Frames | VideoRequest | None:
        """The first video, if there is one."""
        return next(iter(self.videos), None)

    @property
    def num_tokens(self) -> int:
        """Length of the prompt."""
        return self.model_input.num_tokens


@dataclass(frozen=True)
class EncodedPrompt(Prompt):
    """A prompt with every picture decoded, and its patches in `model_input`: ready for the plain model."""

    media_hashes: Sequence[str] = ()
    # one per picture: equal where the pixels are equal
    notes: list[str] = field(default_factory=list)
    # what a person may want to know about the videos


def picture_size(medium: Medium) -> tuple[int, int]:
    """(height, width) of a medium's pictures at the model's size."""
    if isinstance(medium, VideoRequest):
        return medium.plan.height, medium.plan.width
    if isinstance(medium, Frames):
        return medium.picture_size
    return int(medium.shape[0]), int(medium.shape[1])
