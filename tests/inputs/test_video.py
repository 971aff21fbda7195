from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest

from openkeye.common.checks import InputError
from openkeye.inputs.sampling import VideoLimits
from openkeye.inputs.video import Frames, iterate_frames, read_request, read_video, request_video
from openkeye.inputs.video_scan import scan_video
from tests.inputs.clips import (
    Clip,
    barcode,
    copy_with_shift,
    even_times,
    make_audio,
    make_clip,
    read_barcode,
    uneven_times,
)

MILLISECOND = Fraction(1, 1000)
EVERY_FRAME = VideoLimits(fps=1000.0, min_tokens_per_frame=16, max_tokens_per_frame=32)
FEW_FRAMES = VideoLimits(num_frames=4, min_tokens_per_frame=16, max_tokens_per_frame=32)
# four frames of a few seconds lie further apart than keyframes: these are read by seeking


def make_h264(path: Path) -> Clip:
    return make_clip(path, even_times(150, 30))


CLIPS = {
    "constant.mp4": make_h264,
    "no_b_frames.mp4": lambda path: make_clip(path, even_times(150, 30), max_b_frames=0),
    "with_audio.mp4": lambda path: make_clip(path, even_times(100, 25), rate=25, with_audio=True),
    "variable.mp4": lambda path: make_clip(path, uneven_times(100), time_base=MILLISECOND),
    "variable.mkv": lambda path: make_clip(path, uneven_times(100, seed=1), time_base=MILLISECOND),
    "late_start.mkv": lambda path: make_clip(path, even_times(100, 25, start_seconds=2), time_base=MILLISECOND, rate=25),
    "vp9.webm": lambda path: make_clip(path, even_times(60, 20), codec="libvpx-vp9", time_base=MILLISECOND, rate=20),
    "mpeg4.avi": lambda path: make_clip(path, even_times(100, 25), codec="mpeg4", time_base=Fraction(1, 25), rate=25),
    "h264.avi": lambda path: make_clip(path, even_times(100, 25), time_base=Fraction(1, 25), rate=25),
    "variable.avi": lambda path: make_clip(
        path, uneven_times(60), codec="mpeg4", time_base=MILLISECOND, rate=1000, max_b_frames=0
    ),
    "broadcast.ts": lambda path: make_clip(path, even_times(120, 25), time_base=Fraction(1, 90000), rate=25),
    "one_frame.mp4": lambda path: make_clip(path, even_times(1, 25)),
    "animation.gif": lambda path: make_clip(path, even_times(40, 10), codec="gif", time_base=Fraction(1, 100), rate=10),
    "raw.h264": lambda path: make_clip(path, even_times(50, 25), rate=25),
    "edit_list.mp4": lambda path: copy_with_shift(make_h264(path.with_name("whole.mp4")), path, first_shown=37),
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Clip]:
    folder = tmp_path_factory.mktemp("clips")
    return {name: make(folder / name) for name, make in CLIPS.items()}


def worst_time_error(frames: Frames, clip: Clip) -> float:
    """Seconds between a frame's stated time and the true start of the frame whose number the picture shows."""
    numbers = [read_barcode(picture) for picture in frames.pixels]
    return max(abs(clip.times_seconds[number] - time) for number, time in zip(numbers, frames.times_seconds, strict=True))


@pytest.mark.parametrize("name", CLIPS)
def test_every_frame_states_its_own_true_time(clips, name):
    clip = clips[name]
    frames = read_video(clip.path, EVERY_FRAME)
    num_shown = sum(time >= 0 for time in clip.times_seconds)
    assert len(frames.times_seconds) == num_shown, "no frame is lost or doubled"
    assert worst_time_error(frames, clip) <= 1e-3
    assert frames.times_seconds[0] == 0.0


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("limits", [VideoLimits(), FEW_FRAMES], ids=["two_a_second", "few"])
def test_sampled_frames_state_their_own_true_times(clips, name, limits):
    frames = read_video(clips[name].path, limits)
    assert worst_time_error(frames, clips[name]) <= 1e-3
    assert frames.times_seconds == sorted(set(frames.times_seconds))


