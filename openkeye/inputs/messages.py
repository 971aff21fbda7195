"""Chat messages as users write them, checked, with their media pulled out in order."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from openkeye.common.checks import InputError

ROLES = ("system", "user", "assistant", "tool", "developer")

VIDEO_OPTIONS = {
    "fps": float,
    "start_seconds": float,
    "end_seconds": float,
    "num_frames": int,
    "min_pixels": int,
    "max_pixels": int,
    "total_pixels": int,
    "min_frames": int,
    "max_frames": int,
    "adaptive": str,
}
IMAGE_OPTIONS = {"min_pixels": int, "max_pixels": int}
SYNONYMS = {
    "start": "start_seconds",
    "end": "end_seconds",
    "video_start": "start_seconds",
    "video_end": "end_seconds",
    "nframes": "num_frames",
    "video_total_pixels": "total_pixels",
}
# Names of the same options in the chat formats of related models.


@dataclass(frozen=True)
class MediaPart:
    """One picture or video of a message."""

    kind: str
    # "image" or "video"
    content: Any
    # a path, URL, bytes, PIL image; for videos also a scan or frames that are already there
    options: dict[str, Any] = field(default_factory=dict)


def split_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[MediaPart]]:
    """(messages for the template, media in the order of the prompt).

    Contents are strings or lists of parts: {"type": "text", "text"}, {"type": "image", "image"} or {"type": "image_url",
    "image_url": {"url"}}, and the same for videos; options stand in the part, in its url table, or in `preprocess_kwargs`.
    Neighbouring texts are joined, so that a template never joins them into something that nobody wrote.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InputError(f"messages: expected a list of at least one message, got {messages!r:.80}")
    media: list[MediaPart] = []
    plain = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise InputError(f"message {number}: expected a table with a role of {', '.join(ROLES)}, got {message!r:.80}")
        content = message.get("content")
        if content is None:
            content = ""
        if not isinstance(content, str):
            parts = _split_parts(content, number, media)
            # Templates of text models know strings only.
            content = parts if any(part["type"] != "text" for part in parts) else "".join(part["text"] for part in parts)
        plain.append({**message, "content": content})
    return plain, media


def _split_parts(parts: Any, number: int, media: list[MediaPart]) -> list[dict[str, Any]]:
    if not isinstance(parts, (list, tuple)):
        raise InputError(f"message {number}: content is {parts!r:.80}; give a string or a list of parts")
    plain: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            if plain and plain[-1]["type"] == "text":
                plain[-1]["text"] += part["text"]
            else:
                plain.append({"type": "text", "text": part["text"]})
        elif kind in ("image", "image_url", "video", "video_url"):
            media.append(_media_part(part, kind, number))
            plain.append({"type": media[-1].kind})
        else:
            raise InputError(f"message {number}: part {part!r:.80}; expected type text, image, image_url, video or video_url")
    return plain


def _media_part(part: Mapping[str, Any], kind: str, number: int) -> MediaPart:
    content = part.get(kind)
    options = {key: value for key, value in part.items() if key not in ("type", kind, "preprocess_kwargs")}
    options |= part.get("preprocess_kwargs") or {}
    if isinstance(content, Mapping):
        options |= {key: value for key, value in content.items() if key not in ("url", "detail", "preprocess_kwargs")}
        options |= content.get("preprocess_kwargs") or {}
        content = content.get("url")
    if content is None:
        raise InputError(f"message {number}: a part of type {kind} without {kind}; give a path, a data URL or the content")
    kind = kind.removesuffix("_url")
    known: Mapping[str, Any] = VIDEO_OPTIONS if kind == "video" else IMAGE_OPTIONS
    return MediaPart(kind, content, checked_options(options, known, kind))


def checked_options(options: Mapping[str, Any], known: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Options under their own names and of their types (VIDEO_OPTIONS or IMAGE_OPTIONS); InputError for any other."""
    checked = {}
    for key, value in options.items():
        name = SYNONYMS.get(key, key)
        if name not in known:
            raise InputError(f"{kind} option {key!r} is unknown; choose from {', '.join(known)}")
        if value is None:
            continue
        try:
            checked[name] = known[name](value)
        except (TypeError, ValueError) as error:
            raise InputError(f"{kind} option {key} is {value!r}; expected {known[name].__name__}") from error
        if isinstance(checked[name], float) and not math.isfinite(checked[name]):
            raise InputError(f"{kind} option {key} is {value!r}; expected a finite number")
        if not isinstance(checked[name], str) and checked[name] < 0:
            raise InputError(f"{kind} option {key} is {value!r}; give a number from 0 on")
    return checked
