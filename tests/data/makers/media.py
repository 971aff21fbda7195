"""Small real media for tests of makers: films of several scenes with known cuts, cut-outs, backgrounds."""

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import PIL.Image
import PIL.ImageDraw

from openkeye.frameforge.render import render, scene_job
from openkeye.frameforge.writer import film, make_clip

SIDE, FPS = 128, 10
PHOTOGRAPHS = Path(__file__).parents[3] / "openkeye" / "frameforge" / "photographs"


def film_clip(path: Path, index: int = 0, seconds: float = 6.0) -> Path:
    """One FrameForge clip as a file."""
    film(make_clip(7, index, seconds=(seconds, seconds)), path)
    return path


def forge_frames(index: int, num_frames: int) -> np.ndarray:
    """[num_frames, SIDE, SIDE, 3] uint8 of a FrameForge scene with its moving things."""
    clip = make_clip(11, index, seconds=(num_frames / FPS, num_frames / FPS))
    return render(scene_job(clip.scene, np.arange(num_frames) / FPS), SIDE, "cpu").numpy()


def panned_frames(name: str, num_frames: int) -> np.ndarray:
    """[num_frames, SIDE, SIDE, 3] uint8 of a camera that moves over a photograph, two pixels a frame."""
    picture = np.asarray(PIL.Image.open(PHOTOGRAPHS / name).convert("RGB").resize((SIDE + 2 * num_frames, SIDE)))
    return np.stack([picture[:, 2 * number : 2 * number + SIDE] for number in range(num_frames)])


def write_film(path: Path, shots: Sequence[np.ndarray], fps: int = FPS) -> list[float]:
    """All shots in one H.264 file; gives the times at which the later ones begin."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "23", "preset": "veryfast"})
        stream.height, stream.width = shots[0].shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in np.concatenate(shots):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    return (np.cumsum([len(shot) for shot in shots])[:-1] / fps).tolist()


def write_cutouts(folder: Path, labels: Sequence[str] = ("ball", "box")) -> Path:
    """Two cut-outs of each label, each label of one colour (`colour_of`)."""
    for number, label in enumerate(labels):
        for copy in range(2):
            picture = PIL.Image.new("RGBA", (60, 50), (0, 0, 0, 0))
            draw = PIL.ImageDraw.Draw(picture)
            shape = (5 + copy * 8, 5, 54, 44)
            (draw.ellipse if number % 2 == 0 else draw.rectangle)(shape, fill=(*colour_of(number), 255))
            (folder / label).mkdir(parents=True, exist_ok=True)
            picture.save(folder / label / f"{copy}.png")
    return folder


def colour_of(number: int) -> tuple[int, int, int]:
    return ((255, 0, 0), (0, 0, 255), (0, 255, 0))[number]


def write_background(path: Path, grey: int = 128, size: tuple[int, int] = (320, 240)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, (grey, grey, grey)).save(path)
    return path


class EchoCaptioner:
    """Says which media and window it was asked about: what the recipe made of it can be checked word by word."""

    name = "echo"

    def __init__(self) -> None:
        self.asked: list[list[dict]] = []

    def caption(self, messages: list[dict]) -> str:
        self.asked.append(messages)
        for part in messages[0]["content"]:
            if part["type"] == "video":
                return f"{part['video'].name} {part.get('start_seconds')}-{part.get('end_seconds')}"
            if part["type"] == "image":
                return f"picture {part['image'].name}"
        return f"overview {len(self.asked)}"

    def stop(self) -> None:
        """It never waits."""
