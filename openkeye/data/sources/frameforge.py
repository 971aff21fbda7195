"""FrameForge as sources of finished documents: clips, pictures, text and captions, by number and without end.

Everything is a function of (seed, number). Workers send what is to be drawn, and the training device draws it. Seeds are of
`stream.TRAINING_SPACE`: no clip of an evaluation is among them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Generic, TypeVar, get_type_hints

import numpy as np

from openkeye.common.checks import InputError
from openkeye.data.chat_tokens import ChatTokens, DocumentWriter
from openkeye.data.document import Document
from openkeye.data.drawn_pictures import DrawnPictures
from openkeye.data.sample import Source
from openkeye.frameforge.needles import MIN_SPARSE_SECONDS, make_sparse_scene
from openkeye.frameforge.questions import Question, make_questions
from openkeye.frameforge.render import RenderJob, scene_job
from openkeye.frameforge.scene import Scene, SceneSettings, make_scene
from openkeye.frameforge.still_pictures import CANVASES, still_job
from openkeye.frameforge.stills import make_still, still_questions
from openkeye.frameforge.stream import TRAINING_SPACE, TrainingClip, make_training_clip
from openkeye.frameforge.timelines import caption, is_answered_by_text, timeline
from openkeye.inputs.processor import Processor

FRAME_SECONDS = 0.5
TEXT_STEP_SECONDS = 0.1
Options = TypeVar("Options")

CAPTION_PROMPTS = ("What is visible in the video?", "Which objects appear in the video?", "What can be seen, and when?")


@dataclass(frozen=True)
class VideoOptions:
    """What the clips of `FrameForgeVideos` are like."""

    frames: str = "16..60"
    # numbers of frames with weights, "16..60:3,600..2400:1"; within a range every doubling is equally likely
    frames_per_round: int = 64
    max_rounds: int = 4
    # of 8 questions each: one for every so many frames
    num_branches: int = 0
    # the most questions of a clip; 0: all
    sparse_share: float = 0.0
    # of the clips of at least a minute: few events, far apart
    max_start_seconds: float = 300.0
    # half of the clips begin somewhere up to here, the others at 0
    side: int = 112
    # pixels

    def __post_init__(self) -> None:
        parse_frames(self.frames)
        _check_numbers(self, frames_per_round=1, max_rounds=1, num_branches=0, max_start_seconds=0)
        _check_share(self.sparse_share)
        if self.side % 8 or self.side < 56:
            raise InputError(f"side is {self.side}; give pixels in multiples of 8, at least 56")


@dataclass(frozen=True)
class PictureOptions:
    """What the documents of `FrameForgePictures` are like."""

    min_pictures: int = 1
    max_pictures: int = 1
    # of one document
    num_questions: int = 8
    # the most of one document
    min_side: int = 112
    max_side: int = 224
    # pixels; every side is a multiple of a merged token's

    def __post_init__(self) -> None:
        _check_numbers(self, min_pictures=1, max_pictures=self.min_pictures, num_questions=1, min_side=56)
        if not self.min_side <= self.max_side <= CANVASES[-1]:
            raise InputError(f"sides {self.min_side}..{self.max_side}; give a range up to {CANVASES[-1]} pixels")


@dataclass(frozen=True)
class TextOptions:
    """What the documents of `FrameForgeText` are like."""

    min_seconds: float = 10.0
    max_seconds: float = 300.0
    # of the scenes they tell
    rounds: int = 1
    # of 8 questions
    sparse_share: float = 0.3
    max_start_seconds: float = 3600.0
    # as in `VideoOptions`

    def __post_init__(self) -> None:
        _check_numbers(self, min_seconds=8, max_seconds=self.min_seconds, rounds=1, max_start_seconds=0)
        _check_share(self.sparse_share)


@dataclass(frozen=True)
class CaptionOptions:
    """What the documents of `FrameForgeCaptions` are like."""

    min_segments: int = 1
    max_segments: int = 4
    # each a video with a caption, one after the other; one segment is a captioned clip
    segment_seconds: float = 15.0
    sparse_share: float = 0.0
    max_start_seconds: float = 300.0
    side: int = 112
    # as in `VideoOptions`

    def __post_init__(self) -> None:
        _check_numbers(self, min_segments=1, max_segments=self.min_segments, segment_seconds=8, max_start_seconds=0)
        _check_share(self.sparse_share)
        if self.side % 8 or self.side < 56:
            raise InputError(f"side is {self.side}; give pixels in multiples of 8, at least 56")


def parse_frames(text: str) -> list[tuple[int, int, float]]:
    """`16..60:3,600:1` as (lowest, highest, weight) rows.

    Raises:
        InputError: not of that form, below 16 frames (shorter clips hold no events), or without any weight.
    """
    rows = []
    for part in text.split(","):
        span, _, weight = part.strip().partition(":")
        low, _, high = span.partition("..")
        try:
            rows.append((int(low), int(high or low), float(weight or 1.0)))
        except ValueError:
            raise InputError(
                f"frames are {text!r}; give numbers or ranges with weights, such as 16..60:3,600..2400:1"
            ) from None
    if any(not 16 <= low <= high or weight < 0 for low, high, weight in rows) or not sum(weight for *_, weight in rows) > 0:
        raise InputError(f"frames are {text!r}; give ranges from 16 on, the smaller number first, and weights above 0")
    return rows


def _check_numbers(options: object, **lowest: float) -> None:
    for name, low in lowest.items():
        value = getattr(options, name)
        if not low <= value < float("inf"):
            raise InputError(f"{name} is {value}; give at least {low:g}")


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise InputError(f"sparse_share is {share}; give a share from 0 to 1")


@lru_cache(maxsize=4)
def _tokens(model_dir: str) -> ChatTokens:
    """Once in a process: a source travels to workers without its tokenizer."""
    return ChatTokens(Processor.load(model_dir))


class _FrameForge(Generic[Options]):
    """What the four sources have in common."""

    kind = 0
    # the last word of a source's seeds, from 1 on: a seed that ends with 0 is one without it

    def __init__(self, model_dir: str, seed: int, options: Options) -> None:
        if seed < 0:
            raise InputError(f"the seed is {seed}; give a whole number from 0")
        self.model_dir = str(model_dir)
        self.seed = seed
        self.options = options

    @property
    def num_samples(self) -> int | None:
        """None: without end."""
        return None

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng([TRAINING_SPACE, self.seed, index, self.kind])

    def _name(self, index: int) -> str:
        return f"{type(self).__name__}:{self.seed}:{index}"

    def _cells(self, pixels: int) -> int:
        """Merged tokens of a side; InputError where they are not whole."""
        factor = _tokens(self.model_dir).processor.image_limits.factor
        if pixels % factor:
            raise InputError(f"a side of {pixels} pixels is no multiple of {factor}, a token's side in {self.model_dir}")
        return pixels // factor

    def _video(self, writer: DocumentWriter, job: RenderJob, times: np.ndarray, side: int, seed: int) -> None:
        cells = self._cells(side)
        writer.video(DrawnPictures(job, side, side, side, seed), times.tolist(), cells, cells)


class FrameForgeVideos(_FrameForge[VideoOptions]):
    """Clips: the trunk is the video, and every question with its answer is a branch."""

    kind = 1

    def read(self, index: int) -> Document:
        """The document of a number."""
        rng, options = self._rng(index), self.options
        rows = parse_frames(options.frames)
        weights = np.array([weight for *_, weight in rows])
        low, high, _ = rows[int(rng.choice(len(rows), p=weights / weights.sum()))]
        num_frames = min(high, int(np.exp(rng.uniform(np.log(low), np.log(high + 1)))))
        clip = make_training_clip(
            self.seed,
            index,
            num_frames,
            int(np.clip(num_frames // options.frames_per_round, 1, options.max_rounds)),
            options.max_start_seconds,
            bool(rng.random() < options.sparse_share) and num_frames * FRAME_SECONDS >= MIN_SPARSE_SECONDS,
        )
        return self.document(clip, self._name(index), int(rng.integers(1 << 31)))

    def document(self, clip: TrainingClip, name: str, seed: int) -> Document:
        """A clip as a document; `seed` is of the damage to its pictures."""
        writer = DocumentWriter(_tokens(self.model_dir))
        self._video(writer, clip.job, clip.frame_times, self.options.side, seed)
        _ask(writer, clip.questions[: self.options.num_branches or None])
        return writer.finish(name, "frameforge_videos")


class FrameForgePictures(_FrameForge[PictureOptions]):
    """Still images, one or several in a document, and questions about them as branches."""

    kind = 2

    def read(self, index: int) -> Document:
        """The document of a number."""
        rng, options = self._rng(index), self.options
        num_pictures = int(rng.integers(options.min_pictures, options.max_pictures + 1))
        scenes = [make_still(rng) for _ in range(num_pictures)]
        writer = DocumentWriter(_tokens(self.model_dir))
        for number, scene in enumerate(scenes, 1):
            height, width = self._sides(rng)
            if num_pictures > 1:
                writer.text(f"Picture {number}:")
            record = still_pictures(scene, height, width, int(rng.integers(1 << 31)))
            writer.image(record, self._cells(height), self._cells(width))
        if num_pictures == 1:
            _ask(writer, still_questions(scenes[0], rng, options.num_questions))
        else:
            _ask(writer, _questions_about_several(scenes, rng, options.num_questions))
        return writer.finish(self._name(index), "frameforge_pictures")

    def _sides(self, rng: np.random.Generator) -> tuple[int, int]:
        """(height, width) in pixels; half of the pictures are square."""
        factor = _tokens(self.model_dir).processor.image_limits.factor
        low, high = -(-self.options.min_side // factor), self.options.max_side // factor
        if low > high:
            raise InputError(f"no multiple of {factor} pixels in {self.options.min_side}..{self.options.max_side}")
        height, width = (factor * int(rng.integers(low, high + 1)) for _ in range(2))
        return height, height if rng.random() < 0.5 else width


class FrameForgeText(_FrameForge[TextOptions]):
    """Timelines in words with the questions that clips are asked, answered by the words alone."""

    kind = 3

    def read(self, index: int) -> Document:
        """The document of a number."""
        rng, options = self._rng(index), self.options
        seconds = float(np.exp(rng.uniform(np.log(options.min_seconds), np.log(options.max_seconds))))
        start = _start(rng, options.max_start_seconds)
        scene = _scene(rng, start, start + seconds, options.sparse_share)
        moments = start + TEXT_STEP_SECONDS * np.arange(int(seconds / TEXT_STEP_SECONDS))
        questions = make_questions(scene, rng, moments, options.rounds)
        writer = DocumentWriter(_tokens(self.model_dir))
        # The line's end belongs to the trunk: how it is cut into tokens then depends on nothing that follows.
        writer.text(timeline(scene, rng, moments) + "\n")
        _ask(writer, [question for question in questions if is_answered_by_text(question, scene, moments)])
        return writer.finish(self._name(index), "frameforge_text")


class FrameForgeCaptions(_FrameForge[CaptionOptions]):
    """Clips cut into segments, each followed by its caption: what is visible, and when."""

    kind = 4

    def read(self, index: int) -> Document:
        """The document of a number."""
        rng, options = self._rng(index), self.options
        num_segments = int(rng.integers(options.min_segments, options.max_segments + 1))
        frames_per_segment = int(options.segment_seconds / FRAME_SECONDS)
        start = _start(rng, options.max_start_seconds)
        times = start + FRAME_SECONDS * np.arange(num_segments * frames_per_segment)
        scene = _scene(rng, start, start + num_segments * options.segment_seconds, options.sparse_share)
        writer = DocumentWriter(_tokens(self.model_dir))
        prompt = CAPTION_PROMPTS[int(rng.integers(len(CAPTION_PROMPTS)))]
        for number in range(num_segments):
            if number:
                writer.next_turn()
            shown = times[number * frames_per_segment : (number + 1) * frames_per_segment]
            self._video(writer, scene_job(scene, shown), shown, options.side, int(rng.integers(1 << 31)))
            writer.text(prompt)
            writer.answer(caption(scene, shown))
        return writer.finish(self._name(index), "frameforge_captions")


READERS: dict[str, tuple[Callable[..., Source], type]] = {
    "frameforge_videos": (FrameForgeVideos, VideoOptions),
    "frameforge_pictures": (FrameForgePictures, PictureOptions),
    "frameforge_text": (FrameForgeText, TextOptions),
    "frameforge_captions": (FrameForgeCaptions, CaptionOptions),
}


def frameforge_source(reader: str, model_dir: str, options: Mapping[str, Any]) -> Source:
    """One of `READERS` with options by name (`SourceConfig.options`), of which `seed` (default 0) is the source's.

    Raises:
        InputError: an unknown reader or option, or a value that makes no sense.
    """
    if reader not in READERS:
        raise InputError(f"FrameForge has no reader {reader!r}; choose from {', '.join(READERS)}")
    source, record = READERS[reader]
    known = get_type_hints(record)
    given = dict(options)
    seed = given.pop("seed", 0)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(f"{reader}: option {unknown[0]!r} is unknown; choose from seed, {', '.join(known)}")
    for name, value in {"seed": seed, **given}.items():
        wanted = known.get(name, int)
        if not isinstance(value, (int, float) if wanted is float else wanted) or isinstance(value, bool):
            raise InputError(f"{reader}: option {name} is {value!r}; give a {wanted.__name__}")
    return source(model_dir, seed, record(**given))


def still_pictures(scene: Scene, height: int, width: int, seed: int) -> DrawnPictures:
    """A still image of any shape: places are shares of the picture, sizes shares of its shorter side."""
    job, canvas = still_job(scene, height, width)
    return DrawnPictures(job, canvas, height, width, seed)


def _questions_about_several(scenes: list[Scene], rng: np.random.Generator, most: int) -> list[Question]:
    """Questions about one of several pictures, and about which picture shows a thing that is in one alone."""
    names = [[scene.name(track) for track in scene.objects] for scene in scenes]
    everywhere = [name for shown in names for name in shown]
    alone = [(number, name) for number, shown in enumerate(names, 1) for name in shown if everywhere.count(name) == 1]
    questions: dict[str, Question] = {}
    for number in rng.permutation(len(alone))[: (most + 1) // 2].tolist():
        picture, name = alone[number]
        text = f"In which picture is the {name}?"
        questions[text] = Question("which_picture", text, f"Picture {picture}.")
    for _ in range(2 * most):
        if len(questions) == most:
            break
        number = int(rng.integers(len(scenes)))
        for question in still_questions(scenes[number], rng, 1):
            text = f"Picture {number + 1}: {question.text}"
            questions.setdefault(text, replace(question, text=text))
    return list(questions.values())


def _ask(writer: DocumentWriter, questions: list[Question]) -> None:
    for question in questions:
        writer.branch(question.text, question.answer)


def _start(rng: np.random.Generator, max_start_seconds: float) -> float:
    """Half of the clips begin at 0."""
    return 0.0 if rng.random() < 0.5 else round(float(rng.uniform(0.0, max_start_seconds)), 1)


def _scene(rng: np.random.Generator, start: float, end: float, sparse_share: float) -> Scene:
    if rng.random() < sparse_share and end - start >= MIN_SPARSE_SECONDS:
        return make_sparse_scene(rng, start, end)
    return make_scene(rng, start, end, SceneSettings())
