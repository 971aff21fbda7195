import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openkeye.common.checks import InputError
from openkeye.inputs.sampling import (
    ADAPTIVE_TABLES,
    ImageLimits,
    VideoLimits,
    evenly_spaced,
    limits_from_config,
    plan_video,
    smart_resize,
    video_budget,
)

IMAGE = ImageLimits()


@pytest.mark.parametrize(
    ("size", "expected", "num_tokens"),
    [
        ((480, 640), (476, 644), 391),
        ((1080, 1920), (1092, 1932), 2691),
        ((2160, 3840), (2156, 3836), 10549),
        ((4320, 7680), (2996, 5320), 20330),
        ((20, 20), (56, 56), 4),
        ((42, 42), (56, 56), 4),
        ((70, 70), (56, 56), 4),
        ((14, 1000), (28, 1008), 36),
    ],
)
def test_picture_sizes_are_the_published_ones(size, expected, num_tokens):
    height, width = smart_resize(*size, 28, IMAGE.min_pixels, IMAGE.max_pixels)
    assert (height, width, height * width // 784) == (*expected, num_tokens)


@pytest.mark.parametrize(
    ("adaptive", "seconds", "expected"),
    [
        (None, 10, (20, 336, 588, 252, 5_040)),
        (None, 60, (120, 336, 588, 252, 30_240)),
        (None, 600, (1200, 252, 448, 144, 172_800)),
        (None, 1440, (2880, 168, 280, 60, 172_800)),
        (None, 7200, (2880, 168, 280, 60, 172_800)),
        ("release", 60, (120, 224, 420, 120, 14_400)),
        ("release", 259, (259, 168, 280, 60, 15_540)),
        ("release", 1036, (1036, 168, 280, 60, 62_160)),
        ("release", 2016, (2016, 168, 280, 60, 120_960)),
    ],
)
def test_video_plans_are_the_published_ones(adaptive, seconds, expected):
    plan = plan_video(1080, 1920, seconds * 30, 30, VideoLimits(adaptive=adaptive))
    assert (plan.num_frames, plan.height, plan.width, plan.tokens_per_frame, plan.tokens) == expected


def test_each_adaptive_table_gives_its_shares_up_to_and_with_its_bounds():
    paper, release = VideoLimits(adaptive="paper"), VideoLimits(adaptive="release")
    assert [video_budget(paper, s) for s in (256, 257, 512, 1024, 1025, 9999)] == [23040, 46080, 46080, 92160, 184320, 184320]
    assert [video_budget(release, s) for s in (259, 518, 1036, 2016, 2017)] == [16588.8, 33177.6, 66355.2, 129024, 184320]
    assert video_budget(VideoLimits(), 10) == 184320, "off by default"


def test_several_videos_share_one_budget():
    for num_videos in (1, 2, 3, 7):
        plan = plan_video(1080, 1920, 43200, 12, VideoLimits(), num_videos)
        assert plan.budget == 184320 // num_videos
        assert plan.tokens * num_videos <= 184320
    assert plan_video(1080, 1920, 43200, 12, VideoLimits(adaptive="release"), 2).budget == 92160, "the table is for one video"


@settings(max_examples=300, deadline=None)
@given(
    height=st.integers(16, 3000),
    width=st.integers(16, 3000),
    num_frames=st.integers(1, 400_000),
    fps=st.floats(0.2, 240),
    num_videos=st.integers(1, 5),
    adaptive=st.sampled_from([None, *ADAPTIVE_TABLES]),
    min_tokens=st.integers(1, 256),
)
def test_no_plan_passes_its_budget_or_its_largest_frame(height, width, num_frames, fps, num_videos, adaptive, min_tokens):
    limits = VideoLimits(adaptive=adaptive, min_tokens_per_frame=min_tokens)
    plan = plan_video(height, width, num_frames, fps, limits, num_videos)
    assert plan.tokens <= plan.budget <= 184320 / num_videos
    assert plan.tokens_per_frame <= 256
    assert plan.height % 28 == plan.width % 28 == 0
    assert plan.num_frames == len(np.unique(plan.frame_indices)) <= num_frames


def test_a_requests_own_least_size_counts_in_the_number_of_frames():
    assert plan_video(1080, 1920, 43200, 12, VideoLimits(min_tokens_per_frame=128)).num_frames == 1440


def test_frames_are_evenly_spaced_with_both_ends_and_ties_to_even():
    assert evenly_spaced(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly_spaced(4, 3).tolist() == [0, 2, 3]
    assert evenly_spaced(8, 3).tolist() == [0, 4, 7]
    assert evenly_spaced(300, 1).tolist() == [0]


def test_square_pictures_at_the_bundled_models_size_have_exactly_16_tokens():
    limits = VideoLimits(min_tokens_per_frame=16, max_tokens_per_frame=16, total_tokens=10240)
    plan = plan_video(112, 112, 12 * 30, 30, limits)
    assert (plan.height, plan.width, plan.tokens_per_frame, plan.num_frames) == (112, 112, 16, 24)
    assert plan_video(112, 112, 400 * 30, 30, limits).num_frames == 640


@pytest.mark.parametrize("size", [(10, 2010), (2010, 10), (0, 50)])
def test_absurd_shapes_are_refused_with_the_mend(size):
    with pytest.raises(InputError, match="pixels"):
        smart_resize(*size, 28, IMAGE.min_pixels, IMAGE.max_pixels)


def test_changing_limits_leaves_the_original_and_checks_names():
    limits = VideoLimits()
    assert limits.changed(fps=1.0, num_frames=None).fps == 1.0
    assert limits.changed(max_tokens_per_frame=16).min_tokens_per_frame == 16
    assert limits == VideoLimits()
    with pytest.raises(InputError, match="choose from"):
        limits.changed(frames_per_second=2)
    with pytest.raises(InputError, match="fps"):
        limits.changed(fps=0.0)


def test_a_checkpoints_file_sets_every_limit_and_the_published_ones_are_the_default():
    assert limits_from_config({}, 28) == (ImageLimits(), VideoLimits())
    video = {"fps": 1.0, "min_tokens_per_frame": 8, "max_tokens_per_frame": 32, "total_tokens": 999, "min_frames": 1}
    image, limits = limits_from_config({"min_pixels": 784, "max_pixels": 1568, "video": video}, 28)
    assert image == ImageLimits(784, 1568)
    assert limits == VideoLimits(1.0, 8, 32, 999, 1)
    assert limits_from_config({"size": {"shortest_edge": 784, "longest_edge": 1568}}, 28)[0] == image
