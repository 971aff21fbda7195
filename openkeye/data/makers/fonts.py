"""Fonts of this machine that can write plain text."""

import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import PIL.ImageFont

from openkeye.common.checks import InputError

FONT_ENDINGS = (".ttf", ".otf", ".ttc")
SYSTEM_FOLDERS = {
    "linux": ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts"),
    "darwin": ("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    "win32": ("C:/Windows/Fonts",),
}
NEEDED = "AaBgQq09$%&.,:;-/()#"
# what templates write; a symbol font draws the same box, or nothing, for all of it
BUILT_IN = "Pillow's own"

Font = PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont


def find_fonts(folder: Path | None = None) -> list[str]:
    """Paths of usable fonts of a folder, or of this machine, ascending; Pillow's own where the machine has none.

    Raises:
        InputError: a folder was given and none of its fonts can be used.
    """
    folders = [folder] if folder is not None else [Path(name).expanduser() for name in SYSTEM_FOLDERS.get(sys.platform, ())]
    paths = sorted(str(path) for root in folders for path in root.rglob("*") if path.suffix.lower() in FONT_ENDINGS)
    usable = [path for path in paths if can_write(path)]
    if folder is not None and not usable:
        raise InputError(f"{folder}: holds no font ({', '.join(FONT_ENDINGS)}) that writes plain text; give another --fonts")
    return usable or [BUILT_IN]


@lru_cache(maxsize=256)
def load_font(path: str, size: int) -> Font:
    """A font at a size in pixels."""
    return PIL.ImageFont.load_default(size) if path == BUILT_IN else PIL.ImageFont.truetype(path, size)


def can_write(path: str) -> bool:
    """Whether a font has a shape of its own for every character that templates need."""
    try:
        font = PIL.ImageFont.truetype(path, 24)
        shapes: Sequence[bytes] = [bytes(font.getmask(character)) for character in NEEDED]
        missing = bytes(font.getmask("\U000f0000"))
    except (OSError, ValueError):
        # (a damaged font, or one without outlines)
        return False
    return len(set(shapes)) == len(shapes) and missing not in shapes
