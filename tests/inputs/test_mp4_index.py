"""The index of an mp4 file is believed only up to a point, and other files are left alone."""

import io
import struct

import av
import numpy as np
import pytest

from openkeye.common.checks import InputError
from openkeye.inputs.mp4_index import MAX_SAMPLES, check_mp4_index
from openkeye.inputs.video_scan import scan_video
from tests.inputs import broken_media
from tests.inputs.broken_media import DEMO, mp4_box


def sound(num_seconds: int) -> bytes:
    """A mov file of plain samples: each is a frame of its index."""
    content = io.BytesIO()
    with av.open(content, "w", format="mov") as writer:
        stream = writer.add_stream("pcm_s16le", rate=48_000)
        for second in range(num_seconds):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 48_000), dtype=np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = 48_000, second * 48_000
            writer.mux(stream.encode(frame))
        writer.mux(stream.encode())
    return content.getvalue()


@pytest.mark.parametrize("container", broken_media.VIDEO_CODECS)
def test_real_files_pass(container, tmp_path):
    content = broken_media.video(container)
    (tmp_path / "clip").write_bytes(content)
    check_mp4_index("clip", content)
    check_mp4_index("clip", tmp_path / "clip")
    assert len(scan_video(content).pts_F) >= 9


def test_fragments_and_long_plain_sound_pass():
    fragmented = io.BytesIO()
    with (
        av.open(str(DEMO)) as reader,
        av.open(fragmented, "w", "mp4", options={"movflags": "frag_keyframe+empty_moov"}) as writer,
    ):
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                writer.mux(packet)
    assert b"trun" in fragmented.getvalue()
    assert len(scan_video(fragmented.getvalue()).pts_F) == len(scan_video(DEMO).pts_F)
    content = bytearray(sound(2))
    place = content.index(b"stsz") + 4
    assert struct.unpack_from(">II", content, place + 4)[1] == 96_000
    for kind, at in ((b"stsz", 8), (b"stts", 8)):
        struct.pack_into(">I", content, content.index(kind) + 4 + at, MAX_SAMPLES + 1)
    check_mp4_index("sound", bytes(content))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: broken_media.endless_mp4(MAX_SAMPLES + 1), "its index states 4,194,305 frames"),
        (lambda: broken_media.endless_fragment(2**32 - 1), "its index states 4,294,967,295 frames"),
        (broken_media.packed_index_mp4, "its index is compressed"),
    ],
)
def test_an_index_that_would_fill_the_memory_is_refused(make, said, tmp_path):
    (tmp_path / "bomb.mp4").write_bytes(make())
    for content in (make(), tmp_path / "bomb.mp4"):
        with pytest.raises(InputError, match=f"bomb: {said}"):
            check_mp4_index("bomb", content)


def test_damage_ends_the_walk():
    for tail in (
        b"\0\0\0\1moov",
        struct.pack(">I", 4) + b"trak",
        bytes(3),
        mp4_box(b"moov", b"\xff\xff\xff\xfftrak" + bytes(40)),
    ):
        check_mp4_index("clip", mp4_box(b"ftyp", b"isom") + tail)
    check_mp4_index("clip", mp4_box(b"ftyp", b"isom") + mp4_box(b"moov", b"") * 100_000)
    with pytest.raises(InputError, match="states 4,294,967,295"):
        # (a box of size 0 reaches to the end, one of size 1 has a longer size behind its name)
        large = (
            struct.pack(">I4sQ", 1, b"moov", 16 + 8 + 12 + 8)
            + struct.pack(">I", 0)
            + b"trun"
            + struct.pack(">II", 0, 2**32 - 1)
        )
        check_mp4_index("clip", mp4_box(b"ftyp", b"isom") + large)
