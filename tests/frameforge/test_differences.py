"""Pairs that differ: edits are what the scenes differ by, boxes are where pixels differ, disturbances are no edits."""

from collections import Counter

import numpy as np
import pytest

from openkeye.common.checks import InputError
from openkeye.frameforge.differences import DISTURBANCES, EDITS, PairSettings, make_pair, thing_name

USUAL, CLEAN = PairSettings(), PairSettings(max_disturbances=0)


def pairs(num: int, settings: PairSettings = USUAL):
    return [make_pair(np.random.default_rng([3, number]), settings) for number in range(num)]


def look(track):
    """All about a thing but its place."""
    return track.sprite, track.colour, track.texture, track.size


def test_every_edit_and_disturbance_comes_and_some_pairs_have_none():
    made = pairs(60)
    assert {edit.kind for pair in made for edit in pair.edits} == set(EDITS)
    assert {name for pair in made for name in pair.disturbances} == set(DISTURBANCES)
    negatives = [pair for pair in made if not pair.edits]
    assert 3 <= len(negatives) <= 25 and all(pair.disturbances for pair in negatives)


def test_edits_are_what_the_scenes_differ_by():
    for pair in pairs(60):
        first, second = (list(scene.tracks) for scene in pair.scenes)
        gone = {edit.before for edit in pair.edits if edit.before is not None}
        come = {edit.after for edit in pair.edits if edit.after is not None}
        # What no edit names is the same in both, as a bag of looks.
        assert Counter(look(t) for n, t in enumerate(first) if n not in gone) == Counter(
            look(t) for n, t in enumerate(second) if n not in come
        )
        for edit in pair.edits:
            assert edit.description.startswith(f"{edit.kind} the ")
            if edit.kind in ("add", "remove"):
                assert (edit.before is None) == (edit.kind == "add") and (edit.after is None) == (edit.kind == "remove")
                continue
            before, after = first[edit.before], second[edit.after]
            changed = {"recolour": "colour", "resize": "size", "retext": "sprite"}.get(edit.kind)
            differing = {
                name for name in ("sprite", "colour", "texture", "size") if getattr(before, name) != getattr(after, name)
            }
            assert differing == ({changed} if changed else set()), edit
            if edit.kind == "move":
                assert np.abs(np.subtract(before.path[0][1:], after.path[0][1:])).max() > 0.15
            assert thing_name(before) in edit.description


def test_boxes_are_where_pixels_differ():
    for pair in pairs(25, CLEAN):
        first, second = (picture.astype(int) for picture in pair.draw(200))
        differs = np.abs(first - second).max(-1) > 40
        boxes = list(pair.boxes)
        if any(edit.kind == "move" for edit in pair.edits):
            continue
        inside = np.zeros_like(differs)
        for x1, y1, x2, y2 in boxes:
            # (the rim and the smaller of two sizes aside)
            inside[max(0, y1 // 5 - 6) : y2 // 5 + 6, max(0, x1 // 5 - 6) : x2 // 5 + 6] = True
            assert differs[y1 // 5 : y2 // 5 + 1, x1 // 5 : x2 // 5 + 1].any(), (pair.edits, (x1, y1, x2, y2))
        grown = 20 if any(edit.kind == "resize" for edit in pair.edits) else 0
        assert (differs & ~inside).sum() <= grown * len(boxes) * 20
        assert bool(boxes) == bool(differs.any())


def test_disturbances_change_pixels_and_not_the_edits():
    for pair in pairs(40, PairSettings(negative_share=1.0)):
        assert pair.edits == () and pair.boxes == []
        first, second = pair.draw(112)
        assert np.abs(first.astype(int) - second.astype(int)).max() > 0, pair.disturbances
        assert Counter(map(look, pair.scenes[0].tracks)) == Counter(map(look, pair.scenes[1].tracks))


def test_the_same_seed_is_the_same_pair_and_bounds_are_told():
    one, other = make_pair(np.random.default_rng(1)), make_pair(np.random.default_rng(1))
    assert one == other
    np.testing.assert_array_equal(one.draw(112)[1], other.draw(112)[1])
    for wrong in ({"max_things": 12}, {"max_edits": 4}, {"negative_share": 2.0}):
        with pytest.raises(InputError):
            PairSettings(**wrong)
