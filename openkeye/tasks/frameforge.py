"""Video-RL's rule-checked tasks (report, 5.6): FrameForge's clips by number, of seconds or an hour, drawn when first looked at.

The old tasks ask as `frameforge.questions` does; "two_moments" asks what no single moment can answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from openkeye.common.checks import InputError
from openkeye.frameforge.needles import MIN_SPARSE_SECONDS, make_sparse_scene
from openkeye.frameforge.questions import TASKS, Question, make_question
from openkeye.frameforge.scene import Scene, SceneSettings, make_scene
from openkeye.frameforge.stories import MIN_STORY_SECONDS, make_story
from openkeye.frameforge.two_moments import KINDS, TwoMomentQuestion, make_two_moment_question
from openkeye.frameforge.writer import TIERS, Tier
from openkeye.inputs.processor import BUNDLED_MODEL, load_limits
from openkeye.tasks.drawn_frames import DrawnFrames, sampled_times, whole_clip_limits
from openkeye.tasks.frameforge_answers import answer_rewards
from openkeye.tasks.task import Example, Response

SPACES = {"train": 26, "test": 27}
# first words of the seeds: no clip of one is among the other's, nor among those of files and of supervised training
SCENES = ("usual", "story")
TASK_PREFIX = "frameforge_"
TASK_KINDS = (*TASKS, "two_moments")
STORY_SECONDS = (30.0, 45.0)
# of stories in the standard tier, whose clips are too short for most of them
MAX_TRIES = 40
# stories that are drawn until one can be asked about


@dataclass(frozen=True)
class FrameForgeOptions:
    """What the clips are like, and how answers are scored."""

    split: str = "train"
    # of SPACES
    seed: int = 0
    tier: str = "standard"
    # of `frameforge.writer.TIERS`: 8-30 s, 1-5 minutes, an hour
    seconds: tuple[float, ...] = ()
    # shortest and longest clip, instead of the tier's
    scenes: str = "usual"
    # of SCENES: as evaluation's files, or harder ones; two_moments asks about stories only
    kinds: tuple[str, ...] = KINDS
    # of two_moments
    model: str = BUNDLED_MODEL
    # whose limits say which frames of a clip are seen, and how large
    fps: float = 2.0
    total_tokens: int = 0
    # budget of a video; 0: room for every frame
    is_damaged: bool = True
    # as by a video codec
    device: str = "cpu"
    # that draws
    format_weight: float = 0.1
    num_examples: int = 0
    # 0: without end

    def __post_init__(self) -> None:
        for name, known in (("split", SPACES), ("tier", TIERS), ("scenes", SCENES)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}; give one of {', '.join(known)}")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise InputError(f"kinds are {list(self.kinds)}; choose one or more of {', '.join(KINDS)}")
        if min(self.seed, self.total_tokens, self.format_weight, self.num_examples) < 0:
            raise InputError(
                f"seed {self.seed}, total_tokens {self.total_tokens}, format_weight {self.format_weight}, "
                f"num_examples {self.num_examples}; give numbers from 0"
            )
        if not 1.0 <= self.fps <= 10.0:
            raise InputError(f"fps is {self.fps:g}; give 1 to 10, so that every event is seen")
        if self.seconds and not (len(self.seconds) == 2 and 8.0 <= self.seconds[0] <= self.seconds[1] <= 7200.0):
            raise InputError(f"seconds are {list(self.seconds)}; give the shortest and the longest clip, from 8 to 7200")


@dataclass(frozen=True)
class _Clip:
    """One clip before anything is asked or drawn."""

    scene: Scene
    times_seconds: list[float]
    side: int
    duration_seconds: float
    key: tuple

    @property
    def frame_spacing_seconds(self) -> float:
        return (self.times_seconds[-1] - self.times_seconds[0]) / max(1, len(self.times_seconds) - 1)


class FrameForgeTask:
    """See `Task`: one of TASK_KINDS; its name is the kind's with `frameforge_` before it."""

    def __init__(self, kind: str, options: FrameForgeOptions = FrameForgeOptions()) -> None:
        kind = kind.removeprefix(TASK_PREFIX)
        if kind not in TASK_KINDS:
            raise InputError(f"kind {kind!r} is unknown; choose from {', '.join(TASK_KINDS)}")
        self.kind = kind
        self.options = options
        self._is_story = options.scenes == "story" or kind == "two_moments"
        self._tier = TIERS[options.tier]
        self._seconds = self._clip_seconds(self._tier)
        self._limits = load_limits(options.model)[1].changed(fps=options.fps, total_tokens=options.total_tokens or None)

    @property
    def name(self) -> str:
        return TASK_PREFIX + self.kind

    @property
    def num_examples(self) -> int | None:
        """See `Task`."""
        return self.options.num_examples or None

    def read(self, number: int) -> Example:
        """See `Task`. Milliseconds, also for an hour: pictures are drawn when `Frames.pixels` is first asked for."""
        options = self.options
        for attempt in range(MAX_TRIES):
            clip = self._clip(number, attempt)
            rng = np.random.default_rng([*clip.key[:-1], attempt, TASK_KINDS.index(self.kind)])
            question = self._ask(clip, rng)
            facts = {} if question is None else self._facts(clip, question)
            # Where few frames are sampled, some events are in none of them.
            if question is not None and answer_rewards(facts, Response(question.answer), 0.0)["outcome"] == 1.0:
                break
        else:
            raise InputError(
                f"{self.name}: none of {MAX_TRIES} clips of {self._seconds[0]:g} to {self._seconds[1]:g} s can be asked about; "
                "give longer ones, or a larger budget of tokens"
            )
        frames = DrawnFrames(
            clip.scene,
            clip.times_seconds,
            clip.side,
            f"frameforge {options.tier} clip {number}",
            clip.duration_seconds,
            clip.key,
            int(np.random.default_rng([*clip.key[:-1], attempt]).integers(1 << 31)) if options.is_damaged else None,
            options.device,
        )
        content = [{"type": "video", "video": frames}, {"type": "text", "text": question.text}]
        return Example(self.name, number, "video", ({"role": "user", "content": content},), facts=facts)

    async def score(self, example: Example, response: Response) -> Mapping[str, float]:
        """See `Task` and `frameforge_answers.answer_rewards`."""
        return answer_rewards(example.facts, response, self.options.format_weight)

    def _clip_seconds(self, tier: Tier) -> tuple[float, float]:
        given = self.options.seconds
        seconds = (given[0], given[1]) if given else tier.seconds
        if self._is_story and not given and seconds[0] < MIN_STORY_SECONDS:
            seconds = STORY_SECONDS
        least = MIN_STORY_SECONDS if self._is_story else MIN_SPARSE_SECONDS if tier.is_sparse else 0.0
        if seconds[0] < least:
            raise InputError(f"{self.name}: clips of {seconds[0]:g} s are too short for these scenes; give {least:g} s or more")
        return seconds

    def _clip(self, number: int, attempt: int) -> _Clip:
        """One clip; every kind of task sees the same one, so that it is drawn and kept once."""
        options, tier = self.options, self._tier
        seed = (SPACES[options.split], options.seed, number, tier.number, SCENES.index("story" if self._is_story else "usual"))
        rng = np.random.default_rng([*seed, attempt])
        num_file_frames = round(float(rng.uniform(*self._seconds)) * tier.fps)
        duration = num_file_frames / tier.fps
        limits = self._limits if options.total_tokens else whole_clip_limits(self._limits, duration)
        times, side = sampled_times(num_file_frames, tier.fps, limits, tier.side)
        if self._is_story:
            scene = make_story(rng, 0.0, duration)
        elif tier.is_sparse:
            scene = make_sparse_scene(rng, 0.0, duration)
        else:
            scene = make_scene(rng, 0.0, duration, SceneSettings(tier.min_event_seconds))
        return _Clip(scene, times, side, duration, (*seed, attempt))

    def _ask(self, clip: _Clip, rng: np.random.Generator) -> Question | TwoMomentQuestion | None:
        frame_times = np.asarray(clip.times_seconds)
        if self.kind != "two_moments":
            return make_question(self.kind, clip.scene, rng, frame_times)
        # One kind is drawn, and kept to over all attempts: a kind that fits few scenes is asked as often as any other.
        kinds = self.options.kinds
        kind = kinds[int(np.random.default_rng([*clip.key[:3], len(TASK_KINDS)]).integers(len(kinds)))]
        return make_two_moment_question(kind, clip.scene, rng, frame_times)

    def _facts(self, clip: _Clip, question: Question | TwoMomentQuestion) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "task": self.kind,
            "question": question.text,
            "answer": question.answer,
            "reference": question.answer,
            "duration_seconds": clip.duration_seconds,
            "frame_spacing_seconds": clip.frame_spacing_seconds,
            "num_events": sum(len(track.intervals) for track in clip.scene.tracks),
            "num_objects": len(clip.scene.objects),
        }
        if isinstance(question, TwoMomentQuestion):
            form = "seconds" if question.kind == "later" else "words"
            return facts | {
                "kind": question.kind, "form": form, "intervals": [], "moment_seconds": None,
                "terms": list(question.terms), "moments": [list(moment) for moment in question.moments],
            }  # fmt: skip
        return facts | {
            "kind": self.kind, "form": question.kind, "intervals": [list(shown) for shown in question.intervals],
            "moment_seconds": question.moment_seconds,
        }  # fmt: skip
