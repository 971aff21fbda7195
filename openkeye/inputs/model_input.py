"""`ModelInput`: everything the network needs for one prompt, and nothing else."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from openkeye.inputs.patches import Patches


@dataclass(frozen=True)
class ModelInput:
    """One prompt as tensors. Media appear in `input_ids` as runs of pad tokens, in the order of their patches."""

    input_ids: Tensor
    # [T] int64
    position_ids: Tensor
    # [3, T] int64: time, height, width (spec: 3.6)
    image_patches: Patches | None = None
    video_patches: Patches | None = None
    # one grid row per frame

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 1 or tuple(self.position_ids.shape) != (3, self.input_ids.shape[0]):
            raise ValueError(
                f"ModelInput needs input_ids [T] and position_ids [3, T], got "
                f"{tuple(self.input_ids.shape)} and {tuple(self.position_ids.shape)}"
            )

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @cached_property
    def rope_delta(self) -> int:
        """Position of the next token minus its index: max position + 1 - T (zero or negative)."""
        return int(self.position_ids.max()) + 1 - self.num_tokens