def test_constant_rate_takes_the_published_indices(clips):
    frames = read_video(clips["constant.mp4"].path)
    expected = np.rint(np.linspace(0, 149, 10)).astype(int)
    assert [read_barcode(picture) for picture in frames.pixels] == expected.tolist()
    assert frames.duration_seconds == pytest.approx(5.0, abs=1e-3)


@pytest.mark.parametrize("name", ["variable.mp4", "variable.mkv", "variable.avi"])
def test_variable_rate_takes_the_frame_on_screen_at_even_moments(clips, name):
    clip = clips[name]
    frames = read_video(clip.path)
    request = request_video(scan_video(clip.path), VideoLimits())
    moments = np.linspace(0, clip.times_seconds[-1], request.plan.num_frames) + 1e-4
    expected = np.unique(np.searchsorted(clip.times_seconds, moments, side="right") - 1)
    assert [read_barcode(picture) for picture in frames.pixels] == expected.tolist()


@pytest.mark.parametrize("name", ["constant.mp4", "broadcast.ts", "late_start.mkv", "edit_list.mp4", "h264.avi", "vp9.webm"])
def test_a_part_of_the_video_lies_between_start_and_end(clips, name):
    frames = read_video(clips[name].path, VideoLimits(fps=5.0), start_seconds=1.3, end_seconds=2.7)
    assert worst_time_error(frames, clips[name]) <= 1e-3
    assert len(frames.times_seconds) == 7
    assert frames.times_seconds[0] == pytest.approx(1.3, abs=0.06) and frames.times_seconds[0] >= 1.3 - 1e-3
    assert frames.times_seconds[-1] == pytest.approx(2.7, abs=0.06) and frames.times_seconds[-1] <= 2.7 + 1e-3


def test_a_held_picture_belongs_to_the_part_in_which_it_is_on_screen(tmp_path):
    times = [Fraction(0), Fraction(1, 2), Fraction(3), Fraction(4), Fraction(9), Fraction(10)]
    clip = make_clip(tmp_path / "slides.mp4", times, time_base=MILLISECOND)
    frames = read_video(clip.path, start_seconds=5.0, end_seconds=8.0)
    assert [read_barcode(picture) for picture in frames.pixels] == [3]
    assert frames.times_seconds == [4.0]


@pytest.mark.parametrize(("start", "end"), [(95, None), (3, 2), (-1, None), (float("nan"), None), (1, 1), (5.0, None)])
def test_parts_outside_the_video_are_refused(clips, start, end):
    with pytest.raises(InputError, match=r"constant\.mp4: (start|end) .*; give"):
        read_video(clips["constant.mp4"].path, start_seconds=start, end_seconds=end)


def test_rotation_is_obeyed(tmp_path):
    clip = make_clip(tmp_path / "portrait.mp4", even_times(20, 10), rate=10, rotation=90)
    # As a telephone held upright writes it: the picture is to be turned a quarter clockwise.
    content = bytearray(clip.path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    turn = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]
    content[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turn)
    clip.path.write_bytes(content)
    scan = scan_video(clip.path)
    assert (scan.height, scan.width) == (160, 96)
    frames = read_video(clip.path)
    assert frames.pixels.shape[1] > frames.pixels.shape[2]
    upright = Frames(np.rot90(frames.pixels, 1, axes=(1, 2)).copy(), frames.times_seconds, "", 0.0)
    assert worst_time_error(upright, clip) <= 1e-3


def test_frames_are_resized_to_the_plan_and_progress_is_told(clips):
    told = []
    frames = read_video(clips["constant.mp4"].path, FEW_FRAMES, on_progress=lambda done, total: told.append((done, total)))
    assert frames.pixels.shape == (4, 84, 168, 3)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_original_size_shows_the_decoded_pixels(clips):
    request = request_video(scan_video(clips["constant.mp4"].path), FEW_FRAMES)
    pictures = list(iterate_frames(request, 96, 160))
    assert np.abs(pictures[1][0].astype(int) - barcode(read_barcode(pictures[1][0]))).mean() < 6


