"""WebDataset: tar shards whose members belong together by their stem, `0001.json` with `0001.jpg` and `0001.mp4`.

Shards are indexed when they are opened, by their headers alone; a sample's members are then read where they lie.
"""

import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from openkeye.common.checks import InputError
from openkeye.data.sample import Sample
from openkeye.data.sources.files import VIDEO_ENDINGS, FindMedia, existing_file, files_at, read_bytes, read_json_text
from openkeye.data.sources.records import sample_of_record

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
BLOCK_BYTES = 512
# of a tar; one of zeros ends it


class TarShards:
    """A `Source`: the samples of tar shards, shard after shard in the order of their names.

    A sample's `.json` is a record (`records.sample_of_record`) whose media are names of members: whole (`0001.jpg`) or their
    endings (`jpg`); a record that names none has all pictures and videos of its sample before the first question. A sample
    without `.json` is a `.txt`, the answer to `question` about its pictures and videos.
    """

    def __init__(self, path: str | Path, *, question: str = "Describe it.") -> None:
        """path: a shard, a folder of shards, or many as in `clips-{000..063}.tar`.

        Raises:
            InputError: no such file, a shard that is cut off or compressed, or no samples.
        """
        self._question = question
        self._shards = _shards(path)
        self._names: list[str] = []
        # "clips-000.tar:0001"
        self._members: list[dict[str, int]] = []
        # of each sample: ending to row of `_places`
        places: list[tuple[int, int, int]] = []
        for number, shard in enumerate(self._shards):
            for name, members in _samples(shard):
                self._names.append(f"{shard.name}:{name}")
                self._members.append({ending: len(places) + row for row, ending in enumerate(members)})
                places += [(number, *place) for place in members.values()]
        if not self._names:
            raise InputError(f"{path}: no members NAME.ENDING in {len(self._shards)} shards; give others")
        self._places = np.array(places, dtype=np.int64)
        # [members, 3]: shard, first byte, size

    @property
    def num_samples(self) -> int:
        return len(self._names)

    def read(self, index: int) -> Sample:
        """See `Source.read`."""
        where, members = self._names[index], self._members[index]
        media = {
            kind: [ending for ending in members if f".{ending.rsplit('.', 1)[-1]}" in endings]
            for kind, endings in (("images", IMAGE_ENDINGS), ("videos", VIDEO_ENDINGS))
        }
        media["videos"] = [ending for ending in media["videos"] if ending not in media["images"]]
        if "json" in members:
            record = read_json_text(self._content(index, "json"), where)
            if isinstance(record, Mapping) and not _names_media(record):
                record = {**record, **media}
        elif "txt" in members:
            answer = self._content(index, "txt").decode("utf-8", errors="replace")
            turns = ({"role": "user", "content": self._question}, {"role": "assistant", "content": answer})
            record = {"messages": turns, **media}
        else:
            raise InputError(f"{where}: only {', '.join(members)}; a sample needs a .json or a .txt")
        return sample_of_record(record, where, self._finder(index))

    def _finder(self, index: int) -> FindMedia:
        stem = self._names[index].rsplit("/", 1)[-1].split(":", 1)[-1]

        def find(name: str) -> str | bytes:
            if name.startswith("data:"):
                return name
            ending = name.rsplit("/", 1)[-1].removeprefix(f"{stem}.").lstrip(".").lower()
            if ending not in self._members[index]:
                raise InputError(
                    f"{self._names[index]}: no member {name} among its {', '.join(self._members[index])}; mend the record"
                )
            return self._content(index, ending)

        return find

    def _content(self, index: int, ending: str) -> bytes:
        number, start, size = self._places[self._members[index][ending]].tolist()
        return read_bytes(self._shards[number], start, size, self._names[index])


def _shards(path: str | Path) -> list[Path]:
    if "{" not in str(path):
        return files_at(path, "*.tar", "a tar shard or a folder of them")
    return [existing_file(shard, "tar shards") for shard in expand_urls(str(path))]


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(stem, ending -> (first byte, size)) of neighbouring members of one stem, as the library groups them."""
    stem, members = None, dict[str, tuple[int, int]]()
    for name, start, size in _members(shard):
        found, ending = base_plus_ext(name)
        if found is None:
            continue
        if found != stem and members:
            yield str(stem), members
            members = {}
        stem = found
        if ending.lower() in members:
            raise InputError(f"{shard}: two members {name}; every sample needs a stem of its own: make the shard again")
        members[ending.lower()] = (start, size)
    if members:
        yield str(stem), members


def _members(shard: Path) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, size) of every file in a shard."""
    num_bytes = shard.stat().st_size
    end = 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isreg():
                    yield member.name, member.offset_data, member.size
                end = member.offset_data + -(-member.size // BLOCK_BYTES) * BLOCK_BYTES
    except tarfile.TarError as error:
        raise InputError(f"{shard}: not a whole tar file ({error}); unpack it if it is compressed, or copy it again") from error
    # The library takes a shard that ends too early for one with fewer samples.
    if end + BLOCK_BYTES > num_bytes:
        raise InputError(f"{shard}: cut off at {num_bytes:,} bytes; copy or make it again")


def _names_media(record: Mapping[str, Any]) -> bool:
    turns = record.get("messages") or record.get("conversations") or ()
    parts = [part for turn in turns if isinstance(turn, Mapping) for part in _parts(turn.get("content"))]
    return any(record.get(name) for name in ("image", "images", "video", "videos")) or any(
        isinstance(part, Mapping) and part.get("type", "text") != "text" for part in parts
    )


def _parts(content: Any) -> list[Any]:
    return content if isinstance(content, list) else []
