"""A person's own folder of videos and pictures, with questions in whatever simple form they were written down."""

import csv
import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openkeye.common.checks import InputError
from openkeye.data.sample import Sample
from openkeye.inputs.messages import SYNONYMS, VIDEO_OPTIONS

VIDEO_ENDINGS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".gif")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TABLE_ENDINGS = (".jsonl", ".csv")
QUESTION_FILE = "questions"
# with one of TABLE_ENDINGS; without such a file every table in the folder counts

MEDIA_KEYS = ("video", "image", "picture", "media", "file")
QUESTION_KEYS = ("question", "prompt", "instruction", "text")
ANSWER_KEYS = ("answer", "response", "output")
CAPTION_QUESTION = "Describe the {kind}."
EXAMPLE = '{"video": "a.mp4", "question": "What happens first?", "answer": "A door opens."}'

PARTS = ("train", "held_out", "all")
MIN_MEDIA_TO_HOLD_OUT = 5


@dataclass(frozen=True)
class _Entry:
    """What one line says."""

    where: str
    # "questions.jsonl:3"
    media: str
    # relative to the folder; "" for text alone, and for chats that hold their media themselves
    options: tuple[tuple[str, Any], ...]
    # of the video
    messages: tuple[Mapping[str, Any], ...]
    # of a question: the user's and the assistant's
    task: str
    about: str
    # the video or picture that it is held out with; `where` for text alone


