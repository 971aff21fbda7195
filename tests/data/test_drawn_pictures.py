"""Records drawn together keep their order among pictures that come as pixels."""

import numpy as np
import pytest
import torch

from openkeye.data.document import JointlyDrawn, PixelPictures, draw_pictures
from openkeye.data.drawn_pictures import DrawnPictures
from openkeye.data.sources.frameforge import still_pictures
from openkeye.frameforge.stills import make_still


def still(seed: int, height: int, width: int) -> DrawnPictures:
    return still_pictures(make_still(np.random.default_rng(seed)), height, width, seed)


def test_pixels_and_drawings_come_in_order():
    grey = PixelPictures([np.full((2, 56, 84, 3), 100, np.uint8)])
    records = [still(0, 112, 140), grey, still(1, 168, 112), still(2, 112, 140), grey]
    assert isinstance(records[0], JointlyDrawn) and not isinstance(grey, JointlyDrawn)
    drawn = draw_pictures(records, "cpu")
    assert drawn.grid_thw.tolist() == [[1, 8, 10], [1, 4, 6], [1, 4, 6], [1, 12, 8], [1, 8, 10], [1, 4, 6], [1, 4, 6]]
    assert torch.equal(drawn.pixels, torch.cat([record.patches("cpu").pixels for record in records]))
    assert draw_pictures([], "cpu") is None


def test_a_wide_picture_shows_all_that_its_scene_holds():
    scene = make_still(np.random.default_rng(5))
    for height, width in ((112, 224), (224, 112), (140, 140)):
        record = still_pictures(scene, height, width, 0)
        rows, canvas = record.job.instances, record.canvas
        half = rows[:, 4] * canvas
        assert (np.abs(rows[:, 2] - 0.5) * canvas + half <= width / 2 + 0.03 * min(height, width)).all()
        assert (np.abs(rows[:, 3] - 0.5) * canvas + half <= height / 2).all()


@pytest.mark.parametrize(("canvas", "height"), [(100, 56), (112, 140), (112, 0)])
def test_a_picture_lies_in_its_canvas(canvas, height):
    with pytest.raises(ValueError, match="must lie in its canvas"):
        DrawnPictures(still(0, 112, 112).job, canvas, height, 56, 0)
