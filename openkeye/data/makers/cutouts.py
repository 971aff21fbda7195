"""Objects cut out of pictures: a folder of pictures with transparency, or COCO annotations with their pictures."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image

from openkeye.common.checks import InputError
from openkeye.data.makers.media_folder import find_media
from openkeye.inputs.image import open_image

OPAQUE = 128
# alpha from which a pixel counts as the object's
MIN_COCO_SIDE = 24
# pixels of the shorter side of an object that is worth cutting out
EDGE_CLEARANCE = 2
# pixels from the picture's edge within which a COCO object counts as cut by it


@dataclass(frozen=True)
class Cutout:
    """One object: RGBA, cropped to what is opaque."""

    label: str
    picture: PIL.Image.Image


class CutoutSource(Protocol):
    """Cut-outs by label."""

    @property
    def labels(self) -> Sequence[str]:
        """The names of things, ascending."""
        ...

    def num_cutouts(self, label: str) -> int:
        """How many there are of a label, at least 1."""
        ...

    def read(self, label: str, number: int) -> Cutout:
        """InputError where it cannot be read or nothing of it is opaque."""
        ...

    def labels_in(self, background: Path) -> frozenset[str]:
        """What is known to be in a background picture already: pasting more of it would make the count wrong."""
        ...


def cropped(label: str, picture: PIL.Image.Image, source: str) -> Cutout:
    """A cut-out without its empty margins."""
    mask = np.asarray(picture.getchannel("A")) >= OPAQUE
    if not mask.any():
        raise InputError(f"{source}: nothing in it is opaque; give a cut-out with an alpha channel")
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return Cutout(label, picture.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)))


@dataclass(frozen=True)
class CutoutFolder:
    """PNG or WebP files with transparency; the label is the name of a file's folder below `folder`, else its own name without
    a number at its end (`dog_03.png` is a dog)."""

    folder: Path

    @cached_property
    def _files(self) -> Mapping[str, list[str]]:
        files: dict[str, list[str]] = {}
        for name in find_media(self.folder, (".png", ".webp")):
            path = Path(name)
            label = path.parent.name or re.sub(r"[\s_-]*\d+$", "", path.stem)
            files.setdefault((label or path.stem).replace("_", " "), []).append(name)
        return files

    @property
    def labels(self) -> Sequence[str]:
        """See `CutoutSource`."""
        return sorted(self._files)

    def num_cutouts(self, label: str) -> int:
        """See `CutoutSource`."""
        return len(self._files[label])

    def read(self, label: str, number: int) -> Cutout:
        """See `CutoutSource`."""
        path = self.folder / self._files[label][number]
        # The checks of every picture first; it would lay transparency on white.
        open_image(path)
        with PIL.Image.open(path) as opened:
            picture = opened.convert("RGBA")
        if np.asarray(picture.getchannel("A")).min() >= OPAQUE:
            raise InputError(f"{path}: all of it is opaque; give a cut-out with an alpha channel")
        return cropped(label, picture, str(path))

    def labels_in(self, background: Path) -> frozenset[str]:
        """Nothing is known."""
        return frozenset()


@dataclass(frozen=True)
class CocoCutouts:
    """Objects of a COCO annotation file (polygons or run lengths), those that are whole: no crowds, none cut by the edge."""

    annotations: Path
    pictures: Path

    @cached_property
    def _content(self) -> tuple[dict[str, list[dict[str, Any]]], dict[int, dict[str, Any]], dict[str, frozenset[str]]]:
        """Objects by label, pictures by id, labels by the picture's file name."""
        try:
            content = json.loads(self.annotations.read_text(encoding="utf-8"))
            names = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
            pictures = {entry["id"]: entry for entry in content["images"]}
            objects: dict[str, list[dict[str, Any]]] = {}
            present: dict[str, set[str]] = {}
            for entry in content["annotations"]:
                label, picture = names[entry["category_id"]], pictures[entry["image_id"]]
                present.setdefault(Path(picture["file_name"]).name, set()).add(label)
                if _is_whole(entry, picture):
                    objects.setdefault(label, []).append(entry)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.annotations}: not a COCO annotation file ({error!r}); give an instances_*.json") from error
        if not objects:
            raise InputError(f"{self.annotations}: no whole object of {MIN_COCO_SIDE} pixels or more; give another file")
        return objects, pictures, {name: frozenset(labels) for name, labels in present.items()}

    @property
    def labels(self) -> Sequence[str]:
        """See `CutoutSource`."""
        return sorted(self._content[0])

    def num_cutouts(self, label: str) -> int:
        """See `CutoutSource`."""
        return len(self._content[0][label])

    def read(self, label: str, number: int) -> Cutout:
        """See `CutoutSource`."""
        objects, pictures, _ = self._content
        entry = objects[label][number]
        stated = pictures[entry["image_id"]]
        path = self.pictures / stated["file_name"]
        picture = open_image(path)
        if picture.size != (stated["width"], stated["height"]):
            raise InputError(f"{path}: {picture.size}, but its annotation says {stated['width']}x{stated['height']}")
        mask = segmentation_mask(entry["segmentation"], stated["height"], stated["width"], f"{path}, object {entry['id']}")
        picture.putalpha(PIL.Image.fromarray(mask * np.uint8(255)))
        return cropped(label, picture, f"{path}, object {entry['id']}")

    def labels_in(self, background: Path) -> frozenset[str]:
        """Labels that the annotations know in a picture of this name."""
        return self._content[2].get(background.name, frozenset())


def _is_whole(entry: Mapping[str, Any], picture: Mapping[str, Any]) -> bool:
    left, top, width, height = entry["bbox"]
    inside = left >= EDGE_CLEARANCE and top >= EDGE_CLEARANCE
    inside &= left + width <= picture["width"] - EDGE_CLEARANCE and top + height <= picture["height"] - EDGE_CLEARANCE
    return inside and not entry.get("iscrowd") and min(width, height) >= MIN_COCO_SIDE


def segmentation_mask(segmentation: Any, height: int, width: int, source: str) -> np.ndarray:
    """[height, width] uint8, 1 inside: polygons, or run lengths as numbers or packed text.

    Raises:
        InputError: it is none of these, or pycocotools is not installed.
    """
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise InputError("COCO annotations need pycocotools; `pip install openkeye[coco]`, or give --cutouts") from error
    try:
        if isinstance(segmentation, list):
            runs = coco.merge(coco.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            runs = coco.frPyObjects(segmentation, height, width)
        else:
            runs = segmentation
        mask = coco.decode(runs)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise InputError(f"{source}: its segmentation is neither polygons nor run lengths ({error!r})") from error
    if mask.shape != (height, width):
        raise InputError(f"{source}: its segmentation is of {mask.shape}, expected {(height, width)}")
    return mask
