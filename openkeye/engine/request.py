"""One prompt on its way through the engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from openkeye.engine.config import SamplingParameters
from openkeye.engine.events import TokenEvent
from openkeye.engine.evidence import EvidenceCounts
from openkeye.engine.text_stream import TextStream
from openkeye.inputs.encode import EncodedPrompt
from openkeye.inputs.patches import Patches

STAGES = ("decode_video", "encode_vision", "prefill", "generate")


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
    stream: TextStream | None = None
    # None where nobody reads the text: then no stop string ends it
    on_token: Callable[[TokenEvent], None] | None = None
    on_prefill: Callable[[int, int], None] | None = None
    # called with (prompt tokens done, prompt tokens in all)
    evidence: EvidenceCounts | None = None
    # what its answer rests on, where that is asked for
    pictures: list[Picture] = field(init=False)
    content: np.ndarray = field(init=False)
    # [T] int64 by which equal prefixes are found
    pages: list[int] = field(default_factory=list)
    page_keys: list[bytes] = field(default_factory=list)
    num_computed: int = 0
    # tokens whose keys and values stand in the pages
    num_cached: int = 0
    # of these, found in the prefix cache when the request first ran
    num_preemptions: int = 0
    # how often its pages were taken away for older requests; its tokens are computed again then
    output_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    # "stop", "length", "cancelled" or "deadline"
    rest: str = ""
    # the end of the finished text that no token told, since it was held back
    stage_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    # what the batches took that it was part of

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
    def num_known(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return self.num_prompt + len(self.output_ids)

    @property
    def num_missing(self) -> int:
        """Known tokens whose keys and values are not in the pages."""
        return self.num_known - self.num_computed

    @property
    def is_answering(self) -> bool:
        """Whether its next token needs one more token computed, the last one of its answer."""
        return self.num_missing == 1 and bool(self.output_ids)

    @property
    def num_tokens_at_most(self) -> int:
        return self.num_prompt + self.sampling.max_new_tokens

    def patches(self, picture: Picture) -> Patches:
        """The patches of one picture's kind."""
        model_input = self.prompt.model_input
        patches = model_input.video_patches if picture.is_frame else model_input.image_patches
        assert patches is not None
        return patches

    def add_output(self, token: int, logprob: float | None = None, top_logprobs: Sequence[tuple[int, float]] = ()) -> None:
        """Take the next token of the answer, see whether it is the last, and tell of it."""
        if token in self.stop_ids:
            self.finish("stop")
            return
        self.output_ids.append(token)
        text = "" if self.stream is None else self.stream.push(token)
        if self.stream is not None and self.stream.is_stopped:
            self.finish("stop")
        elif len(self.output_ids) >= self.sampling.max_new_tokens:
            self.finish("length")
        if self.on_token is not None:
            self.on_token(TokenEvent(token, text, logprob, list(top_logprobs)))

    def finish(self, reason: str) -> None:
        """End the answer where it stands."""
        self.finish_reason = reason
        if self.stream is not None:
            self.rest = self.stream.finish()

    @property
    def text(self) -> str:
        """The answer's text; whole once it is finished."""
        return "" if self.stream is None else self.stream.text

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
