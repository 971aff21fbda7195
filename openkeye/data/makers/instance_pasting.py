"""Recipe `instance-pasting`: objects pasted on pictures, so that counts and boxes are known (report, 3.2, stage 2)."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from openkeye.common.checks import InputError
from openkeye.data.makers.cutouts import OPAQUE, Cutout, CutoutSource
from openkeye.data.makers.made_sample import MadeSample, assistant, image_part, job_rng, pick, text_part, user
from openkeye.data.makers.media_folder import PICTURE_ENDINGS, find_media
from openkeye.inputs.image import open_image

NUM_PLACES = 40
# tries to find room for an object
MAX_LABELS = 3
SHARE_OF_SIDE = (0.12, 0.32)
# of the picture's shorter side that an object's longer side takes
MAX_TURN_DEGREES = 15.0
MIN_SIDE = 8
# pixels of a pasted object's shorter side

COUNT_PROMPTS = (
    'How many objects of the kind "{}" are there? Answer with a number.',
    'Count all instances of "{}".',
    'What is the number of instances of "{}" in the picture?',
    'How often does the picture show this: "{}"? Answer with a number.',
)
BOX_PROMPTS = (
    'Find every "{}". Give boxes [x1, y1, x2, y2] in thousandths of the picture\'s sides as JSON.',
    'Detect all instances of "{}" and answer in JSON, with boxes whose coordinates go from 0 to 1000.',
    'Where is each "{}"? Answer in JSON: a label and a box [x1, y1, x2, y2] in 0..1000 for each.',
)


@dataclass(frozen=True)
class Instance:
    """What is seen of an object in the end."""

    label: str
    box: tuple[int, int, int, int]
    # x1, y1, x2, y2 of its visible pixels in thousandths of the picture's sides, outwards
    visible_share: float


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The box of a mask [H, W] in thousandths, outwards."""
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (
        floor(columns[0] * 1000 / width),
        floor(rows[0] * 1000 / height),
        ceil((columns[-1] + 1) * 1000 / width),
        ceil((rows[-1] + 1) * 1000 / height),
    )


def paste(
    background: PIL.Image.Image, cutouts: Sequence[Cutout], rng: np.random.Generator, min_visible: float
) -> tuple[PIL.Image.Image, list[Instance]]:
    """Objects at chance places, later ones above earlier ones; one for which no place keeps all visible enough is left out."""
    picture = background.convert("RGB")
    owner = np.zeros((picture.height, picture.width), dtype=np.int64)
    # number of the uppermost object of each pixel, from 1 on
    labels, whole, visible = [], [0], [0]
    # pixels of each object, and those still seen; index 0 is the background
    for cutout in cutouts:
        scaled = _scaled(cutout.picture, rng, min(picture.size))
        alpha = np.asarray(scaled.getchannel("A")) >= OPAQUE
        if min(scaled.size) < MIN_SIDE or not alpha.any():
            continue
        for _ in range(NUM_PLACES):
            left = int(rng.integers(picture.width - scaled.width + 1))
            top = int(rng.integers(picture.height - scaled.height + 1))
            below = owner[top : top + scaled.height, left : left + scaled.width]
            covered = np.bincount(below[alpha], minlength=len(whole))
            if all(visible[n] - covered[n] >= min_visible * whole[n] for n in range(1, len(whole))):
                picture.paste(scaled, (left, top), scaled)
                below[alpha] = len(whole)
                visible = [pixels - int(hidden) for pixels, hidden in zip(visible, covered, strict=True)]
                labels.append(cutout.label)
                whole.append(int(alpha.sum()))
                visible.append(whole[-1])
                break
    return picture, [
        Instance(label, box_of(owner == number), visible[number] / whole[number]) for number, label in enumerate(labels, 1)
    ]


def _scaled(cutout: PIL.Image.Image, rng: np.random.Generator, side: int) -> PIL.Image.Image:
    """A cut-out of a chance size, turned and mirrored by chance."""
    longest = side * float(rng.uniform(*SHARE_OF_SIDE))
    scale = longest / max(cutout.size)
    size = max(1, round(cutout.width * scale)), max(1, round(cutout.height * scale))
    picture = cutout.resize(size, PIL.Image.Resampling.LANCZOS)
    if rng.random() < 0.5:
        picture = picture.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    turn = float(rng.uniform(-MAX_TURN_DEGREES, MAX_TURN_DEGREES))
    return picture.rotate(turn, PIL.Image.Resampling.BICUBIC, expand=True)


