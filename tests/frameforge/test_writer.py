"""Files on disk: decodable, true, the same for the same seed."""

import hashlib
import json

import numpy as np
import pytest
import torch

from openkeye.common.checks import InputError
from openkeye.frameforge import writer
from openkeye.frameforge.render import render, scene_job
from openkeye.frameforge.stream import make_training_clip
from openkeye.frameforge.writer import clip_record, film, make_clip, read_clips, write_clips
from openkeye.inputs.sampling import VideoLimits
from openkeye.inputs.video import read_video


def test_a_film_shows_the_scene_at_the_right_times(tmp_path):
    clip = make_clip(3, 1, seconds=(8.0, 9.0))
    film(clip, tmp_path / "clip.mp4")
    limits = VideoLimits(min_tokens_per_frame=16, max_tokens_per_frame=16, factor=28)
    frames = read_video(tmp_path / "clip.mp4", limits)
    assert abs(frames.duration_seconds - clip.duration_seconds) < 0.01
    drawn = render(scene_job(clip.scene, np.array(frames.times_seconds)), 112, "cpu").float()
    shown = torch.from_numpy(frames.pixels).float()
    assert (drawn - shown).abs().mean() < 6.0


def test_the_same_seed_gives_the_same_files(tmp_path):
    for name in ("a", "b"):
        list(write_clips(tmp_path / name, 2, seed=9, seconds=(8.0, 8.5), num_workers=1))
    lines = [(tmp_path / name / "clips.jsonl").read_text() for name in ("a", "b")]
    assert lines[0] == lines[1]
    first, second = read_clips(tmp_path / "a"), read_clips(tmp_path / "b")
    assert first[0].questions == second[0].questions and first[0].path.read_bytes() == second[0].path.read_bytes()
    assert first[0].questions == make_clip(9, 0, seconds=(8.0, 8.5)).questions


def test_files_and_training_never_share_a_scene():
    files = {tuple(question.text for question in make_clip(0, index).questions) for index in range(50)}
    training = {tuple(q.text for q in make_training_clip(0, index, 24).questions) for index in range(50)}
    assert not files & training


@pytest.mark.parametrize(
    ("tier", "index", "digest"),
    [
        ("standard", 0, "e976d75345daa4e0"),
        ("standard", 7, "2454e5aae20c9373"),
        ("long", 0, "baa1bfed1320399b"),
        ("long", 3, "3d9fdf881534b5b0"),
    ],
)
def test_clips_are_those_of_earlier_releases(tier, index, digest):
    """Scores of one release are compared with another's: whoever changes a clip changes them all."""
    record = json.dumps(clip_record(make_clip(11, index, tier)))
    assert hashlib.sha256(record.encode()).hexdigest()[:16] == digest


def test_a_sparse_film_is_small_and_true(tmp_path):
    clip = make_clip(3, 1, "hour", seconds=(60.0, 61.0))
    film(clip, tmp_path / "clip.mp4")
    limits = VideoLimits(min_tokens_per_frame=16, max_tokens_per_frame=16, factor=28)
    frames = read_video(tmp_path / "clip.mp4", limits)
    assert frames.times_seconds == [number / 2 for number in range(clip.num_frames)]
    drawn = render(scene_job(clip.scene, np.array(frames.times_seconds)), 112, "cpu").float()
    assert (drawn - torch.from_numpy(frames.pixels).float()).abs().mean() < 6.0
    assert (tmp_path / "clip.mp4").stat().st_size < 500_000


def test_the_long_tier_is_minutes_long():
    seconds = [make_clip(0, index, "long").duration_seconds for index in range(40)]
    assert min(seconds) >= 59.9 and max(seconds) <= 300.1 and max(seconds) > 200


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="file/clips: cannot be written"):
        list(write_clips(tmp_path / "file" / "clips", 1, seed=9))


def test_a_film_that_breaks_off_leaves_no_file(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "scene_job", fail)
    with pytest.raises(OSError, match="No space"):
        film(make_clip(3, 1, seconds=(8.0, 9.0)), tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir())


def test_a_line_that_is_no_clip_is_named(tmp_path):
    (tmp_path / "clips.jsonl").write_text('{"video": "a.mp4"}\n')
    with pytest.raises(InputError, match=r"clips.jsonl: line 1 is not a clip's record"):
        read_clips(tmp_path)


def test_a_negative_seed_and_no_workers_are_refused(tmp_path):
    with pytest.raises(InputError, match="the seed is -1"):
        list(write_clips(tmp_path, 1, seed=-1))
    with pytest.raises(InputError, match="workers is -2; give at least 1"):
        list(write_clips(tmp_path, 1, seed=1, num_workers=-2))
