"""Looks at the index of an mp4 or mov file before a demuxer unpacks it: a kilobyte there can stand for billions of frames.

Samples of equal size, and fragments that state no sizes, take no room in the file, but some 70 bytes of memory each.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from openkeye.common.checks import InputError

MAX_SAMPLES = 1 << 22
# of a track or fragment: 38 hours of 30 frames a second
MAX_BOXES = 1 << 18

FOLDERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")
FIRST_KINDS = (b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"pnot", b"sidx")
# with which such files begin
HEAD_BYTES = 24
# of a box's content that are looked at


def check_mp4_index(source: str, content: Path | bytes) -> None:
    """Refuse an index that would fill the memory. Files of other kinds pass.

    Raises:
        InputError: a track states more frames than any real file has, or its index is compressed.
    """
    with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as file:
        if file.read(8)[4:] not in FIRST_KINDS:
            return
        is_plain_sound = False
        for kind, head in _boxes(file, 0, file.seek(0, io.SEEK_END)):
            if kind == b"cmov":
                raise InputError(f"{source}: its index is compressed; make it again with `ffmpeg -i INPUT -c copy out.mp4`")
            if kind == b"stts":
                # Uncompressed sound: every sample lasts a tick. It is read in chunks, and may have any number of them.
                is_plain_sound = _number(head, 4) == 1 and _number(head, 12) == 1
            num_samples = {b"stsz": _number(head, 8), b"stz2": _number(head, 8), b"trun": _number(head, 4)}.get(kind, 0)
            if num_samples > MAX_SAMPLES and not (is_plain_sound and kind == b"stsz"):
                raise InputError(
                    f"{source}: its index states {num_samples:,} frames, more than the {MAX_SAMPLES:,} that are read; "
                    "cut it into parts"
                )


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, bytes]]:
    """(kind, first bytes of the content) of each box between two places, and of those within it; damage ends the walk."""
    folders = [(start, end)]
    num_left = MAX_BOXES
    while folders and num_left:
        start, end = folders.pop()
        while start + 8 <= end and num_left:
            num_left -= 1
            file.seek(start)
            header = file.read(16)
            size, kind, num_header = _number(header, 0), header[4:8], 8
            if size == 1:
                size, num_header = int.from_bytes(header[8:16], "big"), 16
            box_end = min(end, start + size) if size else end
            if box_end < start + num_header:
                break
            file.seek(start + num_header)
            yield kind, file.read(min(HEAD_BYTES, box_end - start - num_header))
            if kind in FOLDERS:
                # (what is within comes before what follows)
                folders.append((box_end, end))
                start, end = start + num_header, box_end
            else:
                start = box_end


def _number(content: bytes, place: int) -> int:
    return int.from_bytes(content[place : place + 4], "big")
