"""`to_document`: from a sample to the tokens, positions and pictures that answering would see, and the answers behind them.

Letters: L tokens of a document.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from openkeye.common.checks import InputError
from openkeye.data.document import Document, PixelPictures
from openkeye.data.sample import Sample, UnfitError
from openkeye.data.turns import TokenRun, TurnReader, joined, shared_length
from openkeye.inputs.encode import SizedImage, SizedMedia, assemble, check_placeholders, num_tokens_of, size_media
from openkeye.inputs.messages import VIDEO_OPTIONS, MediaPart, checked_options, split_messages
from openkeye.inputs.processor import Processor
from openkeye.inputs.prompt import Medium
from openkeye.inputs.video import DecodeHealth, Frames, VideoRequest, iterate_shown

FIELD_KINDS = {"reasoning_content": str, "tool_calls": list, "learn": bool}
# of a message, beside those that `inputs.messages` checks


@dataclass(frozen=True)
class DocumentLimits:
    """What a stage allows a document."""

    context: int
    # tokens
    max_clip_seconds: float | None = None
    # longer videos are cut to their beginning
    video_tokens: int | None = None
    # of all videos of a document together; None: the checkpoint's


@dataclass(frozen=True)
class Converter:
    """`to_document` for one checkpoint and one stage; it travels to other processes as a few words."""

    model_dir: str
    limits: DocumentLimits

    def __call__(self, sample: Sample) -> Document:
        """See `to_document`."""
        return to_document(sample, _processor(self.model_dir), self.limits)


@lru_cache(maxsize=2)
def _processor(model_dir: str) -> Processor:
    return Processor.load(model_dir)


def to_document(sample: Sample, processor: Processor, limits: DocumentLimits) -> Document:
    """The sample as the network reads it.

    Every learnt answer stands behind the tokens, at the positions, that answering the messages before it would see
    (`inputs.encode.lay_out`); all videos of a sample share one budget, also those of later turns. Learnt are the assistant's
    answers with their reasoning, tool calls and end token. Branches of the sample, and answers for which the template rewrites
    earlier turns, become branches of the document.

    Raises:
        InputError: nothing to learn, or media that cannot be read; the message begins with the sample's name.
        UnfitError: too many tokens, or answers about what the stage cuts away.
    """
    try:
        return _text_document(sample, processor, limits) if sample.text else _chat_document(sample, processor, limits)
    except InputError as error:
        raise type(error)(f"{sample.name}: {error}") from error


def _text_document(sample: Sample, processor: Processor, limits: DocumentLimits) -> Document:
    ids = torch.tensor(processor.encode_text(sample.text)[: limits.context], dtype=torch.int64)
    if len(ids) < 2:
        raise InputError("text of less than two tokens; there is nothing to predict")
    positions = torch.arange(len(ids)).expand(3, -1).contiguous()
    nothing = torch.zeros(len(ids), dtype=torch.bool)
    return Document(sample.name, ids, positions, ~nothing, nothing, task=sample.task)


def _chat_document(sample: Sample, processor: Processor, limits: DocumentLimits) -> Document:
    plain, parts = split_messages([_as_answering_takes_it(message) for message in _with_purpose(sample)])
    runs, length = _runs(sample, plain, processor)
    trunk = _trunk(runs, length, parts, processor)
    sized = _sized(sample, parts, processor, limits) if parts else []
    tails = [(run.ids[length:], run.is_learnt[length:]) for run in runs if any(run.is_learnt[length:])]
    media_tokens = [num_tokens_of(item, processor) for item in sized]
    num_tokens = length - len(sized) + sum(media_tokens) + sum(len(ids) for ids, _ in tails)
    _check_context(num_tokens, sum(media_tokens), limits)
    media: list[Medium] = [item.pixels() if isinstance(item, SizedImage) else item for item in sized]
    prompt = assemble(trunk.ids, media, processor, "")
    learnt = torch.tensor(trunk.is_learnt).repeat_interleave(_repeats(trunk.ids, media_tokens, processor))
    is_media = torch.zeros(prompt.num_tokens, dtype=torch.bool)
    for picture in prompt.pictures:
        is_media[picture.first_token : picture.end_token] = True
    ids, positions = [prompt.model_input.input_ids], [prompt.model_input.position_ids]
    next_position = int(positions[0].max()) + 1
    for tail, _ in tails:
        ids.append(torch.tensor(tail, dtype=torch.int64))
        positions.append((next_position + torch.arange(len(tail))).expand(3, -1))
    starts = np.cumsum([len(part) for part in ids])[:-1]
    num_behind = num_tokens - prompt.num_tokens
    return Document(
        name=sample.name,
        input_ids=torch.cat(ids),
        position_ids=torch.cat(positions, dim=1),
        is_learnt=torch.cat([learnt & ~is_media, *(torch.tensor(mask) for _, mask in tails)]),
        is_media=torch.cat([is_media, is_media.new_zeros(num_behind)]),
        pictures=(PixelPictures([pixels_of(item) for item in media], processor.patch_size),) if media else (),
        branches=tuple(starts.tolist()),
        task=sample.task,
    )


def _with_purpose(sample: Sample) -> Sequence[Mapping[str, Any]]:
    """The messages without those behind the last learnt answer, which nothing learnt would see."""
    messages = list(sample.messages)
    while messages and not sample.branches and not _is_learnt(messages[-1]):
        messages.pop()
    return messages or sample.messages


def _is_learnt(message: Any) -> bool:
    # What is no message is told so by `split_messages`.
    return not isinstance(message, Mapping) or (message.get("role") == "assistant" and message.get("learn") is not False)


def _as_answering_takes_it(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message as the server hands it to the template: no developers, calls as objects and not as JSON in a string."""
    if not isinstance(message, Mapping):
        return message
    for name, kind in FIELD_KINDS.items():
        if message.get(name) is not None and not isinstance(message[name], kind):
            raise InputError(f"{name} is {message[name]!r:.80}; expected {kind.__name__}")
    changed = {name: value for name, value in message.items() if name != "learn" or value is not None}
    if message.get("role") == "developer":
        changed["role"] = "system"
    if message.get("tool_calls"):
        changed["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    return changed


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f'tool call {call!r:.80}; expected {{"function": {{"name", "arguments"}}}}')
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise InputError(f"tool call: the arguments of {function['name']} are not JSON ({error}); mend them") from error
    return {**call, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _runs(sample: Sample, plain: list[dict[str, Any]], processor: Processor) -> tuple[list[TokenRun], int]:
    """All runs of the sample, and the tokens that they share."""
    reader = TurnReader(processor, sample.tools)
    runs = reader.learnt_runs(plain)
    for number, branch in enumerate(sample.branches):
        messages, parts = split_messages([_as_answering_takes_it(message) for message in branch])
        if parts:
            raise InputError(f"branch {number} holds a picture or a video; put all of them before the branches")
        own = reader.learnt_runs(*joined(plain, messages))
        if not own:
            raise InputError(f"branch {number} has no assistant's message to learn")
        runs += own
    if not runs:
        raise InputError("no assistant's message to learn; add one, or leave the sample out")
    length = shared_length(runs, [reader.ids_alone(plain)] if sample.branches else ())
    if length == 0:
        raise InputError("its conversations have no first token in common; make a sample of each")
    return runs, length


def _trunk(runs: Sequence[TokenRun], length: int, parts: Sequence[MediaPart], processor: Processor) -> TokenRun:
    """What all runs share; every medium has to stand there."""
    trunk = TokenRun(
        runs[0].ids[:length], [any(masks) for masks in zip(*(run.is_learnt[:length] for run in runs), strict=True)]
    )
    check_placeholders(max((run.ids for run in runs), key=len), parts, processor)
    if sum(token in (processor.image_token_id, processor.video_token_id) for token in trunk.ids) < len(parts):
        raise InputError(
            "the chat template rewrites earlier turns before a later picture or video, so that not all answers can be learnt "
            'in one document; mark the earlier answers with "learn": false, or make a sample of each'
        )
    return trunk


def _sized(sample: Sample, parts: Sequence[MediaPart], processor: Processor, limits: DocumentLimits) -> list[SizedMedia]:
    own = checked_options(sample.video_options, VIDEO_OPTIONS, "video")
    cut = [
        _cut(replace(part, options=own | part.options), limits, processor, sample.last_told_seconds)
        if part.kind == "video"
        else part
        for part in parts
    ]
    video_limits = processor.video_limits.changed(total_tokens=limits.video_tokens, factor=processor.image_limits.factor)
    return size_media(cut, processor, video_limits)


def _cut(part: MediaPart, limits: DocumentLimits, processor: Processor, last_told_seconds: float) -> MediaPart:
    """The beginning of a video, as long as the stage takes."""
    longest = limits.max_clip_seconds
    if longest is None:
        return part
    start = part.options.get("start_seconds", 0.0)
    if last_told_seconds > start + longest:
        raise UnfitError(
            f"its answers speak of the video up to {last_told_seconds:g} s, and the stage cuts it at {start + longest:g} s; "
            "raise max_clip_seconds, or give shorter videos"
        )
    content = part.content
    if isinstance(content, Frames):
        return replace(part, content=content.until(longest))
    if isinstance(content, (list, tuple)):
        num_kept = int(longest * (part.options.get("fps") or processor.video_limits.fps)) + 1
        return replace(part, content=content[:num_kept])
    end = min(part.options.get("end_seconds", start + longest), start + longest)
    return replace(part, options=part.options | {"end_seconds": end})


def _check_context(num_tokens: int, num_media: int, limits: DocumentLimits) -> None:
    if num_tokens <= limits.context:
        return
    mend = "shorten its text"
    if num_media > num_tokens / 2:
        mend = "lower video_tokens or max_clip_seconds, or give its videos a lower fps"
    pictures = f" ({num_media:,} of pictures)" if num_media else ""
    raise UnfitError(f"{num_tokens:,} tokens{pictures}; the context holds {limits.context:,}: {mend}, or raise it")


def _repeats(template_ids: Sequence[int], media_tokens: Sequence[int], processor: Processor) -> torch.Tensor:
    """How many tokens each template token becomes."""
    repeats = torch.ones(len(template_ids), dtype=torch.int64)
    pads = [n for n, token in enumerate(template_ids) if token in (processor.image_token_id, processor.video_token_id)]
    repeats[pads] = torch.tensor(media_tokens, dtype=torch.int64)
    return repeats


def pixels_of(medium: Medium) -> np.ndarray:
    """[N, H, W, 3] uint8. A frame that cannot be decoded is the one before it, as in answering."""
    if isinstance(medium, VideoRequest):
        pixels = np.empty((len(medium.frame_numbers), medium.plan.height, medium.plan.width, 3), dtype=np.uint8)
        with closing(iterate_shown(medium, DecodeHealth())) as pictures:
            for number, picture in enumerate(pictures):
                pixels[number] = picture
        return pixels
    return medium.pixels if isinstance(medium, Frames) else medium[None]
