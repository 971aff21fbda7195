"""Pictures and videos that are damaged, or made to fill a memory or keep a decoder busy. All are small files."""

import io
import struct
import zlib
from fractions import Fraction

import av
import PIL.Image

from openkeye.inputs.processor import BUNDLED_DIR

DEMO = BUNDLED_DIR.parent.parent / "media" / "demo.mp4"

PICTURE_KINDS = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "gif": "image/gif",
    "bmp": "image/bmp",
    "tiff": "image/tiff",
}
VIDEO_CODECS = {
    "mp4": "libx264",
    "matroska": "libx264",
    "webm": "libvpx-vp9",
    "avi": "mpeg4",
    "mov": "libx264",
    "mpegts": "libx264",
}


def picture(kind: str, width: int = 64, height: int = 64) -> bytes:
    """A picture of noise, so that its data fill most of the file."""
    content = io.BytesIO()
    PIL.Image.effect_noise((width, height), 90).convert("RGB").save(content, kind)
    return content.getvalue()


def video(container: str, num_frames: int = 10) -> bytes:
    """A grey clip."""
    content = io.BytesIO()
    with av.open(content, "w", format=container) as writer:
        stream = writer.add_stream(VIDEO_CODECS[container], rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(num_frames):
            frame = av.VideoFrame(64, 64, "yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            writer.mux(stream.encode(frame))
        writer.mux(stream.encode())
    return content.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes, data: bytes = b"") -> bytes:
    """A PNG of one bit a pixel whose header says what it wants."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = [png_chunk(b"IHDR", header), *chunks, png_chunk(b"IDAT", data or zlib.compress(bytes(99))), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def inflating_png(side: int) -> bytes:
    """A whole PNG of black pixels, a thousand times larger when it is unpacked."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    return png(side, side, data=data)


def chatty_png() -> bytes:
    """Its text unpacks to 256 MiB."""
    packer = zlib.compressobj(9)
    text = b"".join(packer.compress(bytes(1 << 20)) for _ in range(256)) + packer.flush()
    return png(16, 16, png_chunk(b"zTXt", b"Comment\0\0" + text))


def resized_jpeg(width: int, height: int) -> bytes:
    """A JPEG whose header was changed."""
    content = bytearray(picture("jpeg"))
    place = content.index(b"\xff\xc0")
    content[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def resized_webp(width: int, height: int) -> bytes:
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    inner = picture("webp")[12:]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


def resized_bmp(width: int, height: int) -> bytes:
    content = bytearray(picture("bmp"))
    content[18:26] = struct.pack("<ii", width, height)
    return bytes(content)


def gif(width: int, height: int, num_frames: int) -> bytes:
    """Frames of one pixel each on a canvas of any size: 24 bytes a frame."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"\x21\xf9\x04\x04\x02\x00\x00\x00" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return head + frame * num_frames + b";"


def repeating_vp9(side: int, num_frames: int) -> bytes:
    """One picture and then packets of a byte: show it again."""
    content = io.BytesIO()
    with av.open(content, "w", format="webm") as writer:
        stream = writer.add_stream("libvpx-vp9", rate=30, options={"cpu-used": "8", "deadline": "realtime"})
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame(side, side, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        frame.pts, frame.time_base = 0, Fraction(1, 30)
        for packet in [*stream.encode(frame), *stream.encode()]:
            writer.mux(packet)
        for number in range(1, num_frames):
            packet = av.Packet(b"\x88")
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, 30), number, number
            writer.mux(packet)
    return content.getvalue()


def patched_demo(kind: bytes, place: int, value: bytes) -> bytes:
    """The bundled clip with bytes changed in the content of its first box of a kind."""
    content = bytearray(DEMO.read_bytes())
    start = content.index(kind) + 4 + place
    content[start : start + len(value)] = value
    return bytes(content)


def endless_mp4(num_samples: int) -> bytes:
    """The bundled clip, whose index now says that there are this many frames of one byte."""
    content = bytearray(patched_demo(b"stsz", 4, struct.pack(">II", 1, num_samples)))
    for kind, place in ((b"stts", 8), (b"stsc", 12)):
        start = content.index(kind) + 4 + place
        content[start : start + 4] = struct.pack(">I", num_samples)
    return bytes(content)


def mp4_box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content


def endless_fragment(num_samples: int) -> bytes:
    """A fragment behind the bundled clip that states frames without sizes."""
    run = mp4_box(b"trun", struct.pack(">II", 0, num_samples))
    header = mp4_box(b"tfhd", struct.pack(">IIII", 0x000018, 1, 1, 1))
    return DEMO.read_bytes() + mp4_box(b"moof", mp4_box(b"mfhd", bytes(8)) + mp4_box(b"traf", header + run))


def packed_index_mp4() -> bytes:
    """Its index is compressed, and could unpack to anything."""
    head = mp4_box(b"ftyp", b"isom\0\0\0\0isom")
    return head + mp4_box(b"moov", mp4_box(b"cmov", mp4_box(b"dcom", b"zlib") + mp4_box(b"cmvd", bytes(4))))


def growing_avi(side: int) -> bytes:
    """Its header says 64x64, its frames are JPEGs that say otherwise."""
    content = io.BytesIO()
    with av.open(content, "w", format="avi") as writer:
        stream = writer.add_stream("mjpeg", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuvj420p"
        for number in range(5):
            packet = av.Packet(resized_jpeg(side, side))
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, 10), number, number
            packet.is_keyframe = True
            writer.mux(packet)
    return content.getvalue()
