"""Pictures from files, bytes, PIL images and data URLs, upright, on white, at the model's size."""

import base64
import binascii
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import PIL.Image
import PIL.ImageOps

from openkeye.common.checks import InputError
from openkeye.inputs.sampling import ImageLimits, smart_resize

MAX_DECODED_PIXELS = 134_217_728
# 11,585 x 11,585, up to 2 GB while transparency is laid on white; a file that claims more is refused before it is unpacked

warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)
# The library's own limit warns at two thirds of ours.

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")
# What the library also opens may start other programs (EPS) or hides pictures of any size in old containers.


def open_image(image: str | Path | bytes | PIL.Image.Image, source: str | None = None) -> PIL.Image.Image:
    """An RGB picture: EXIF orientation applied, transparency laid on white.

    `image`: a path, a data URL, the bytes of a file, or a PIL image. `source` names it in errors.
    """
    source = source or source_of(image)
    if isinstance(image, PIL.Image.Image):
        return _upright_rgb(image, source)
    with _opened(_content(image, source), source) as opened:
        return _upright_rgb(opened, source)


def stated_size(image: str | Path | bytes | PIL.Image.Image) -> tuple[int, int]:
    """(height, width) in a picture's header; nothing is decoded. EXIF may turn the picture, which exchanges the two."""
    source = source_of(image)
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    with _opened(_content(image, source), source) as opened:
        return opened.height, opened.width


def source_of(image: str | Path | bytes | PIL.Image.Image) -> str:
    """What a picture is called in errors: its path, if it has one."""
    if isinstance(image, PIL.Image.Image):
        return "image"
    if isinstance(image, bytes):
        return "image bytes"
    return "data URL" if str(image).startswith("data:") else str(local_path(image))


def _content(image: str | Path | bytes, source: str) -> bytes:
    """Bytes of a picture's file, at least one."""
    if isinstance(image, str) and image.startswith("data:"):
        image = bytes_of_data_url(image, source)
    content = image if isinstance(image, bytes) else _read_file(local_path(image), source)
    if not content:
        raise InputError(f"{source}: 0 bytes; give a picture (png, jpeg, webp, ...)")
    return content


@contextmanager
def _opened(content: bytes, source: str) -> Iterator[PIL.Image.Image]:
    """The picture behind its header, not yet decoded; what goes wrong with it within is an InputError."""
    PIL.Image.init()
    try:
        with PIL.Image.open(io.BytesIO(content), formats=[name for name in FORMATS if name in PIL.Image.OPEN]) as opened:
            _check_size(opened, source)
            yield opened
    except PIL.UnidentifiedImageError as error:
        raise InputError(f"{source}: not a picture that can be read; give png, jpeg, webp, gif, bmp or tiff") from error
    except PIL.Image.DecompressionBombError as error:
        raise InputError(f"{source}: too many pixels; scale it down to at most {MAX_DECODED_PIXELS:,}") from error
    except (OSError, SyntaxError, ValueError) as error:
        # (Pillow raises SyntaxError and ValueError for broken headers)
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: the picture is damaged ({error}); copy or download it again") from error


def image_size(height: int, width: int, limits: ImageLimits, source: str = "image") -> tuple[int, int]:
    """(height, width) at which the model sees a picture of that size (spec: 4.2)."""
    try:
        return smart_resize(height, width, limits.factor, limits.min_pixels, limits.max_pixels)
    except InputError as error:
        raise InputError(f"{source:.80}: {error}") from error


def image_pixels(image: PIL.Image.Image, height: int, width: int) -> np.ndarray:
    """[height, width, 3] uint8: one bicubic resize."""
    return np.array(image.resize((width, height), PIL.Image.Resampling.BICUBIC))


def local_path(location: str | Path) -> Path:
    """The path of a local file or file:// URL; InputError for addresses on the network."""
    text = str(location)
    if text.startswith("file://"):
        return Path(unquote_to_bytes(text.removeprefix("file://")).decode())
    if text.startswith(("http://", "https://", "ftp://", "rtsp://")):
        raise InputError(f"{text}: addresses are not fetched; download the file and give its path")
    return Path(location).expanduser()


def bytes_of_data_url(url: str, source: str) -> bytes:
    """Content of `data:TYPE;base64,...` (or percent-encoded)."""
    header, comma, body = url.partition(",")
    if not comma:
        raise InputError(f"{source}: a data URL without a comma; expected data:TYPE;base64,CONTENT")
    if not header.endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(unquote_to_bytes(body), validate=True)
    except binascii.Error as error:
        raise InputError(f"{source}: the base64 of this data URL is damaged ({error}); encode it again") from error


def _read_file(path: Path, source: str) -> bytes:
    if path.is_dir():
        raise InputError(f"{source}: a folder; give one picture in it")
    if not path.exists():
        raise InputError(f"{source}: no such file; check the path")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror}); check its permissions") from error


def _check_size(image: PIL.Image.Image, source: str) -> None:
    if image.width * image.height > MAX_DECODED_PIXELS:
        raise InputError(
            f"{source}: {image.width}x{image.height} pixels; scale it down to at most {MAX_DECODED_PIXELS:,} pixels in all"
        )


def _upright_rgb(image: PIL.Image.Image, source: str) -> PIL.Image.Image:
    _check_size(image, source)
    image = PIL.ImageOps.exif_transpose(image)
    # (a copy in any case)
    if image.mode == "RGB":
        return image
    if not image.has_transparency_data:
        # 16-bit greys would be clipped, not scaled, by a plain conversion.
        if image.mode.startswith("I;16"):
            return PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
    return PIL.Image.alpha_composite(white, image).convert("RGB")