class Folder:
    """A `Source`: one sample for each video or picture, with its questions as branches behind it.

    Questions stand in `questions.jsonl` or `questions.csv` (without such a file in all .jsonl and .csv files), and in a file
    beside a video that has its name (`a.json`, `a.txt`). A line is {"video", "question", "answer"}, {"video", "questions":
    [{"question", "answer"}, ...]} or {"messages": [chat messages]}. `fps`, `start` and `end` in a line choose a part of the
    video.

    Some videos are held out: always the same ones, chosen by name, and none where there are less than five.
    """

    def __init__(
        self, path: str | Path, *, part: str = "all", held_out_share: float = 0.1, seed: int = 0, fps: float = 0.0
    ) -> None:
        """Read the folder's questions; no video is opened.

        Args:
            path: the folder.
            part: "train", "held_out" or "all".
            held_out_share: of the videos.
            seed: of the choice.
            fps: frames sampled of every second, where a line does not say; 0: as the checkpoint says.

        Raises:
            InputError: no folder, no questions, or lines that make no sense; says what was found.
        """
        if not str(path):
            raise InputError("the reader folder got no path; give a folder of videos and questions")
        if part not in PARTS:
            raise InputError(f"{path}: part is {part!r}; choose from {', '.join(PARTS)}")
        if not 0 <= held_out_share < 1:
            raise InputError(f"{path}: held_out_share is {held_out_share}; give a share from 0 to below 1")
        if not (math.isfinite(fps) and fps >= 0):
            raise InputError(f"{path}: fps is {fps}; give a rate above 0, or 0 for the checkpoint's")
        self._video_options = {"fps": fps} if fps else {}
        self.root = Path(path).expanduser()
        if not self.root.is_dir():
            raise InputError(f"{path}: no such folder; give the folder with your videos and a questions.jsonl")
        self._files = _FolderFiles(self.root)
        groups = self._groups(self._read_entries())
        held_out = _held_out(list(groups), held_out_share, seed)
        self._samples = [
            self._sample(entries)
            for key, entries in groups.items()
            if part == "all" or (key in held_out) == (part == "held_out")
        ]

    @property
    def num_samples(self) -> int:
        return len(self._samples)

    @property
    def num_questions(self) -> int:
        return sum(max(1, len(sample.branches)) for sample in self._samples)

    def read(self, index: int) -> Sample:
        """See `Source.read`."""
        return self._samples[index]

    def _read_entries(self) -> list[_Entry]:
        tables = [path for path in self._files.tables if path.stem.lower() == QUESTION_FILE] or self._files.tables
        entries = [entry for path in tables for entry in self._entries(path)]
        answered = {entry.media for entry in entries}
        for media in self._files.media:
            if media not in answered:
                entries += self._sidecar(self.root / media)
        if not entries:
            raise InputError(
                f"{self.root}: no questions were found among {self._files.summary()}; write {QUESTION_FILE}.jsonl into it, "
                f"a line for each question: {EXAMPLE}"
            )
        return entries

    def _entries(self, path: Path) -> Iterable[_Entry]:
        for number, record in _records(path, self._files.name(path)):
            yield from self._entries_of(record, f"{self._files.name(path)}:{number}", path.parent)

    def _sidecar(self, media: Path) -> Iterable[_Entry]:
        """Questions of one video in a file of its own."""
        for ending in (".json", ".txt"):
            path = media.with_suffix(ending)
            if not path.is_file():
                continue
            where, text = self._files.name(path), _text(path, self._files.name(path))
            records = _read_json(text, where) if ending == ".json" else _pairs(text, "video" if _is_video(media) else "image")
            for number, record in enumerate(records if isinstance(records, list) else [records], 1):
                if not isinstance(record, Mapping):
                    raise InputError(f"{where}: {record!r:.80}; expected a question, for example {EXAMPLE}")
                named = record if "messages" in record else {"video": media.name} | dict(record)
                yield from self._entries_of(named, f"{where}:{number}", path.parent)

    def _entries_of(self, record: Mapping[str, Any], where: str, beside: Path) -> Iterable[_Entry]:
        names = {str(key).strip().lower(): value for key, value in record.items() if value not in (None, "")}
        media = _first(names, MEDIA_KEYS, where, is_needed=False)
        found = "" if media is None else self._files.find(str(media), beside, where)
        options = _video_options(names) if found and _is_video(Path(found)) else ()
        task = str(names.get("task", ""))
        if "messages" in names:
            messages, own = self._messages(names["messages"], beside, where)
            yield _Entry(where, found, options, messages, task, found or (own[0] if own else where))
            return
        questions = names.get("questions", [names])
        if not isinstance(questions, list) or not all(isinstance(one, Mapping) for one in questions):
            raise InputError(f'{where}: questions is {questions!r:.80}; expected a list of {{"question", "answer"}}')
        for one in questions:
            question, answer = _first(one, QUESTION_KEYS, where), _first(one, ANSWER_KEYS, where)
            turns = ({"role": "user", "content": str(question)}, {"role": "assistant", "content": str(answer)})
            yield _Entry(where, found, options, turns, str(one.get("task", task)), found or where)

    def _messages(self, messages: Any, beside: Path, where: str) -> tuple[tuple[Mapping[str, Any], ...], list[str]]:
        """(chat messages with the paths of their media made absolute, names of those media)."""
        if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
            raise InputError(f'{where}: messages is {messages!r:.80}; expected a list of {{"role", "content"}}')
        if not any(message.get("role") == "assistant" for message in messages):
            raise InputError(f"{where}: no message of the assistant, so nothing to learn; add the answer")
        names: list[str] = []
        return tuple(self._located(message, beside, where, names) for message in messages), names

    def _located(self, message: Mapping[str, Any], beside: Path, where: str, names: list[str]) -> Mapping[str, Any]:
        content = message.get("content")
        if not isinstance(content, list):
            return message
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind in ("video", "image") and isinstance(part.get(kind), str) and not part[kind].startswith("data:"):
                names.append(self._files.find(part[kind], beside, where))
                part = {**part, kind: str(self.root / names[-1])}
            parts.append(part)
        return {**message, "content": parts}

    def _groups(self, entries: Iterable[_Entry]) -> dict[tuple[Any, ...], list[_Entry]]:
        """Entries of one video, and one part of it, together; a text or a chat with media of its own stays alone."""
        groups: dict[tuple[Any, ...], list[_Entry]] = {}
        for number, entry in enumerate(entries):
            is_shared = entry.media and entry.messages[0].get("role") == "user"
            key = (entry.about, entry.options) if is_shared else (entry.about, number)
            groups.setdefault(key, []).append(entry)
        return groups

    def _sample(self, entries: list[_Entry]) -> Sample:
        first = entries[0]
        tasks = {entry.task for entry in entries}
        task = first.task if len(tasks) == 1 else ""
        if not first.media:
            name = f"{self.root.name}/{first.where}"
            return Sample(name, first.messages, task=task, video_options=self._video_options)
        kind = "video" if _is_video(Path(first.media)) else "image"
        part = {"type": kind, kind: str(self.root / first.media), **dict(first.options)}
        before = [message for message in first.messages[:1] if message.get("role") == "system"]
        name = f"{self.root.name}/{first.media}"
        shown = {"role": "user", "content": [part]}
        turns = [entry.messages[len(before) :] for entry in entries]
        if len(turns) == 1:
            content = turns[0][0].get("content") or ""
            texts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            whole = {"role": "user", "content": [part, *texts]}
            messages, turns = [*before, whole, *turns[0][1:]], []
        else:
            messages = [*before, shown]
        return Sample(name, messages, branches=turns, task=task, video_options=self._video_options)


