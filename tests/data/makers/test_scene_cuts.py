"""Cuts are found at their frames in filmed shots, and nowhere else."""

from pathlib import Path

import numpy as np
import pytest

from openkeye.common.checks import InputError
from openkeye.data.makers.scene_cuts import LUMA, CutDetector, choose_cuts, find_cuts, scenes_between
from openkeye.inputs.video_scan import scan_video
from tests.data.makers.media import forge_frames, panned_frames, write_film


def test_cuts_between_forged_and_filmed_shots_are_found_to_the_frame(tmp_path: Path):
    shots = [
        forge_frames(0, 30),
        panned_frames("china.jpg", 24),
        forge_frames(1, 40),
        panned_frames("coffee.jpg", 20),
        panned_frames("chelsea.jpg", 33),
    ]
    truth = write_film(tmp_path / "film.mp4", shots)
    assert len(truth) == 4
    np.testing.assert_allclose(find_cuts(scan_video(tmp_path / "film.mp4")), truth, atol=1e-4)


@pytest.mark.parametrize("shot", ["forge-2", "forge-5", "rocket.jpg", "flower.jpg", "brick.jpg"])
def test_a_single_shot_has_no_cut(tmp_path: Path, shot: str):
    frames = forge_frames(int(shot[6:]), 60) if shot.startswith("forge") else panned_frames(shot, 60)
    write_film(tmp_path / "shot.mp4", [frames])
    assert find_cuts(scan_video(tmp_path / "shot.mp4")) == []


def test_a_flash_is_no_cut(tmp_path: Path):
    frames = panned_frames("china.jpg", 40)
    frames[20] = 255
    write_film(tmp_path / "flash.mp4", [frames])
    assert find_cuts(scan_video(tmp_path / "flash.mp4")) == []


def test_colour_alone_and_place_alone_make_a_cut(tmp_path: Path):
    frames = panned_frames("rocket.jpg", 20)
    # The same luma in other colours; the same colours in other places.
    grey = frames.astype(np.float32) @ LUMA
    tinted = np.clip(np.stack([grey + 60, grey - 40, grey + 49], -1), 0, 255).astype(np.uint8)
    flat = np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, -1)
    write_film(tmp_path / "colour.mp4", [flat, tinted])
    assert find_cuts(scan_video(tmp_path / "colour.mp4")) == [pytest.approx(2.0)]
    write_film(tmp_path / "place.mp4", [frames, frames[::-1, ::-1]])
    assert find_cuts(scan_video(tmp_path / "place.mp4")) == [pytest.approx(2.0)]


def test_fast_videos_are_looked_at_in_steps(tmp_path: Path):
    shots = [panned_frames("china.jpg", 60), panned_frames("coffee.jpg", 60)]
    (truth,) = write_film(tmp_path / "fast.mp4", shots, fps=60)
    (found,) = find_cuts(scan_video(tmp_path / "fast.mp4"), CutDetector(max_fps=15))
    assert truth <= found < truth + 4 / 60


def test_a_busy_shot_raises_its_own_threshold():
    times = np.arange(1, 41) / 10
    busy = np.full(40, 0.3)
    busy[20] = 0.55
    assert choose_cuts(times, busy, CutDetector()) == []
    calm = np.full(40, 0.02)
    calm[20] = 0.55
    assert choose_cuts(times, calm, CutDetector()) == [pytest.approx(2.1)]


def test_scenes_cover_the_video():
    scenes = scenes_between([0.3, 4.0, 4.5, 9.8], 10.0, min_seconds=1.0, max_seconds=3.0)
    assert scenes == [(0.0, 2.0), (2.0, 4.0), (4.0, 7.0), (7.0, 10.0)]
    assert scenes_between([], 0.4, 1.0, 60.0) == [(0.0, 0.4)]


def test_thresholds_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match="least distance"):
        CutDetector(least_distance=0.0)
