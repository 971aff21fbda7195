"""What happens to a document between the printer and the file: light, folds, the camera's angle, its lens and its coding.

Each takes a picture and chance, and gives a picture whose text a person still reads. They are applied in the order of
`PERTURBATIONS`, which is the order in which they happen.
"""

import io
from collections.abc import Callable

import numpy as np
import PIL.Image
import PIL.ImageFilter

SURROUNDINGS = (70, 190)
# grey levels of what lies around a page


def wrinkle(picture: PIL.Image.Image, rng: np.random.Generator) -> PIL.Image.Image:
    """Folds: pixels move by the slope of a smooth random height, which also shades the paper."""
    pixels = np.asarray(picture, dtype=np.float32)
    height, width = pixels.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    move_x, move_y, shade = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    longest = max(height, width)
    for _ in range(int(rng.integers(3, 7))):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        wave_length = longest * float(rng.uniform(0.15, 0.6))
        across = (x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / wave_length) + phase
        # At most a hundredth of the wave's length: letters bend and never tear.
        size = wave_length * float(rng.uniform(0.004, 0.01))
        move_x += size * np.cos(angle) * np.cos(across)
        move_y += size * np.sin(angle) * np.cos(across)
        shade -= float(rng.uniform(3, 9)) * np.sin(across)
    moved = _sampled(pixels, x + move_x, y + move_y)
    return _picture(moved + shade[..., None])


def perspective(picture: PIL.Image.Image, rng: np.random.Generator) -> PIL.Image.Image:
    """Seen from the side: each corner moves inwards by up to 8% of its side; a grey ground lies around the page."""
    width, height = picture.size
    margin = 0.08
    inwards = rng.uniform(0, margin, (4, 2)) * (width, height)
    signs = np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)])
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], dtype=np.float64)
    coefficients = _homography(corners + signs * inwards, corners)
    ground = (int(rng.integers(*SURROUNDINGS)),) * 3
    return picture.transform(
        picture.size, PIL.Image.Transform.PERSPECTIVE, coefficients, PIL.Image.Resampling.BICUBIC, fillcolor=ground
    )


def lighting(picture: PIL.Image.Image, rng: np.random.Generator) -> PIL.Image.Image:
    """A lamp at one side: brightness falls along a direction to 45 to 80% of what it is at the other end, a little coloured."""
    pixels = np.asarray(picture, dtype=np.float32)
    height, width = pixels.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = x / width * np.cos(angle) + y / height * np.sin(angle)
    along = (along - along.min()) / (along.max() - along.min())
    light = 1.0 - along * (1.0 - float(rng.uniform(0.45, 0.8)))
    colour = rng.uniform(0.92, 1.0, 3).astype(np.float32)
    return _picture(pixels * light[..., None] * colour)


def blur(picture: PIL.Image.Image, rng: np.random.Generator) -> PIL.Image.Image:
    """Out of focus, by up to 1.6 pixels."""
    return picture.filter(PIL.ImageFilter.GaussianBlur(float(rng.uniform(0.5, 1.6))))


def noise(picture: PIL.Image.Image, rng: np.random.Generator) -> PIL.Image.Image:
    """A sensor in the dark: Gaussian noise of 4 to 16 levels."""
    pixels = np.asarray(picture, dtype=np.float32)
    return _picture(pixels + rng.normal(0, float(rng.uniform(4, 16)), pixels.shape))


def jpeg(picture: PIL.Image.Image, rng: np.random.Generator) -> PIL.Image.Image:
    """Saved small: JPEG of quality 25 to 60."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=int(rng.integers(25, 61)))
    return PIL.Image.open(file).convert("RGB")


PERTURBATIONS: dict[str, Callable[[PIL.Image.Image, np.random.Generator], PIL.Image.Image]] = {
    "wrinkle": wrinkle,
    "perspective": perspective,
    "lighting": lighting,
    "blur": blur,
    "noise": noise,
    "jpeg": jpeg,
}


def _picture(pixels: np.ndarray) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _sampled(pixels: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear values of pixels [H, W, 3] at places [H, W]; beyond the edge the edge goes on."""
    height, width = pixels.shape[:2]
    x, y = np.clip(x, 0, width - 1), np.clip(y, 0, height - 1)
    left, top = np.minimum(x.astype(np.int64), width - 2), np.minimum(y.astype(np.int64), height - 2)
    right_share, low_share = (x - left)[..., None], (y - top)[..., None]
    upper = pixels[top, left] * (1 - right_share) + pixels[top, left + 1] * right_share
    lower = pixels[top + 1, left] * (1 - right_share) + pixels[top + 1, left + 1] * right_share
    return upper * (1 - low_share) + lower * low_share


def _homography(seen: np.ndarray, flat: np.ndarray) -> list[float]:
    """The 8 coefficients that take places of the picture [4, 2] to places of the page [4, 2]."""
    rows, values = [], []
    for (x, y), (u, v) in zip(seen, flat, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.linalg.solve(np.array(rows), np.array(values)).tolist()
