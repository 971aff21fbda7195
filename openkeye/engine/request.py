"""One prompt on its way through the engine."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from openkeye.engine.config import SamplingParameters
from openkeye.engine.events import TokenEvent
from openkeye.engine.evidence import EvidenceCounts
from openkeye.engine.recorded_answer import RecordedAnswer, uniform_at
from openkeye.engine.text_stream import TextStream
from openkeye.inputs.media_stream import MediaStream
from openkeye.inputs.prompt import Picture, Prompt
from openkeye.inputs.video import Progress

STAGES = ("decode_video", "encode_vision", "prefill", "generate")
FIRST_ANSWER_CONTENT = 1 << 40
# Added to the ids behind the prompt where they name pages: their keys may be made otherwise than a prompt's (one by one), and
# they are never a picture's pads.


@dataclass(eq=False)
class Request:
    """Prompt, pages and answer of one generation."""

    prompt: Prompt
    sampling: SamplingParameters
    stop_ids: frozenset[int]
    stream: TextStream | None = None
    # None where nobody reads the text: then no stop string ends it
    on_token: Callable[[TokenEvent], None] | None = None
    on_prefill: Callable[[int, int], None] | None = None
    # called with (prompt tokens done, prompt tokens in all)
    on_decoded: Progress | None = None
    # called on a decoding thread with (video frames done, in all); what it raises ends the decoding
    evidence: EvidenceCounts | None = None
    # what its answer rests on, where that is asked for
    given_ids: Sequence[int] = ()
    # tokens behind the prompt that are known already: earlier turns, or the beginning of an answer that goes on here
    record: RecordedAnswer | None = None
    # of a policy's rollout; its draws depend on seed and place alone
    waits_for_prefix: bool = False
    # whether it begins no page that another is just computing: members of a group read their prompt once
    keeps_answer: bool = False
    # whether the pages behind the prompt too are kept for whoever goes on from there
    media: MediaStream = field(init=False)
    content: np.ndarray = field(init=False)
    # [T] int64 by which equal prefixes are found; of pictures from the moment on at which they arrive
    pages: list[int] = field(default_factory=list)
    num_promised_pages: int = 0
    # that are its own as soon as its tokens need them
    page_keys: list[bytes] = field(default_factory=list)
    # of the pages whose pictures have arrived
    has_stale_keys: bool = False
    # Its pages hold keys of older weights than those that run now: nobody else may have them.
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
        self.output_ids = list(self.given_ids)
        self.media = MediaStream(self.prompt.media, self.on_decoded)
        self.content = self.input_ids.numpy().copy()
        self._num_arrived = self._num_named = 0
        # pictures that the scheduler knows to be there, and those whose content is in `content`
        self.take_arrived()

    @property
    def input_ids(self) -> Tensor:
        return self.prompt.model_input.input_ids

    @property
    def num_prompt(self) -> int:
        return self.prompt.num_tokens

    @property
    def pictures(self) -> Sequence[Picture]:
        """The runs of pads in the prompt."""
        return self.prompt.pictures

    @property
    def num_ready(self) -> int:
        """Known tokens, at the last `take_arrived`, before the first picture that is still to be decoded."""
        is_whole = self._num_arrived == len(self.pictures)
        return self.num_known if is_whole else self.pictures[self._num_arrived].first_token

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
        return self.num_prompt + len(self.given_ids) + self.sampling.max_new_tokens

    @property
    def num_new(self) -> int:
        """Tokens of the answer that were sampled here and can be read."""
        return len(self.output_ids) - len(self.given_ids)

    @property
    def num_nameable(self) -> int:
        """Known tokens whose pages may serve others."""
        return self.num_known if self.keeps_answer else self.num_prompt

    @property
    def draw(self) -> torch.Generator | float:
        """What chooses the next token."""
        return self.generator if self.record is None else uniform_at(self.sampling.seed, len(self.output_ids))

    def nameable_content(self) -> np.ndarray:
        """[T] int64: of the tokens, from the first on, that pages are named by and that are known now."""
        num_ready = min(self.num_ready, self.num_nameable)
        if num_ready <= self.num_prompt:
            return self.content[:num_ready]
        behind = np.array(self.output_ids[: num_ready - self.num_prompt], dtype=np.int64)
        return np.concatenate([self.content, FIRST_ANSWER_CONTENT + behind])

    def take_arrived(self) -> None:
        """See which pictures have arrived by now, and give them their place in `content`."""
        self._num_arrived = self.media.num_arrived
        for picture in self.pictures[self._num_named : self._num_arrived]:
            content_hash = self.media.hashes[picture.number]
            assert content_hash is not None, "what has arrived has a hash"
            first = int.from_bytes(bytes.fromhex(content_hash)[:7], "big")
            # Negative numbers are no token ids.
            self.content[picture.first_token : picture.end_token] = -first - np.arange(picture.num_tokens)
        self._num_named = max(self._num_named, self._num_arrived)

    def first_picture_from(self, token: int) -> int:
        """Number of the first picture that ends behind a token of the prompt."""
        return bisect_right(self.pictures, token, key=lambda picture: picture.end_token)

    def add_output(self, token: int, logprob: float | None = None, top_logprobs: Sequence[tuple[int, float]] = ()) -> None:
        """Take the next token of the answer, see whether it is the last, and tell of it."""
        if token in self.stop_ids:
            self.finish("stop")
            return
        self.output_ids.append(token)
        text = "" if self.stream is None else self.stream.push(token)
        if self.stream is not None and self.stream.is_stopped:
            self.finish("stop")
        elif self.num_new >= self.sampling.max_new_tokens:
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
