"""OCR: the same text, or how near to it, after normalising case, blanks and punctuation."""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from openkeye.tasks.rewards.reading import answer_text
from openkeye.tasks.rewards.reward import fact
from openkeye.tasks.task import Example, Response

MAX_COMPARED = 4096
# characters; the edit distance of two texts of this length takes a tenth of a second


def normalised(text: str) -> str:
    """Letters and figures alone, in one case and one Unicode form. Points and signs inside of a number stay: 1.5 is not 15."""
    text = unicodedata.normalize("NFKC", text[: 4 * MAX_COMPARED]).casefold()
    kept = []
    for place, letter in enumerate(text):
        is_in_number = letter in ".,:/-" and text[place - 1 : place].isdigit() and text[place + 1 : place + 2].isdigit()
        if letter.isalnum() or is_in_number or unicodedata.category(letter)[0] == "M":
            kept.append(letter)
    return "".join(kept)


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's distance, a row at a time."""
    if not first or not second:
        return len(first) + len(second)
    letters = np.frombuffer(second.encode("utf-32-le"), np.uint32)
    steps = np.arange(len(letters) + 1)
    row = steps.copy()
    for number, letter in enumerate(np.frombuffer(first.encode("utf-32-le"), np.uint32), 1):
        changed = np.empty_like(row)
        changed[0] = number
        changed[1:] = np.minimum(row[1:] + 1, row[:-1] + (letters != letter))
        # What is inserted from the left: the running minimum of what each place costs without its own insertions.
        row = np.minimum.accumulate(changed - steps) + steps
    return int(row[-1])


def text_similarity(predicted: str, truth: str) -> float:
    """1 minus the edit distance over the longer text's length, after normalising."""
    ours, theirs = normalised(predicted)[: 2 * MAX_COMPARED], normalised(truth)[:MAX_COMPARED]
    longest = max(len(ours), len(theirs))
    if len(ours) > 2 * len(theirs):
        return 0.0
    return 1.0 - edit_distance(ours, theirs) / longest if longest else 1.0


@dataclass(frozen=True)
class OcrReward:
    """1 where the texts are the same after normalising; `NAME_similarity` says how near it is."""

    name: str = "ocr"
    is_soft: bool = False
    # the reward itself is the similarity

    async def __call__(self, example: Example, response: Response) -> Mapping[str, float]:
        said, truth = answer_text(response), str(fact(example, "text"))
        similarity = text_similarity(said, truth)
        same = float(bool(said) and normalised(said) == normalised(truth))
        return {self.name: similarity if self.is_soft else same, f"{self.name}_similarity": similarity}
