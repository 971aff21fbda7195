"""Synthetic differences as tasks: what reaches the reward, what comes back, the same everywhere."""

import ast
import asyncio
from dataclasses import dataclass

import numpy as np
import pytest

from openkeye.common.checks import InputError
from openkeye.frameforge.diagrams import DOMAINS
from openkeye.tasks.differences import KINDS, DifferenceOptions, DifferenceTask
from openkeye.tasks.task import Response


@dataclass(frozen=True)
class SameSet:
    """A stand-in: the share of lines or boxes that are right, minus those that are wrong."""

    name: str = "same_set"

    async def __call__(self, example, response):
        def items(text):
            if text.strip() == "none":
                return set()
            if "boxes" in example.facts:
                return {tuple(box) for box in ast.literal_eval(text)} if text.startswith("[") else {text}
            return set(text.split("\n"))

        truth = items(str(example.facts["boxes"] or "none") if "boxes" in example.facts else example.facts["operations"])
        said = items(response.text)
        if not truth:
            return {self.name: float(not said), "length": len(response.text)}
        return {self.name: (len(truth & said) - len(said - truth)) / len(truth), "length": len(response.text)}


def score(task, example, text):
    return asyncio.run(task.score(example, Response(text)))


@pytest.mark.parametrize("kind", KINDS)
def test_references_score_and_wrong_answers_do_not(kind):
    task = DifferenceTask(kind, SameSet(), DifferenceOptions(seed=3))
    num_negative = 0
    for number in range(25):
        example = task.read(number)
        assert (example.task, example.modality, task.name) == (kind, "image", kind)
        parts = example.messages[0]["content"]
        assert [part["type"] for part in parts] == ["image", "image", "text"]
        assert parts[0]["image"].size == parts[1]["image"].size == (112, 112)
        assert score(task, example, example.facts["reference"])["outcome"] == 1.0
        is_negative = example.facts["reference"] == "none"
        num_negative += is_negative
        assert score(task, example, "none")["outcome"] == float(is_negative)
        # What the reward gives below 0 is no outcome below 0, and stays logged.
        wrong = score(task, example, "add segment(Q, Q)")
        assert wrong["outcome"] == 0.0 and wrong["same_set"] <= 0.0 and wrong["length"] == 17
        if kind == "difference_perception":
            assert all(0 <= a < c <= 1000 and 0 <= b < d <= 1000 for a, b, c, d in example.facts["boxes"])
        else:
            assert example.facts["domain"] in DOMAINS
    assert 1 <= num_negative < 15


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_number_is_the_same_example_and_splits_differ(kind):
    def told(**options):
        example = DifferenceTask(kind, SameSet(), DifferenceOptions(**options)).read(7)
        return example.facts, [np.asarray(part["image"]).tobytes() for part in example.messages[0]["content"][:2]]

    assert told() == told()
    assert told() != told(split="test") and told() != told(seed=1)


def test_options_that_make_no_sense_are_told():
    for options in ({"split": "all"}, {"domains": ("music",)}, {"side": 4}, {"seed": -1}, {"max_edits": 0}):
        with pytest.raises(InputError):
            DifferenceOptions(**options)
    with pytest.raises(InputError, match="kind 'spot' is unknown"):
        DifferenceTask("spot", SameSet())
