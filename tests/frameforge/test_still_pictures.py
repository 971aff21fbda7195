"""Boxes of still pictures are where the pixels are."""

from dataclasses import replace

import numpy as np
import pytest

from openkeye.frameforge.catalogue import COLOURS, SHAPES
from openkeye.frameforge.render import render
from openkeye.frameforge.scene import Background
from openkeye.frameforge.still_pictures import draw_still, object_boxes, still_job
from openkeye.frameforge.stills import make_still

GREY = (90.0, 90.0, 90.0)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (112, 112), (140, 224)])
def test_a_box_is_what_its_colour_covers(height, width):
    scene = make_still(np.random.default_rng(3))
    first = scene.objects[0]
    for sprite in range(len(SHAPES) + 3):
        track = replace(first, sprite=sprite, colour=2, texture=0, size=sprite % 2)
        one = replace(scene, tracks=(track,), background=Background("plain", GREY, GREY, 0.0))
        job, canvas = still_job(one, height, width)
        pixels = render(job, canvas, "cpu")[0].numpy().astype(float)
        top, left = (canvas - height) // 2, (canvas - width) // 2
        pixels = pixels[top : top + height, left : left + width]
        colour = np.array(list(COLOURS.values())[2])
        # Half covered, or more: nearer to the sprite's colour than to its dark rim.
        is_there = np.abs(pixels - colour).max(-1) < 0.5 * np.abs(colour - 18).max()
        rows, columns = np.flatnonzero(is_there.any(1)), np.flatnonzero(is_there.any(0))
        (x1, y1, x2, y2), seen = object_boxes(one, height, width)[0], (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        ours = np.array([x1 * width, y1 * height, x2 * width, y2 * height]) / 1000
        assert np.abs(ours - seen).max() <= 2.0, (sprite, ours, seen)


def test_a_picture_depends_on_its_seed_alone():
    scene = make_still(np.random.default_rng(3))
    assert np.array_equal(draw_still(scene, 112, 140, 5), draw_still(scene, 112, 140, 5))
    assert draw_still(scene, 112, 140, 5).shape == (112, 140, 3)
