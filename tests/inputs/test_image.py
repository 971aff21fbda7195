import base64
import io
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from openkeye.common.checks import InputError
from openkeye.inputs.image import image_pixels, image_size, open_image, stated_size
from openkeye.inputs.sampling import ImageLimits


def picture() -> PIL.Image.Image:
    pixels = np.zeros((60, 90, 3), np.uint8)
    pixels[:20, :30] = (255, 0, 0)
    return PIL.Image.fromarray(pixels)


def png_bytes(image: PIL.Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "png", **options)
    return stream.getvalue()


def test_path_bytes_pil_and_data_url_give_the_same_picture(tmp_path):
    content = png_bytes(picture())
    path = tmp_path / "p.png"
    path.write_bytes(content)
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    for given in (path, str(path), path.as_uri(), content, picture(), url):
        assert np.array_equal(np.asarray(open_image(given)), np.asarray(picture()))


def test_exif_orientation_is_obeyed(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    picture().save(tmp_path / "turned.png", exif=exif)
    turned = np.asarray(open_image(tmp_path / "turned.png"))
    assert turned.shape == (90, 60, 3)
    assert turned[5, -5].tolist() == [255, 0, 0], "the upper left corner is now at the upper right"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode):
    clear = PIL.Image.new("RGBA", (30, 30), (200, 0, 0, 0))
    converted = clear.convert(mode)
    if mode == "P":
        converted.info["transparency"] = converted.getpixel((0, 0))
    assert np.asarray(open_image(converted)).min() >= 250
    half = np.asarray(open_image(PIL.Image.new("RGBA", (30, 30), (0, 0, 0, 128))))
    assert np.abs(half.astype(int) - 127).max() <= 1


def test_other_modes_become_rgb_without_clipping():
    for mode in ("L", "1", "CMYK", "YCbCr"):
        assert np.asarray(open_image(PIL.Image.new(mode, (8, 8)))).shape == (8, 8, 3)
    deep = PIL.Image.fromarray(np.full((8, 8), 128 * 256, np.uint16))
    assert np.asarray(open_image(deep))[0, 0].tolist() == [128, 128, 128]


def test_size_follows_the_limits_and_resize_keeps_the_content():
    height, width = image_size(*stated_size(picture()), ImageLimits())
    assert (height, width) == (56, 84)
    pixels = image_pixels(picture(), height, width)
    assert pixels.shape == (56, 84, 3) and pixels.dtype == np.uint8
    assert pixels[5, 5].tolist() == [255, 0, 0] and pixels[50, 80].tolist() == [0, 0, 0]


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path, "no such file"),
        (lambda path: path.parent, "a folder"),
        (lambda path: written(path, b""), "0 bytes"),
        (lambda path: written(path, b"text"), "not a picture"),
        (lambda path: written(path, png_bytes(picture())[:60]), "damaged"),
        (lambda path: "https://example.org/a.png", "download"),
        (lambda path: "data:image/png;base64", "comma"),
        (lambda path: "data:image/png;base64,@@@", "base64"),
        (lambda path: b"", "0 bytes"),
    ],
)
def test_bad_pictures_get_one_line_with_the_mend(make, expected, tmp_path):
    with pytest.raises(InputError, match=expected) as caught:
        open_image(make(tmp_path / "bad.png"))
    assert "\n" not in str(caught.value)


def test_a_decompression_bomb_is_refused_before_it_is_unpacked():
    # A png's header alone: 30,000 x 30,000 pixels, claimed in a few dozen bytes.
    content = bytearray(png_bytes(picture()))
    content[16:24] = (30000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    with pytest.raises(InputError, match="scale it down"):
        open_image(bytes(content))


def test_absurd_shapes_name_the_picture():
    with pytest.raises(InputError, match=r"strip\.png.*crop"):
        image_size(10, 4000, ImageLimits(), "strip.png")
