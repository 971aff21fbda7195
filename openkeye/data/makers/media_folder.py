"""The videos and pictures of a folder, by their names."""

from collections.abc import Sequence
from pathlib import Path

from openkeye.common.checks import InputError

VIDEO_ENDINGS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".ts", ".m4v", ".mpg", ".mpeg", ".gif")
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")


def find_media(folder: Path, endings: Sequence[str]) -> list[str]:
    """Paths below a folder of all files with one of the endings, ascending; hidden files and folders are left out.

    Raises:
        InputError: there is no such folder, or nothing of the kind in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder that holds the files")
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file()]
    names = sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))
    if not names:
        raise InputError(f"{folder}: holds no file with one of the endings {', '.join(endings)}; give another folder")
    return names
