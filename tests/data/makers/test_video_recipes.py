"""Interleaved segments, scene captions and captions over real files: windows, words and truth."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from openkeye.common.checks import InputError
from openkeye.data.makers.caption import Caption, read_alt_texts
from openkeye.data.makers.interleaved_segments import InterleavedSegments, cut_into_segments
from openkeye.data.makers.scene_captions import SceneCaptions
from openkeye.inputs.intervals import parse_intervals
from openkeye.inputs.messages import split_messages
from openkeye.inputs.sampling import VideoLimits
from openkeye.inputs.video import request_video
from openkeye.inputs.video_scan import scan_video
from tests.data.makers.media import EchoCaptioner, film_clip, forge_frames, panned_frames, write_background, write_film


def test_segments_cover_a_video():
    assert cut_into_segments(47.0, 15.0) == [(0.0, 15.0), (15.0, 30.0), (30.0, 47.0)]
    assert cut_into_segments(50.0, 15.0) == [(0.0, 15.0), (15.0, 30.0), (30.0, 45.0), (45.0, 50.0)]
    assert cut_into_segments(3.0, 15.0) == [(0.0, 3.0)]


def test_every_segment_is_followed_by_its_own_caption_and_no_frame_is_in_two(tmp_path: Path):
    film_clip(tmp_path / "a.mp4", seconds=11.0)
    captioner = EchoCaptioner()
    (made,) = InterleavedSegments(tmp_path, captioner, segment_seconds=3.0).make("a.mp4")
    assert [message["role"] for message in made.messages] == ["user", "assistant"] * 4
    assert [message["content"] for message in made.messages[1::2]] == [
        "a.mp4 0.0-2.999",
        "a.mp4 3.0-5.999",
        "a.mp4 6.0-8.999",
        "a.mp4 9.0-None",
    ]
    assert [(part["start"], part["end"]) for part in made.truth["segments"]] == [(0, 3), (3, 6), (6, 9), (9, 11)]
    scan = scan_video(tmp_path / "a.mp4")
    every = VideoLimits(fps=10.0, total_tokens=1 << 30)
    _, media = split_messages(made.messages)
    seen = [
        request_video(scan, every, 1, part.options["start_seconds"], part.options.get("end_seconds")).frame_numbers
        for part in media
    ]
    assert [len(numbers) for numbers in seen] == [30, 30, 30, 20]
    np.testing.assert_array_equal(np.concatenate(seen), np.arange(110))


def test_long_videos_become_several_samples(tmp_path: Path):
    film_clip(tmp_path / "a.mp4", seconds=10.0)
    samples = InterleavedSegments(tmp_path, EchoCaptioner(), segment_seconds=2.0, max_segments=2).make("a.mp4")
    assert [len(sample.messages) for sample in samples] == [4, 4, 2]
    # Each begins by saying what is wanted.
    assert all(sample.messages[0]["content"][-1]["type"] == "text" for sample in samples)
    assert all(len(message["content"]) == 1 for sample in samples for message in sample.messages[2::2])


def test_scenes_are_captioned_one_by_one_and_an_overview_closes(tmp_path: Path):
    shots = [forge_frames(0, 30), panned_frames("china.jpg", 24), panned_frames("coffee.jpg", 36)]
    write_film(tmp_path / "film.mp4", shots)
    captioner = EchoCaptioner()
    (made,) = SceneCaptions(tmp_path, captioner).make("film.mp4")
    answer = made.messages[-1]["content"]
    assert answer == (
        "From 0.0 to 3.0 seconds. film.mp4 0.0-2.999\n"
        "From 3.0 to 5.4 seconds. film.mp4 3.0-5.399\n"
        "From 5.4 to 9.0 seconds. film.mp4 5.4-None\n"
        "Overview: overview 4"
    )
    assert parse_intervals(answer)[:1] == [(0.0, 3.0)]
    assert [(scene["start"], scene["end"]) for scene in made.truth["scenes"]] == [(0, 3), (3, 5.4), (5.4, 9)]
    # The overview is asked from the scenes' captions, without media.
    (question,) = captioner.asked[-1]
    (part,) = question["content"]
    assert "From 3.0 to 5.4 seconds. film.mp4 3.0-5.399" in part["text"]


@pytest.mark.parametrize("kind", [InterleavedSegments, SceneCaptions])
def test_videos_that_are_none_are_told_before_a_model_is_asked(tmp_path: Path, kind: type):
    (tmp_path / "a.mp4").write_bytes(b"no film")
    captioner = EchoCaptioner()
    with pytest.raises(InputError, match=r"a\.mp4"):
        kind(tmp_path, captioner).make("a.mp4")
    assert not captioner.asked


def test_pictures_and_videos_are_captioned_anew(tmp_path: Path):
    write_background(tmp_path / "pictures" / "a.png")
    film_clip(tmp_path / "a.mp4")
    (made,) = Caption(tmp_path / "pictures", "picture", EchoCaptioner()).make("a.png")
    assert made.messages[-1]["content"] == "picture a.png" and made.task == "recaption"
    (made,) = Caption(tmp_path, "video", EchoCaptioner()).make("a.mp4")
    assert made.messages[-1]["content"] == "a.mp4 None-None"
    assert "video" in made.messages[0]["content"][1]["text"]


def test_alt_texts_are_repaired_where_there_is_one(tmp_path: Path):
    for name in ("a.png", "b.png"):
        write_background(tmp_path / name)
    (tmp_path / "alt.jsonl").write_text('{"file": "b.png", "text": "grey  wall BUY NOW"}\n\n')
    captioner = EchoCaptioner()
    recipe = Caption(tmp_path, "picture", captioner, alt_texts=read_alt_texts(tmp_path / "alt.jsonl"))
    assert recipe.jobs() == ["b.png"]
    (made,) = recipe.make("b.png")
    assert '"grey wall BUY NOW"' in captioner.asked[0][0]["content"][1]["text"]
    assert "BUY NOW" not in made.messages[0]["content"][1]["text"]
    assert made.truth == {"alt_text": "grey wall BUY NOW"} and made.task == "remake"


def test_alt_texts_of_another_form_are_refused(tmp_path: Path):
    (tmp_path / "alt.jsonl").write_text('{"file": "a.png"}\n')
    with pytest.raises(InputError, match=r"alt\.jsonl:1"):
        read_alt_texts(tmp_path / "alt.jsonl")
    write_background(tmp_path / "a.png")
    with pytest.raises(InputError, match="none of its 1 files has an alt text"):
        Caption(tmp_path, "picture", EchoCaptioner(), alt_texts={"other.png": "x"}).jobs()


def test_pictures_that_are_none_are_told_before_a_model_is_asked(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    captioner = EchoCaptioner()
    with pytest.raises(InputError, match=r"a\.png"):
        Caption(tmp_path, "picture", captioner).make("a.png")
    assert not captioner.asked
    PIL.Image.new("RGB", (30, 30)).save(tmp_path / "b.png")
    assert len(Caption(tmp_path, "picture", captioner).make("b.png")) == 1