@dataclass(frozen=True)
class InstancePasting:
    """Numbered pictures, each with a question that counts and one that asks for boxes."""

    pictures: Path
    # backgrounds
    cutouts: CutoutSource
    num_pictures: int
    seed: int = 0
    num_objects: tuple[int, int] = (1, 12)
    min_visible: float = 0.7
    side: int = 640
    # longest of a made picture, in pixels

    name = "instance-pasting"

    def __post_init__(self) -> None:
        low, high = self.num_objects
        if not 1 <= low <= high <= 200:
            raise InputError(f"{low} to {high} objects a picture; give a range in 1..200, the smaller number first")
        if not 0.0 < self.min_visible <= 1.0:
            raise InputError(f"the least visible share is {self.min_visible:g}; give a number above 0, at most 1")
        if self.num_pictures < 1 or self.side < 64:
            raise InputError(f"{self.num_pictures} pictures of {self.side} pixels; give at least 1 of at least 64")

    @property
    def settings(self) -> Mapping[str, Any]:
        """See `Recipe.settings`."""
        names = ("seed", "min_visible", "side")
        return {name: getattr(self, name) for name in names} | {"num_objects": list(self.num_objects)}

    @cached_property
    def _backgrounds(self) -> list[str]:
        return find_media(self.pictures, PICTURE_ENDINGS)

    def jobs(self) -> Sequence[str]:
        """One for each picture to make."""
        return [f"{number:06d}" for number in range(self.num_pictures)]

    def make(self, job: str) -> list[MadeSample]:
        """See `Recipe.make`."""
        rng = job_rng(self.seed, job)
        path = self.pictures / pick(rng, self._backgrounds)
        background = open_image(path)
        background.thumbnail((self.side, self.side), PIL.Image.Resampling.BICUBIC)
        if min(background.size) < 64:
            raise InputError(f"{path}: {background.width}x{background.height} pixels at this size; too small to paste on")
        present = self.cutouts.labels_in(path)
        labels = [label for label in self.cutouts.labels if label not in present]
        if not labels:
            return []
        chosen = [labels[number] for number in rng.permutation(len(labels))[: int(rng.integers(1, MAX_LABELS + 1))]]
        cutouts = []
        for _ in range(int(rng.integers(self.num_objects[0], self.num_objects[1] + 1))):
            label = pick(rng, chosen)
            cutouts.append(self.cutouts.read(label, int(rng.integers(self.cutouts.num_cutouts(label)))))
        picture, instances = paste(background, cutouts, rng, self.min_visible)
        if not instances:
            return []
        return self._samples(job, rng, picture, instances)

    def _samples(
        self, job: str, rng: np.random.Generator, picture: PIL.Image.Image, instances: list[Instance]
    ) -> list[MadeSample]:
        file = io.BytesIO()
        picture.save(file, "PNG")
        name = f"pictures/{job}.png"
        label = pick(rng, sorted({instance.label for instance in instances}))
        wanted = [instance for instance in instances if instance.label == label]
        # From left to right, as one reads.
        ordered = sorted(wanted, key=lambda instance: instance.box)
        boxes = [{"label": label, "box": list(instance.box)} for instance in ordered]
        truth = {
            "label": label,
            "count": len(wanted),
            "instances": [
                {"label": thing.label, "box": list(thing.box), "visible_share": round(thing.visible_share, 4)}
                for thing in instances
            ],
        }
        questions = (
            ("counting", pick(rng, COUNT_PROMPTS), f"{len(wanted)}."),
            ("grounding", pick(rng, BOX_PROMPTS), json.dumps(boxes)),
        )
        return [
            MadeSample(
                [user(image_part(name), text_part(prompt.format(label))), assistant(answer)],
                task,
                truth,
                {name: file.getvalue()},
            )
            for task, prompt, answer in questions
        ]
