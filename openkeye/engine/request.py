"""One prompt on its way through the engine."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from openkeye.engine.config import SamplingParameters
from openkeye.inputs.encode import EncodedPrompt
from openkeye.inputs.patches import Patches


@dataclass(frozen=True)
class Picture:
    """A run of pads in the prompt that one picture or frame fills."""

    content_hash: str
    first_token: int
    num_tokens: int
    is_frame: bool
    # of a video; otherwise a still image
    number: int
    # among the patches of its kind


@dataclass(eq=False)
class Request:
    """Prompt, pages and answer of one generation."""

    prompt: EncodedPrompt
    sampling: SamplingParameters
    stop_ids: frozenset[int]
    image_token_id: int
    video_token_id: int
    merge_size: int
    on_token: Callable[[int], None] | None = None
    on_prefill: Callable[[int, int], None] | None = None
    # called with (prompt tokens done, prompt tokens in all)
    pictures: list[Picture] = field(init=False)
    content: np.ndarray = field(init=False)
    # [T] int64 by which equal prefixes are found
    pages: list[int] = field(default_factory=list)
    page_keys: list[bytes] = field(default_factory=list)
    num_computed: int = 0
    # tokens whose keys and values stand in the pages
    num_cached: int = 0
    # of these, found in the prefix cache
    output_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    # "stop" or "length"

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.sampling.seed)
        self.pictures = self._find_pictures()
        self.content = self.input_ids.numpy().copy()
        for picture in self.pictures:
            first = int.from_bytes(bytes.fromhex(picture.content_hash)[:7], "big")
            # Negative numbers are no token ids.
            self.content[picture.first_token : picture.first_token + picture.num_tokens] = -first - np.arange(
                picture.num_tokens
            )

    @property
    def input_ids(self) -> Tensor:
        return self.prompt.model_input.input_ids

    @property
    def num_prompt(self) -> int:
        return self.prompt.num_tokens

    @property
    def is_prefilled(self) -> bool:
        return self.num_computed >= self.num_prompt

    @property
    def num_tokens_at_most(self) -> int:
        return self.num_prompt + self.sampling.max_new_tokens

    def patches(self, picture: Picture) -> Patches:
        """The patches of one picture's kind."""
        model_input = self.prompt.model_input
        patches = model_input.video_patches if picture.is_frame else model_input.image_patches
        assert patches is not None
        return patches

    def add_output(self, token: int) -> None:
        """Take the next token of the answer and see whether it is the last."""
        if token in self.stop_ids:
            self.finish_reason = "stop"
            return
        self.output_ids.append(token)
        if len(self.output_ids) >= self.sampling.max_new_tokens:
            self.finish_reason = "length"
        if self.on_token is not None:
            self.on_token(token)

    def _find_pictures(self) -> list[Picture]:
        ids = self.input_ids.numpy()
        is_pad = (ids == self.image_token_id) | (ids == self.video_token_id)
        starts = np.flatnonzero(is_pad & ~np.concatenate([[False], is_pad[:-1]]))
        pictures: list[Picture] = []
        counts = {False: 0, True: 0}
        hashes = iter(self.prompt.media_hashes)
        model_input = self.prompt.model_input
        for start in starts.tolist():
            place = start
            # Pictures may follow one another with no text between; each takes as many pads as its grid asks for.
            while place < len(ids) and is_pad[place]:
                is_frame = bool(ids[place] == self.video_token_id)
                patches = model_input.video_patches if is_frame else model_input.image_patches
                assert patches is not None
                grid = patches.grid_thw[counts[is_frame]]
                size = int(grid.prod()) // self.merge_size**2
                pictures.append(Picture(next(hashes), place, size, is_frame, counts[is_frame]))
                counts[is_frame] += 1
                place += size
        return pictures
