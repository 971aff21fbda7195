"""Questions about drawn pictures: where things are, how many, what can be read, and how they lie to each other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image

from openkeye.common.checks import InputError
from openkeye.frameforge.catalogue import COLOUR_NAMES, SHAPES
from openkeye.frameforge.scene import Scene
from openkeye.frameforge.still_pictures import CANVASES, draw_still, object_boxes
from openkeye.frameforge.stills import make_still, still_questions
from openkeye.tasks.rewards.counting import CountingReward
from openkeye.tasks.rewards.format import FormatReward
from openkeye.tasks.rewards.grounding import GroundingReward, GroundingRules
from openkeye.tasks.rewards.ocr import OcrReward
from openkeye.tasks.rewards.reward import Reward, compose
from openkeye.tasks.rewards.spatial import RuleSpatialJudge, SpatialReward
from openkeye.tasks.task import Example, Response

SPACES = {"train": 22, "test": 23}
# first words of the seeds: no picture of one is drawn from the other's numbers
MAX_TRIES = 200
# scenes that are drawn until one can be asked about


@dataclass(frozen=True)
class PictureTaskOptions:
    """What the pictures are like and how answers are scored."""

    seed: int = 0
    split: str = "train"
    side: int = 112
    # pixels of a square picture
    needs_tags: bool = False
    # answers must think and answer between tags (report, 3.2: long thinking for counting, direct answers for the rest)
    format_weight: float = 0.1
    num_examples: int = 0
    # 0: without end
    grounding: GroundingRules = field(default_factory=GroundingRules)

    def __post_init__(self) -> None:
        if self.split not in SPACES:
            raise InputError(f"split is {self.split!r}; give one of {', '.join(SPACES)}")
        if not 56 <= self.side <= CANVASES[-1]:
            raise InputError(f"side is {self.side}; give 56 to {CANVASES[-1]} pixels")
        if self.seed < 0 or self.format_weight < 0 or self.num_examples < 0:
            raise InputError(
                f"seed {self.seed}, format_weight {self.format_weight}, num_examples {self.num_examples}; give numbers from 0"
            )


Asked = tuple[str, str, Mapping[str, Any]]
# question, reference answer, truth


class PictureTask:
    """See `Task`: one of KINDS, which is its name."""

    def __init__(self, kind: str, options: PictureTaskOptions = PictureTaskOptions()) -> None:
        if kind not in KINDS:
            raise InputError(f"kind {kind!r} is unknown; choose from {', '.join(KINDS)}")
        self.options = options
        self._kind = kind
        main = self._main_reward()
        shape = FormatReward(needs_think=options.needs_tags, needs_answer=options.needs_tags)
        self._scores = compose([main, shape], {main.name: 1.0, shape.name: options.format_weight})

    @property
    def name(self) -> str:
        return self._kind

    @property
    def num_examples(self) -> int | None:
        """See `Task`."""
        return self.options.num_examples or None

    def read(self, number: int) -> Example:
        """See `Task`."""
        options = self.options
        kinds = list(KINDS)
        rng = np.random.default_rng([SPACES[options.split], options.seed, number, kinds.index(self._kind)])
        for _ in range(MAX_TRIES):
            scene = make_still(rng)
            asked = KINDS[self._kind](scene, rng, options.side)
            if asked is not None:
                break
        else:
            raise AssertionError(f"{self._kind}: none of {MAX_TRIES} scenes can be asked about")
        question, reference, truth = asked
        picture = PIL.Image.fromarray(draw_still(scene, options.side, options.side, int(rng.integers(1 << 31))))
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        facts = {**truth, "reference": reference, "question": question}
        return Example(self.name, number, "image", ({"role": "user", "content": content},), facts=facts)

    async def score(self, example: Example, response: Response) -> Mapping[str, float]:
        """See `Task`."""
        return await self._scores(example, response)

    def _main_reward(self) -> Reward:
        if self._kind == "grounding":
            return GroundingReward(self.options.grounding)
        if self._kind == "counting":
            return CountingReward()
        return OcrReward() if self._kind == "ocr" else SpatialReward(RuleSpatialJudge())


def _grounding(scene: Scene, rng: np.random.Generator, side: int) -> Asked:
    """One thing by its name, or all of one colour or shape, which may be none."""
    numbers = list(range(len(scene.objects)))
    kind = rng.random()
    if kind < 0.5:
        number = int(rng.integers(len(numbers)))
        text, wanted = f"Find the {scene.name(scene.objects[number])}. Give its box.", [number]
    elif kind < 0.8:
        colour = scene.objects[int(rng.integers(len(numbers)))].colour
        if rng.random() < 0.15:
            colour = int(rng.integers(len(COLOUR_NAMES)))
        text = f"Find all {COLOUR_NAMES[colour]} objects. Give their boxes."
        wanted = [number for number in numbers if scene.objects[number].colour == colour]
    else:
        sprite = int(rng.integers(len(SHAPES)))
        plural = "crosses" if SHAPES[sprite] == "cross" else f"{SHAPES[sprite]}s"
        text = f"Find all {plural}. Give their boxes."
        wanted = [number for number in numbers if scene.objects[number].sprite == sprite]
    boxes = object_boxes(scene, side, side)
    places = {id(track): place for place, track in enumerate(scene.tracks)}
    # From left to right, as one reads.
    found = sorted(boxes[places[id(scene.objects[number])]] for number in wanted)
    return text, str([list(box) for box in found]), {"boxes": [list(box) for box in found]}


def _of_still_question(task: str) -> Callable[[Scene, np.random.Generator, int], Asked | None]:
    """One of FrameForge's own questions about stills."""

    def ask(scene: Scene, rng: np.random.Generator, side: int) -> Asked | None:
        for question in still_questions(scene, rng, 8):
            if question.task == task:
                truth = question.answer.rstrip(".")
                facts: dict[str, Any] = {"answer": truth}
                if task == "counting":
                    facts["count"] = int(truth)
                elif task == "reading":
                    facts["text"] = truth
                return question.text, question.answer, facts
        return None

    return ask


KINDS: dict[str, Callable[[Scene, np.random.Generator, int], Asked | None]] = {
    "grounding": _grounding,
    "counting": _of_still_question("counting"),
    "ocr": _of_still_question("reading"),
    "spatial": _of_still_question("place"),
}
