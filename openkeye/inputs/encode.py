"""The whole walk from chat messages to `ModelInput`: media are sized first, counted, and only then decoded.

`lay_out` stops before the decoding of videos, all of whose tokens are known by then; `encode` decodes them too.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from openkeye.common.checks import InputError
from openkeye.inputs.image import bytes_of_data_url, image_pixels, image_size, local_path, open_image, source_of, stated_size
from openkeye.inputs.messages import MediaPart, split_messages
from openkeye.inputs.model_input import ModelInput
from openkeye.inputs.patches import join_patches, patches_from_pixels
from openkeye.inputs.picture_hash import picture_hash
from openkeye.inputs.positions import position_ids
from openkeye.inputs.processor import Processor
from openkeye.inputs.prompt import EncodedPrompt, Medium, Picture, Prompt, picture_size
from openkeye.inputs.sampling import ImageLimits, VideoLimits, plan_video
from openkeye.inputs.video import Frames, Progress, VideoRequest, read_request, request_video
from openkeye.inputs.video_scan import VideoScan, scan_video


@dataclass(frozen=True)
class SizedImage:
    """A still image whose size is known from its header."""

    image: str | Path | bytes | PIL.Image.Image
    limits: ImageLimits
    height: int
    width: int
    # at which the model sees it, unless EXIF exchanges both

    def pixels(self) -> np.ndarray:
        """[H, W, 3] uint8"""
        image = open_image(self.image)
        return image_pixels(image, *image_size(image.height, image.width, self.limits, source_of(self.image)))


SizedMedia = SizedImage | VideoRequest | Frames
# Media whose token count is known; only Frames are decoded already.


def lay_out(
    messages: Sequence[Mapping[str, Any]],
    processor: Processor,
    video_limits: VideoLimits | None = None,
    num_reserved_tokens: int = 0,
    max_tokens: int | None = None,
    add_generation_prompt: bool = True,
    **template_options: Any,
) -> Prompt:
    """Turn chat messages with pictures and videos into tokens, positions and media, of which video files are not decoded.

    `messages`: see `openkeye.inputs.messages`; a video may also be `Frames` or a `VideoScan` already at hand.
    `num_reserved_tokens`: room kept for the answer in `max_tokens` (default: the checkpoint's context length; a number below it
    is what the engine's cache holds).
    Raises InputError for unreadable media and, before any picture or video is decoded, for prompts past that.
    """
    plain_messages, parts = split_messages(messages)
    if parts and processor.is_text_only:
        raise InputError(
            f"{processor.model_dir} is a text model, which sees no pictures or videos; leave them out of the messages"
        )
    limits = replace(video_limits or processor.video_limits, factor=processor.image_limits.factor)
    sized = size_media(parts, processor, limits)
    pieces = processor.template.render(plain_messages, add_generation_prompt, **template_options)
    template_ids = [
        token
        for text, is_prose in pieces
        for token in (processor.encode_text(text) if is_prose else processor.tokenizer.encode_template(text))
    ]
    check_placeholders(template_ids, parts, processor)
    expected = sum(num_tokens_of(item, processor) for item in sized) + len(template_ids) - len(sized)
    _check_length(expected, num_reserved_tokens, max_tokens, sized, processor)
    media = [item.pixels() if isinstance(item, SizedImage) else item for item in sized]
    return assemble(template_ids, media, processor, "".join(text for text, _ in pieces))


def encode(
    messages: Sequence[Mapping[str, Any]], processor: Processor, on_progress: Progress | None = None, **options: Any
) -> EncodedPrompt:
    """Turn chat messages with pictures and videos into tokens, positions and patches, all of them in memory.

    `options`: those of `lay_out`. Frames that cannot be decoded are left out, and a note says so.
    Raises InputError for unreadable media and, before any video is decoded, for prompts past the context.
    """
    prompt = lay_out(messages, processor, **options)
    media = list(_decode(prompt.media, on_progress))
    if any(isinstance(item, VideoRequest) for item in prompt.media):
        # Where frames are missing, so are their tokens.
        prompt = assemble(prompt.template_ids, media, processor, prompt.text)
    pixels = [item.pixels if isinstance(item, Frames) else item[None] for item in media]
    patches = [patches_from_pixels(pixels_NHWC, processor.patch_size) for pixels_NHWC in pixels]
    kinds = [(isinstance(item, Frames), part) for item, part in zip(media, patches, strict=True)]
    image_patches, video_patches = (
        join_patches([part for is_video, part in kinds if is_video is kind]) for kind in (False, True)
    )
    videos = [item for item in media if isinstance(item, Frames)]
    return EncodedPrompt(
        **vars(prompt) | {"model_input": replace(prompt.model_input, image_patches=image_patches, video_patches=video_patches)},
        media_hashes=tuple(picture_hash(picture) for pixels_NHWC in pixels for picture in pixels_NHWC),
        notes=[f"{video.source}: {note}" for video in videos for note in video.notes],
    )


def size_media(parts: Sequence[MediaPart], processor: Processor, video_limits: VideoLimits) -> list[SizedMedia]:
    """Sizes and frame times of media, which share the budget of `video_limits`; nothing but lists of pictures is decoded.

    Raises:
        InputError: a medium that cannot be read.
    """
    num_videos = sum(part.kind == "video" for part in parts)
    sized: list[SizedMedia] = []
    for part in parts:
        if part.kind == "image":
            limits = _image_limits(processor.image_limits, part.options)
            sized.append(
                SizedImage(part.content, limits, *image_size(*stated_size(part.content), limits, source_of(part.content)))
            )
        else:
            sized.append(_size_video(part, video_limits, num_videos))
    return sized


def _image_limits(limits: ImageLimits, options: Mapping[str, Any]) -> ImageLimits:
    """The limits of one picture: a request's own ones count for it alone."""
    low, high = options.get("min_pixels"), options.get("max_pixels")
    if high is not None and low is None:
        low = min(limits.min_pixels, high)
    if low is not None and high is None:
        high = max(limits.max_pixels, low)
    return replace(limits, min_pixels=low or limits.min_pixels, max_pixels=high or limits.max_pixels)


def _size_video(part: MediaPart, limits: VideoLimits, num_videos: int) -> VideoRequest | Frames:
    content = part.content
    if isinstance(content, Frames):
        height, width = content.picture_size
        if height % limits.factor or width % limits.factor:
            raise InputError(f"{content.source}: frames of {width}x{height}; both sides must be multiples of {limits.factor}")
        return content
    limits = _video_limits(limits, part.options)
    if isinstance(content, (list, tuple)):
        return _frames_of_pictures(content, part.options.get("fps"), limits, num_videos)
    if isinstance(content, VideoScan):
        scan = content
    elif isinstance(content, str) and content.startswith("data:"):
        scan = scan_video(bytes_of_data_url(content, "video data URL"), "video data URL")
    elif isinstance(content, bytes):
        scan = scan_video(content, "video bytes")
    elif isinstance(content, (str, Path)):
        scan = scan_video(local_path(content))
    else:
        raise InputError(f"a video given as {type(content).__name__}; give a path, a data URL, bytes or a list of pictures")
    return request_video(scan, limits, num_videos, part.options.get("start_seconds"), part.options.get("end_seconds"))


def _video_limits(limits: VideoLimits, options: Mapping[str, Any]) -> VideoLimits:
    """The limits of one video; a request's least size may only raise the checkpoint's (spec: 4.3)."""
    area = limits.factor * limits.factor
    tokens = {
        name: options[key] // area
        for name, key in (("max_tokens_per_frame", "max_pixels"), ("total_tokens", "total_pixels"))
        if key in options
    }
    if "min_pixels" in options:
        tokens["min_tokens_per_frame"] = max(limits.min_tokens_per_frame, options["min_pixels"] // area)
    same_names = ("fps", "num_frames", "min_frames", "max_frames", "adaptive")
    return limits.changed(**tokens, **{name: options[name] for name in same_names if name in options})


def _frames_of_pictures(pictures: Sequence[Any], fps: float | None, limits: VideoLimits, num_videos: int) -> Frames:
    """A video given as pictures `1 / fps` seconds apart (default: the sampling rate); all take the first one's size."""
    if not pictures:
        raise InputError("a video given as an empty list; give at least one picture")
    fps = fps or limits.fps
    first = open_image(pictures[0])
    plan = plan_video(first.height, first.width, len(pictures), fps, limits, num_videos, "list of pictures")
    pixels = np.stack([image_pixels(open_image(pictures[index]), plan.height, plan.width) for index in plan.frame_indices])
    times = [round(index / fps, 6) for index in plan.frame_indices.tolist()]
    return Frames(pixels, times, "list of pictures", len(pictures) / fps)


def check_placeholders(template_ids: Sequence[int], parts: Sequence[MediaPart], processor: Processor) -> None:
    """InputError unless the template placed as many pictures and videos as the messages hold."""
    for kind, token in (("image", processor.image_token_id), ("video", processor.video_token_id)):
        num_given, num_placed = sum(part.kind == kind for part in parts), template_ids.count(token)
        if num_given != num_placed:
            raise InputError(
                f"{processor.model_dir}: its chat template places {num_placed} {kind}s where the messages hold {num_given}; "
                "use a multimodal chat template"
            )


def num_tokens_of(item: SizedMedia, processor: Processor) -> int:
    """Tokens that stand for one medium, before it is decoded."""
    area = processor.image_limits.factor**2
    if isinstance(item, SizedImage):
        return item.height * item.width // area
    if isinstance(item, Frames):
        height, width = item.picture_size
        tokens_per_frame = height * width // area
    else:
        tokens_per_frame = item.plan.tokens_per_frame
    return sum(len(processor.encode_frame_text(seconds)) + tokens_per_frame for seconds in item.times_seconds)


def _check_length(
    num_tokens: int, num_reserved: int, max_tokens: int | None, media: list[SizedMedia], processor: Processor
) -> None:
    what = "the context" if max_tokens in (None, processor.max_tokens) else "the engine's cache"
    max_tokens = max_tokens or processor.max_tokens
    if max_tokens is None or num_tokens + num_reserved <= max_tokens:
        return
    num_media = sum(num_tokens_of(item, processor) for item in media)
    mend = "shorten the text"
    if num_tokens <= max_tokens < 2 * num_reserved:
        mend = f"ask for at most {max_tokens - num_tokens:,} tokens of answer"
    elif num_media > num_tokens / 2:
        mend = "take fewer frames (a lower fps) or a shorter part (start, end)"
    raise InputError(
        f"the prompt has {num_tokens:,} tokens ({num_media:,} of pictures) and the answer may take {num_reserved:,}; "
        f"{what} holds {max_tokens:,}: {mend}"
    )


def _decode(media: Sequence[Medium], on_progress: Progress | None) -> Iterator[np.ndarray | Frames]:
    """Pixels of each medium in order: [H, W, 3] for a picture, `Frames` for a video."""
    num_frames = sum(len(item.frame_numbers) for item in media if isinstance(item, VideoRequest))
    num_done = 0
    for item in media:
        if not isinstance(item, VideoRequest):
            yield item
        else:
            before = num_done
            report = None if on_progress is None else (lambda done, _, before=before: on_progress(before + done, num_frames))
            yield read_request(item, report)
            num_done += len(item.frame_numbers)


def assemble(template_ids: Sequence[int], media: Sequence[Medium], processor: Processor, text: str) -> Prompt:
    """Put every medium's tokens in its placeholder's place. `text`: what the ids were made of."""
    ids: list[int] = []
    pictures: list[Picture] = []
    grids: dict[bool, list[tuple[int, int, int]]] = {False: [], True: []}
    remaining = iter(media)
    for token in template_ids:
        if token not in (processor.image_token_id, processor.video_token_id):
            ids.append(token)
            continue
        item = next(remaining)
        texts = [[]] if isinstance(item, np.ndarray) else [processor.encode_frame_text(time) for time in item.times_seconds]
        is_frame = not isinstance(item, np.ndarray)
        height, width = picture_size(item)
        grid = (1, height // processor.patch_size, width // processor.patch_size)
        num_pads = grid[1] * grid[2] // processor.merge_size**2
        for frame_text in texts:
            ids += frame_text
            pictures.append(Picture(len(pictures), len(ids), num_pads, is_frame))
            grids[is_frame].append(grid)
            ids += [token] * num_pads
    input_ids = torch.tensor(ids, dtype=torch.int64)
    positions = position_ids(
        input_ids,
        torch.tensor(grids[False], dtype=torch.int64) if grids[False] else None,
        torch.tensor(grids[True], dtype=torch.int64) if grids[True] else None,
        processor.image_token_id,
        processor.video_token_id,
        processor.merge_size,
    )
    return Prompt(ModelInput(input_ids, positions), text, tuple(media), tuple(pictures), tuple(template_ids))
