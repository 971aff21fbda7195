"""From chat records as people write them to `Sample`: OpenAI parts, placeholders for lists of media, `from` and `value`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from openkeye.common.checks import InputError
from openkeye.data.sample import Sample
from openkeye.data.sources.files import FindMedia, read_json_text
from openkeye.inputs.messages import ROLES

RECORD_FIELDS = (
    "messages", "conversations", "branches", "text", "system", "tools", "images", "videos", "image", "video", "task",
    "video_options",
)  # fmt: skip
# what is read of a record; others are left alone

ROLE_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "tool_response": "tool",
}
CALL_ROLES = ("function_call", "tool_call")
# whose text is a call, or a list of calls, as JSON
SPEAKERS = (*ROLES, *ROLE_NAMES, *CALL_ROLES)

PLACEHOLDER = re.compile("<(image|video)>")


def sample_of_record(record: Any, where: str, find: FindMedia) -> Sample:
    """The sample that a record describes.

    `messages` with string contents or parts, or `conversations` of {"from", "value"}; media stand in parts, or in `images` and
    `videos` (`image`, `video`), one for each `<image>` and `<video>` that the messages before the answers hold, or all before
    the first question where they hold none. Without such lists, and in answers, `<image>` is prose. `text` alone is plain text.

    Raises:
        InputError: a record that makes no sense, or media that are not there; the message begins with `where`.
    """
    if not isinstance(record, Mapping):
        raise InputError(f"{where}: {record!r:.80}; expected an object with messages, conversations or text")
    turns = record.get("messages") or record.get("conversations")
    if not turns and isinstance(record.get("text"), str) and record["text"].strip():
        return Sample(where, text=record["text"], task=str(record.get("task") or ""))
    media = _Media(record, where, find)
    messages = [_message(turn, where) for turn in _list_of(turns, "messages", where)]
    if not messages:
        raise InputError(f"{where}: {', '.join(map(str, record)) or 'nothing'}; expected messages, conversations or text")
    if isinstance(record.get("system"), str) and record["system"] and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": record["system"]}, *messages]
    branches = [
        [media.with_files(_message(turn, where)) for turn in _list_of(branch, "branches", where)]
        for branch in _list_of(record.get("branches") or [], "branches", where)
    ]
    if not all(branches):
        raise InputError(f"{where}: a branch without messages; remove it")
    options = record.get("video_options") or {}
    if not isinstance(options, Mapping):
        raise InputError(f"{where}: video_options is {options!r:.80}; expected an object")
    return Sample(
        name=where,
        messages=media.placed(messages),
        branches=branches,
        tools=_list_of(record.get("tools") or [], "tools", where),
        task=str(record.get("task") or ""),
        video_options=options,
    )


def _list_of(value: Any, what: str, where: str) -> list[Any]:
    """A list, perhaps written as JSON."""
    if isinstance(value, str):
        value = read_json_text(value, f"{where}, {what}")
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{where}: {what} is {value!r:.80}; expected a list")
    return list(value)


def _message(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise InputError(f"{where}: message {turn!r:.80}; expected an object with role and content")
    message = {key: value for key, value in turn.items() if key not in ("from", "value", "loss", "weight")}
    role = turn.get("role", turn.get("from"))
    if role not in SPEAKERS:
        raise InputError(f"{where}: role {role!r}; expected one of {', '.join(SPEAKERS)}")
    message["role"] = ROLE_NAMES.get(role, role)
    content = message["content"] = turn.get("content", turn.get("value"))
    if not isinstance(content, (str, list, tuple, type(None))):
        raise InputError(f"{where}: content {content!r:.80}; expected a string or a list of parts")
    if turn.get("loss") is False or turn.get("weight") == 0:
        message["learn"] = False
    if role in CALL_ROLES:
        if not isinstance(content, str):
            raise InputError(f"{where}: {role} {content!r:.80}; expected a call as JSON in a string")
        calls = read_json_text(content, f"{where}, {role}")
        message |= {"role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    return message


class _Media:
    """The pictures and videos of a record, on their way into its messages."""

    def __init__(self, record: Mapping[str, Any], where: str, find: FindMedia) -> None:
        self._where, self._find = where, find
        self._waiting = {kind: self._listed(record, kind) for kind in ("image", "video")}
        # those that stand beside the messages and have no place in them yet

    def placed(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The messages with every medium in its place."""
        messages = [self.with_files(message) for message in messages]
        if not any(self._waiting.values()):
            return messages
        kinds = self._kinds_of_placeholders(messages)
        placed = [
            {**message, "content": self._with_media(message["content"], kinds)} if _may_hold_placeholders(message) else message
            for message in messages
        ]
        return self._with_rest_in_front(placed)

    def with_files(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """A message whose parts say where their media are; a part that says nothing takes the next one of its list."""
        content = message["content"]
        if not isinstance(content, (list, tuple)):
            return message
        return {**message, "content": [self._part(part) for part in content]}

    def _part(self, part: Any) -> Any:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("image", "image_url", "video", "video_url"):
            return part
        value = part.get(kind)
        if isinstance(value, Mapping) and "url" in value:
            return {**part, kind: {**value, "url": self._content(value["url"])}}
        if value is not None:
            return {**part, kind: self._content(value)}
        waiting = self._waiting[kind.removesuffix("_url")]
        if not waiting:
            raise InputError(f"{self._where}: a part of type {kind} without {kind}; give its path")
        return {**part, kind: waiting.pop(0)}

    def _listed(self, record: Mapping[str, Any], kind: str) -> list[Any]:
        value = record.get(f"{kind}s") or record.get(kind)
        if value is None or value == []:
            return []
        return [self._content(item) for item in (value if isinstance(value, (list, tuple)) else [value])]

    def _content(self, value: Any) -> Any:
        """A path, bytes, or for a video a list of pictures, of whatever a record says of a medium."""
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path") or value.get("url")
        if isinstance(value, (list, tuple)) and value:
            return [self._content(item) for item in value]
        if isinstance(value, bytes) and value:
            return value
        if isinstance(value, str) and value:
            return self._find(value)
        raise InputError(f"{self._where}: a picture or video given as {value!r:.80}; give a path or the file's bytes")

    def _kinds_of_placeholders(self, messages: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """For each placeholder that stands for media, the kind of those."""
        written = [
            found for message in messages for text in _texts_before_answers(message) for found in PLACEHOLDER.findall(text)
        ]
        kinds: dict[str, str] = {}
        for kind, waiting in self._waiting.items():
            # LLaVA-Video writes <image> for its videos.
            is_mixed_up = kind == "video" and kind not in written and not self._waiting["image"]
            name = "image" if is_mixed_up else kind
            num_written = written.count(name)
            if waiting and num_written not in (0, len(waiting)):
                raise InputError(
                    f"{self._where}: {num_written} times <{name}> and {len(waiting)} files; give one file for each"
                )
            if waiting and num_written:
                kinds[name] = kind
        return kinds

    def _with_media(self, content: Any, kinds: Mapping[str, str]) -> Any:
        parts: list[Any] = []
        for part in [content] if isinstance(content, str) else content:
            text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
            parts += self._split(text, kinds) if isinstance(text, str) else [part]
        return parts

    def _split(self, text: str, kinds: Mapping[str, str]) -> list[dict[str, Any]]:
        """A text as parts: placeholders become media, without the line break that separates them from what is asked."""
        pieces = PLACEHOLDER.split(text)
        # (text, kind, text, kind, ..., text)
        parts: list[dict[str, Any]] = []
        for number, piece in enumerate(pieces):
            if number % 2 and piece in kinds:
                kind = kinds[piece]
                parts.append({"type": kind, kind: self._waiting[kind].pop(0)})
            elif number % 2 or piece:
                words = f"<{piece}>" if number % 2 else piece
                if parts and parts[-1]["type"] == "text":
                    parts[-1]["text"] += words
                else:
                    parts.append({"type": "text", "text": words})
        for part in _texts_at_edge(parts):
            part["text"] = part["text"].removeprefix("\n")
        for part in _texts_at_edge(parts[::-1]):
            part["text"] = part["text"].removesuffix("\n")
        return [part for part in parts if part.get("text") != ""]

    def _with_rest_in_front(self, messages: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Media without a placeholder stand before the first question."""
        rest = [{"type": kind, kind: item} for kind, waiting in self._waiting.items() for item in waiting]
        if not rest:
            return messages
        for number, message in enumerate(messages):
            if message["role"] == "user":
                content = message["content"]
                parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
                return [*messages[:number], {**message, "content": [*rest, *parts]}, *messages[number + 1 :]]
        raise InputError(f"{self._where}: pictures or videos, and no user's message to put them in; add one")


def _texts_at_edge(parts: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Texts behind the first medium, up to the first that says something; none where words come before it."""
    if parts and parts[0]["type"] == "text":
        return
    for part in parts:
        if part["type"] == "text":
            yield part
            if part["text"]:
                return


def _may_hold_placeholders(message: Mapping[str, Any]) -> bool:
    return message["role"] != "assistant" and bool(message["content"])


def _texts_before_answers(message: Mapping[str, Any]) -> list[str]:
    if not _may_hold_placeholders(message):
        return []
    content = message["content"]
    parts = [content] if isinstance(content, str) else content
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    return [text for text in texts if isinstance(text, str)]
