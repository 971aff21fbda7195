"""Synthetic differences as tasks (report, 5.2): two pictures, and what was edited between them, as boxes or as operations.

The score is a reward that is given: how boxes are matched and operations are compared is not this file's business.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import PIL.Image

from openkeye.common.checks import InputError
from openkeye.frameforge.diagram_drawing import draw_pair
from openkeye.frameforge.diagrams import DOMAINS, make_diagram_pair
from openkeye.frameforge.differences import PairSettings, make_pair
from openkeye.tasks.rewards.differences import DifferencePerceptionReward, DifferenceStructureReward
from openkeye.tasks.task import Example, Response

SPACES = {"train": 28, "test": 29}
# first words of the seeds: no pair of one is among the other's
KINDS = ("difference_perception", "difference_structure")
PERCEPTION_QUESTION = "Find all that is different in the second image. Give the boxes, or none."
STRUCTURE_QUESTION = "Which operations make the second image of the first? Give one on each line, or none."


class DifferenceReward(Protocol):
    """Scores boxes or operations: reads `facts["boxes"]`, or `facts["operations"]` and `facts["domain"]`."""

    @property
    def name(self) -> str: ...

    async def __call__(self, example: Example, response: Response) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class DifferenceOptions:
    """What the pairs are like."""

    split: str = "train"
    # of SPACES
    seed: int = 0
    side: int = 112
    # pixels of a square picture
    domains: tuple[str, ...] = DOMAINS
    # of operations
    max_edits: int = 3
    negative_share: float = 0.2
    # pairs that differ by nothing that counts
    max_disturbances: int = 2
    # irrelevant changes of one pair
    num_examples: int = 0
    # 0: without end

    def __post_init__(self) -> None:
        if self.split not in SPACES:
            raise InputError(f"split is {self.split!r}; give one of {', '.join(SPACES)}")
        unknown = [domain for domain in self.domains if domain not in DOMAINS]
        if unknown or not self.domains:
            raise InputError(f"domains are {list(self.domains)}; choose one or more of {', '.join(DOMAINS)}")
        if not 56 <= self.side <= 1024:
            raise InputError(f"side is {self.side}; give 56 to 1024 pixels")
        if min(self.seed, self.num_examples) < 0:
            raise InputError(f"seed {self.seed}, num_examples {self.num_examples}; give numbers from 0")
        # (the rest is checked where it is used)
        self.pair_settings()

    def pair_settings(self) -> PairSettings:
        """Of pairs of drawn pictures."""
        return PairSettings(
            max_edits=self.max_edits, negative_share=self.negative_share, max_disturbances=self.max_disturbances
        )


class DifferenceTask:
    """See `Task`: one of KINDS, which is its name."""

    def __init__(self, kind: str, reward: DifferenceReward, options: DifferenceOptions = DifferenceOptions()) -> None:
        """reward: its main number, by its name, becomes "outcome"."""
        if kind not in KINDS:
            raise InputError(f"kind {kind!r} is unknown; choose from {', '.join(KINDS)}")
        self.options = options
        self._kind = kind
        self._reward = reward

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
        rng = np.random.default_rng([SPACES[options.split], options.seed, number, KINDS.index(self._kind)])
        pictures, question, facts = self._perception(rng) if self._kind == KINDS[0] else self._structure(rng)
        content: list[dict[str, Any]] = [{"type": "image", "image": PIL.Image.fromarray(picture)} for picture in pictures]
        content.append({"type": "text", "text": question})
        facts |= {"question": question, "answer": facts["reference"]}
        return Example(self.name, number, "image", ({"role": "user", "content": content},), facts=facts)

    async def score(self, example: Example, response: Response) -> Mapping[str, float]:
        """See `Task`."""
        rewards = dict(await self._reward(example, response))
        return rewards | {"outcome": min(1.0, max(0.0, rewards[self._reward.name]))}

    def _perception(self, rng: np.random.Generator) -> tuple[tuple[np.ndarray, np.ndarray], str, dict[str, Any]]:
        pair = make_pair(rng, self.options.pair_settings())
        facts = {
            "boxes": [list(box) for box in pair.boxes],
            "edits": [edit.description for edit in pair.edits],
            "disturbances": list(pair.disturbances),
            "reference": str([list(box) for box in pair.boxes]) if pair.edits else "none",
            "num_events": len(pair.edits),
        }
        return pair.draw(self.options.side), PERCEPTION_QUESTION, facts

    def _structure(self, rng: np.random.Generator) -> tuple[tuple[np.ndarray, np.ndarray], str, dict[str, Any]]:
        options = self.options
        domain = options.domains[int(rng.integers(len(options.domains)))]
        pair = make_diagram_pair(rng, domain, options.max_edits, options.negative_share, options.max_disturbances)
        facts = {
            "domain": domain,
            "operations": pair.answer,
            "disturbances": list(pair.disturbances),
            "reference": pair.answer,
            "num_events": len(pair.operations),
        }
        return draw_pair(pair, options.side), STRUCTURE_QUESTION, facts


def open_difference_task(kind: str, options: DifferenceOptions) -> DifferenceTask:
    """One of KINDS with the report's reward (5.2).

    Raises:
        InputError: another kind.
    """
    reward = DifferencePerceptionReward() if kind == "difference_perception" else DifferenceStructureReward()
    return DifferenceTask(kind, reward, options)
