"""What `openkeye make-data` makes is a task as it is: pasted objects to count and to find, rendered text to read."""

import asyncio
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import pytest

from openkeye.data.makers.cutouts import CutoutFolder
from openkeye.data.makers.fonts import BUILT_IN
from openkeye.data.makers.instance_pasting import InstancePasting
from openkeye.data.makers.output import OutputFolder
from openkeye.data.makers.rendered_ocr import RenderedOcr
from openkeye.data.makers.run import make_data
from openkeye.tasks.registry import open_task
from openkeye.tasks.task import Response


def pasted(folder: Path) -> InstancePasting:
    (folder / "pictures").mkdir()
    PIL.Image.new("RGB", (160, 120), (128, 128, 128)).save(folder / "pictures" / "grey.png")
    for label, colour in (("ball", (255, 0, 0, 255)), ("box", (0, 0, 255, 255))):
        (folder / "cutouts" / label).mkdir(parents=True)
        cutout = PIL.Image.new("RGBA", (40, 40), (0, 0, 0, 0))
        PIL.ImageDraw.Draw(cutout).ellipse((2, 2, 37, 37), fill=colour)
        cutout.save(folder / "cutouts" / label / "0.png")
    return InstancePasting(folder / "pictures", CutoutFolder(folder / "cutouts"), 6)


def rendered(folder: Path) -> RenderedOcr:
    return RenderedOcr(3, (BUILT_IN,), templates=("sign", "receipt"))


@pytest.mark.parametrize(
    ("recipe_of", "by_task"),
    [
        (pasted, {"counting": {"counting": 1.0}, "grounding": {"grounding": 1.0}}),
        (rendered, {"ocr_text": {"ocr": 1.0}, "ocr_receipt": {"words": 1.0}, "ocr_sign": {"words": 1.0}}),
    ],
)
def test_made_files_are_asked_and_scored(tmp_path, recipe_of, by_task):
    recipe = recipe_of(tmp_path)
    with OutputFolder(tmp_path / "made", recipe.name, recipe.settings) as output:
        make_data(recipe, output, 0.0)
    task = open_task("json_lines", {"path": str(tmp_path / "made" / "data.jsonl"), "name": "made", "rewards_by_task": by_task})
    assert task.num_examples and task.num_examples >= 4
    examples = [task.read(number) for number in range(task.num_examples)]
    for example in examples:
        assert example.modality == "image" and Path(example.messages[0]["content"][0]["image"]).is_file()
        assert asyncio.run(task.score(example, Response(str(example.facts["reference"]))))["outcome"] == 1.0, example.facts
        assert asyncio.run(task.score(example, Response("Nothing that I know.")))["outcome"] == 0.0
    assert {name for example in examples for name in example.facts["rewards"]} <= {n for one in by_task.values() for n in one}
