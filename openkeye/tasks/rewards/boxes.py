"""Boxes in [0, 1000] (thousandths of a picture's sides): reading, IoU, duplicates, and one-to-one matching.

Letters: P predicted boxes, G gold boxes.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from openkeye.tasks.rewards.reading import bounded, finite, plain_words, read_json

Box = tuple[float, float, float, float]
# x1, y1, x2, y2

SIDE = 1000.0
MAX_BOXES = 256
# that are looked at; matching takes the cube of their number
BOX_KEYS = ("bbox_2d", "bbox", "box", "box_2d")
NOTHING = (
    "none",
    "nothing",
    "no difference",
    "no differences",
    "no change",
    "no changes",
    "nothing changed",
    "no boxes",
    "no box",
)
QUADRUPLE = re.compile(r"[\[(]\s{0,4}" + r"\s{0,4},\s{0,4}".join([r"(-?\d{1,9}(?:\.\d{1,9})?)"] * 4) + r"\s{0,4}[\])]")


def read_boxes(text: str) -> list[Box] | None:
    """The boxes of an answer, valid or not, at most MAX_BOXES + 1; None where the answer neither holds boxes nor says that
    there are none.

    Understood are JSON (`[x1, y1, x2, y2]`, lists of them, tables with a `bbox_2d` or `bbox`), `[x1, y1, x2, y2]` within words,
    and, for none, `[]` or `none`.
    """
    text = bounded(text)
    value = read_json(text)
    if isinstance(value, list | dict):
        boxes = _boxes_of(value)
        if boxes is not None and (boxes or value == []):
            # (words around the first list may hold more of them)
            more = [_box(match.groups()) for match in QUADRUPLE.finditer(text)] if len(boxes) == 1 else boxes
            return (more if len(more) > len(boxes) else boxes)[: MAX_BOXES + 1]
    found = [_box(match.groups()) for match in QUADRUPLE.finditer(text)]
    if found:
        return found[: MAX_BOXES + 1]
    return [] if plain_words(text) in NOTHING else None


def _boxes_of(value: Any) -> list[Box] | None:
    if isinstance(value, dict):
        inner = next((value[key] for key in (*BOX_KEYS, "boxes", "objects") if key in value), None)
        return None if inner is None else _boxes_of(inner)
    if not isinstance(value, list):
        return None
    if len(value) == 4 and all(finite(part) is not None for part in value):
        return [_box(value)]
    boxes: list[Box] = []
    for part in value[: MAX_BOXES + 1]:
        inside = _boxes_of(part) if isinstance(part, dict) or (isinstance(part, list) and len(part) == 4) else None
        if inside is None or len(inside) != 1:
            return None
        boxes += inside
    return boxes


def _box(parts: Sequence[Any]) -> Box:
    x1, y1, x2, y2 = (float(part) for part in parts)
    return x1, y1, x2, y2


def is_valid(box: Box) -> bool:
    """Whether a box lies in the picture and is not empty."""
    x1, y1, x2, y2 = box
    return 0.0 <= x1 < x2 <= SIDE and 0.0 <= y1 < y2 <= SIDE


def box_iou(predicted: Sequence[Box], gold: Sequence[Box]) -> np.ndarray:
    """Intersection over union: [P, G] float64."""
    first, second = np.array(predicted, float).reshape(-1, 1, 4), np.array(gold, float).reshape(1, -1, 4)
    low, high = np.maximum(first[..., :2], second[..., :2]), np.minimum(first[..., 2:], second[..., 2:])
    shared = np.clip(high - low, 0.0, None).prod(-1)
    areas = [np.clip(boxes[..., 2:] - boxes[..., :2], 0.0, None).prod(-1) for boxes in (first, second)]
    either = areas[0] + areas[1] - shared
    return np.divide(shared, either, out=np.zeros_like(shared), where=either > 0)


def drop_duplicates(boxes: Sequence[Box], duplicate_iou: float) -> tuple[list[Box], int]:
    """(boxes, how many were left out because they lie, with at least this IoU, on one that stays); the first of them stays."""
    if not boxes:
        return [], 0
    alike = box_iou(boxes, boxes) >= duplicate_iou
    kept: list[int] = []
    for number in range(len(boxes)):
        if not alike[number, kept].any():
            kept.append(number)
    return [boxes[number] for number in kept], len(boxes) - len(kept)


def match(similarity_PG: np.ndarray) -> np.ndarray:
    """Hungarian matching: the similarities of the pairs of the best one-to-one matching, [min(P, G)]."""
    from scipy.optimize import linear_sum_assignment

    if not similarity_PG.size:
        return np.zeros(0)
    rows, columns = linear_sum_assignment(1.0 - similarity_PG)
    return similarity_PG[rows, columns]