class _FolderFiles:
    """What lies in the folder, by name relative to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        files = sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
        self.media = [self.name(path) for path in files if path.suffix.lower() in VIDEO_ENDINGS + IMAGE_ENDINGS]
        self.tables = [path for path in files if path.suffix.lower() in TABLE_ENDINGS]
        self.num_others = len(files) - len(self.media) - len(self.tables)

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def summary(self) -> str:
        num_videos = sum(_is_video(Path(name)) for name in self.media)
        return (
            f"{num_videos} videos, {len(self.media) - num_videos} pictures, {len(self.tables)} .jsonl or .csv files and "
            f"{self.num_others} other files"
        )

    def find(self, text: str, beside: Path, where: str) -> str:
        """A video's or picture's name in the folder: beside the file that names it, from the folder, or anywhere in it."""
        known = set(self.media)
        for path in (beside / text, self.root / text):
            if path.is_relative_to(self.root) and self.name(path) in known:
                return self.name(path)
        same = [name for name in self.media if Path(name).name == Path(text).name]
        if len(same) == 1:
            return same[0]
        if same:
            raise InputError(f"{where}: {text!r} may be {' or '.join(same)}; write the path from {self.root}")
        if (self.root / text).is_file():
            raise InputError(
                f"{where}: {text!r} is no video or picture by its ending ({', '.join(VIDEO_ENDINGS + IMAGE_ENDINGS)})"
            )
        near = difflib.get_close_matches(text, self.media, 1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"{where}: {text!r} is not in {self.root}{guess} ({self.summary()} are)")


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_ENDINGS


def _held_out(keys: list[tuple[Any, ...]], share: float, seed: int) -> set[tuple[Any, ...]]:
    """Which groups are held out: whole videos, in an order by the hash of their names that adding others does not change."""
    media = sorted({str(key[0]) for key in keys})
    if not share or len(media) < MIN_MEDIA_TO_HOLD_OUT:
        return set()
    num = max(1, math.floor(share * len(media)))
    ranked = sorted(media, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    chosen = set(ranked[:num])
    return {key for key in keys if str(key[0]) in chosen}


def _first(record: Mapping[str, Any], keys: tuple[str, ...], where: str, is_needed: bool = True) -> Any:
    for key in keys:
        if record.get(key) not in (None, ""):
            return record[key]
    if is_needed:
        raise InputError(
            f"{where}: no {keys[0]}; it holds {', '.join(map(repr, record)) or 'nothing'}; write for example {EXAMPLE}"
        )
    return None


def _video_options(names: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    known = {SYNONYMS.get(key, key): value for key, value in names.items() if SYNONYMS.get(key, key) in VIDEO_OPTIONS}
    return tuple(sorted(known.items()))


def _records(path: Path, where: str) -> Iterable[tuple[int, Mapping[str, Any]]]:
    """(line number, record) of a table."""
    text = _text(path, where)
    if path.suffix.lower() == ".csv":
        rows = csv.DictReader(text.splitlines(keepends=True))
        for row in rows:
            yield rows.line_num, {key: value for key, value in row.items() if key is not None}
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        record = _read_json(line, f"{where}:{number}")
        if not isinstance(record, Mapping):
            raise InputError(f"{where}:{number}: {line.strip():.60}; expected an object, for example {EXAMPLE}")
        yield number, record


def _text(path: Path, where: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror}); check its permissions") from error


def _read_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}); expected for example {EXAMPLE}") from None


def _pairs(text: str, kind: str) -> list[dict[str, str]]:
    """`Q: ...` and `A: ...` lines as questions; any other text is a description."""
    pairs: list[dict[str, str]] = []
    if not text.strip():
        return pairs
    if not text.lstrip().lower().startswith("q:"):
        return [{"question": CAPTION_QUESTION.format(kind=kind), "answer": text.strip()}]
    key = ""
    for line in text.splitlines():
        mark = line.strip()[:2].lower()
        if mark == "q:":
            pairs.append({"question": line.strip()[2:].strip()})
            key = "question"
        elif mark == "a:":
            pairs[-1]["answer"] = line.strip()[2:].strip()
            key = "answer"
        elif line.strip():
            pairs[-1][key] += f"\n{line.strip()}"
    return pairs
