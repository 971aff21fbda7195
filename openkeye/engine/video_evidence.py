"""What is told of the evidence of an answer: records without tensors, which a process that holds no model reads too."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Moment:
    """One frame of a video in the evidence of an answer."""

    seconds: float
    # when the frame is shown
    start_seconds: float
    end_seconds: float
    # what it stands for: halfway to its neighbours
    num_tokens: int
    # of its picture and of the time text before it
    count: int
    # how often one of them was picked, over all layers and tokens of the answer
    share: float
    # of the times that they might have been: 1 where all were picked always
    weight: float
    # part of all attention that fell on them, the mean over heads, layers and tokens of the answer


@dataclass(frozen=True)
class VideoEvidence:
    """One video of the prompt."""

    video: int
    # its number among the videos of the prompt, from 0 on
    is_selective: bool
    # False where every token saw so few others that all of them were picked: then all shares are 1 and only weights tell
    share: float
    # of the video's tokens together: what a frame would have if picks were spread evenly
    weight: float
    # part of all attention that fell on the video
    moments: list[Moment]
    # in the order of time

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, rounded: seconds to 3 digits, shares and weights to 6."""
        return _rounded(asdict(self))


def _rounded(record: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, float):
            value = round(value, 3 if name.endswith("seconds") else 6)
        plain[name] = [_rounded(item) for item in value] if isinstance(value, list) else value
    return plain