def test_bytes_are_read_like_files(clips):
    clip = clips["constant.mp4"]
    frames = read_request(request_video(scan_video(clip.path.read_bytes(), "upload"), VideoLimits()))
    assert frames.source == "upload"
    assert np.array_equal(frames.pixels, read_video(clip.path).pixels)


def remux_header_first(clip: Clip, path: Path) -> bytes:
    with av.open(str(clip.path)) as reader, av.open(str(path), "w", options={"movflags": "faststart"}) as writer:
        out = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(reader.streams.video[0]):
            if packet.dts is not None:
                packet.stream = out
                writer.mux(packet)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["constant.mp4", "variable.mkv", "vp9.webm", "mpeg4.avi"])
def test_a_truncated_file_gives_what_is_there_and_says_so(clips, name, tmp_path):
    clip, path = clips[name], tmp_path / name
    content = remux_header_first(clip, path) if name.endswith("mp4") else clip.path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    frames = read_video(path)
    assert worst_time_error(frames, clip) <= 1e-3
    assert 0.3 < frames.times_seconds[-1] / clip.times_seconds[-1] < 0.8
    assert any("cut off" in note for note in frames.notes)


@pytest.mark.parametrize("name", ["constant.mp4", "variable.mkv", "broadcast.ts", "mpeg4.avi", "vp9.webm"])
def test_damaged_bytes_lose_frames_and_never_the_rest(clips, name, tmp_path):
    clip, path = clips[name], tmp_path / name
    content = bytearray(clip.path.read_bytes())
    for place in np.random.default_rng(0).integers(len(content) // 3, 2 * len(content) // 3, 12):
        content[place] ^= 0xFF
    path.write_bytes(content)
    frames = read_video(path, EVERY_FRAME)
    assert len(frames.times_seconds) >= 0.4 * len(clip.times_seconds)
    first = Frames(frames.pixels[:10], frames.times_seconds[:10], "", 0.0)
    assert worst_time_error(first, clip) <= 1e-3


def write_picture(path: Path, kind: str) -> Path:
    PIL.Image.fromarray(barcode(5)).save(path, format=kind)
    return path


def write_frameless(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        container.start_encoding()
    return path


def write_thin(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 4096, 16, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 4096, 3), np.uint8))))
        container.mux(stream.encode())
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


BAD_FILES = {
    "missing.mp4": (lambda path: path, "no such file"),
    "empty.mp4": (lambda path: written(path, b""), "empty file"),
    "text.mp4": (lambda path: written(path, b"not a video\n" * 99), "not a readable video"),
    "text.txt": (lambda path: written(path, b"not a video\n" * 99), "text file"),
    "noise.mp4": (lambda path: written(path, np.random.default_rng(0).bytes(4000)), "not a readable video"),
    "headless.mp4": (lambda path: written(path, make_h264(path).path.read_bytes()[:9000]), "not a readable video"),
    "sound.m4a": (make_audio, "holds audio, no moving picture"),
    "sound.mp4": (make_audio, "holds audio, no moving picture"),
    "png.mp4": (lambda path: write_picture(path, "png"), "pass it as an image"),
    "jpeg.mp4": (lambda path: write_picture(path, "jpeg"), "pass it as an image"),
    "frameless.mp4": (write_frameless, "give a file with a video stream"),
    "frameless.mkv": (write_frameless, "make it again"),
    "thin.mp4": (write_thin, "crop it first"),
    "list.m3u8": (lambda path: written(path, b"#EXTM3U\n#EXTINF:1,\nhttp://localhost/a.ts\n"), "video"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_gets_one_line_that_names_it_and_the_mend(name, tmp_path):
    make, expected = BAD_FILES[name]
    path = make(tmp_path / name)
    with pytest.raises(InputError) as caught:
        read_video(path)
    line = str(caught.value)
    assert line.startswith(str(tmp_path / name)) and expected in line and "\n" not in line


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="a folder"):
        read_video(tmp_path)


def test_a_colon_in_a_name_is_no_protocol(tmp_path):
    clip = make_clip(tmp_path / "concat:x.mp4", even_times(5, 10))
    assert worst_time_error(read_video(clip.path), clip) <= 1e-3
