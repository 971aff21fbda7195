"""Small real media for sources, and what a sample holds of them."""

import io
from functools import lru_cache
from pathlib import Path

import PIL.Image

from openkeye.data.convert import DocumentLimits, to_document
from openkeye.data.sample import Sample
from openkeye.inputs.processor import BUNDLED_DIR, Processor
from tests.inputs.clips import even_times, make_clip


def write_clip(path: Path, num_frames: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return make_clip(path, even_times(num_frames, 10)).path


def write_picture(path: Path, colour: tuple[int, int, int] = (250, 0, 0)) -> Path:
    path.write_bytes(picture_bytes(colour))
    return path


def picture_bytes(colour: tuple[int, int, int] = (250, 0, 0)) -> bytes:
    content = io.BytesIO()
    PIL.Image.new("RGB", (112, 112), colour).save(content, "PNG")
    return content.getvalue()


def flat(sample: Sample) -> list[tuple[str, str, object]]:
    """(role, kind, what) of every part of a sample's messages."""
    parts = []
    for message in sample.messages:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            parts.append((message["role"], part["type"], part[part["type"]]))
    return parts


@lru_cache
def bundled() -> Processor:
    return Processor.load(BUNDLED_DIR)


def seen(sample: Sample) -> tuple[str, int]:
    """(the text of the document with one mark for each medium's pads, number of pictures), through the bundled model."""
    processor = bundled()
    document = to_document(sample, processor, DocumentLimits(8192))
    text = processor.decode(document.input_ids[~document.is_media].tolist(), skip_special_tokens=False)
    return text, sum(pictures.num_pictures for pictures in document.pictures)
