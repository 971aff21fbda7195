"""Updates in files, for engines in other processes: one safetensors file a version, in a folder that may lie in /dev/shm.

A file is there whole or not at all: it is written beside its name and renamed. Every tensor's digest is checked before any is
used.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from openkeye.common.checks import InputError
from openkeye.engine.weight_update import Change, Delta, WeightUpdate
from openkeye.model.weights import open_weights

FILE_NAME = re.compile(r"version-(\d{8})\.safetensors")
PLACES, VALUES = "#places", "#values"
# behind the name of a tensor of which a delta is told
NUM_HASHING_THREADS = 8


def update_path(folder: str | Path, version: int) -> Path:
    """Where the update to a version lies."""
    return Path(folder) / f"version-{version:08d}.safetensors"


def write_update(folder: str | Path, update: WeightUpdate) -> Path:
    """Write an update; returns its path when it is there whole.

    Raises:
        OSError: the folder cannot be written to.
    """
    path = update_path(folder, update.version)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    metadata = {"format": "pt", "version": str(update.version)}
    if update.base is not None:
        metadata["base"] = str(update.base)
    for name, change in update.changes.items():
        if isinstance(change, Delta):
            tensors |= {name + PLACES: change.places_N, name + VALUES: change.values_N}
            metadata[f"shape:{name}"] = ",".join(map(str, change.shape))
        else:
            tensors[name] = change
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata |= {f"digest:{name}": digest for name, digest in _digests(tensors).items()}
    for name, tensor in tensors.items():
        # Several may lie in one memory (joined projections, tied weights), which the format does not take.
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensors[name] = tensor.clone()
    beside = path.with_suffix(f".{os.getpid()}.new")
    save_file(tensors, beside, metadata)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)
    return path


def read_update(path: str | Path) -> WeightUpdate:
    """An update from its file, every digest checked.

    Raises:
        InputError: no update, or one whose content is not what was written.
    """
    path = Path(path)
    with open_weights(path) as file:
        metadata = file.metadata() or {}
        if "version" not in metadata:
            raise InputError(f"{path}: not an update of weights (no version in its header); write it with write_update")
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    for name, digest in _digests(tensors).items():
        if metadata.get(f"digest:{name}") != digest:
            raise InputError(f"{path}: {name} is damaged; publish this version again")
    changes: dict[str, Change] = {}
    for name, tensor in tensors.items():
        if name.endswith(PLACES):
            whole = name.removesuffix(PLACES)
            shape = tuple(int(size) for size in metadata[f"shape:{whole}"].split(",") if size)
            changes[whole] = Delta(shape, tensor, tensors[whole + VALUES])
        elif not name.endswith(VALUES):
            changes[name] = tensor
    return WeightUpdate(int(metadata["version"]), changes, int(metadata["base"]) if "base" in metadata else None)


def updates_from(folder: str | Path, version: int) -> list[Path]:
    """The files that take an engine of a version to the newest one, in order; none where it is the newest.

    Deltas where they lead there from this version, else the newest whole update and the deltas behind it.

    Raises:
        InputError: no chain of updates leads from this version to the newest.
    """
    bases = {number: _base(update_path(folder, number)) for number in _versions(folder)}
    newest = max(bases, default=version)
    chain: list[Path] = []
    at: int | None = newest
    while at is not None and at > version:
        if at not in bases:
            raise InputError(f"{folder}: version {at}, on which {newest} rests, is gone; publish the whole weights")
        chain.append(update_path(folder, at))
        at = bases[at]
    if at is not None and at != version:
        raise InputError(f"{folder}: version {newest} rests on {at}, older than the engine's {version}; publish whole weights")
    return chain[::-1]


def updates_among(paths: Sequence[str | Path], version: int) -> list[Path]:
    """Those of a chain of updates, oldest first, that take an engine of a version to the last one.

    Raises:
        InputError: the first one needed rests on another version.
    """
    chain: list[Path] = []
    for path in reversed([Path(path) for path in paths]):
        chain.append(path)
        base = _base(path)
        if base is None or base == version:
            return chain[::-1]
    raise InputError(f"{chain[-1]}: rests on version {base}, and the engine has {version}; publish the whole weights")


def _versions(folder: str | Path) -> list[int]:
    matches = (FILE_NAME.fullmatch(path.name) for path in Path(folder).glob("version-*.safetensors"))
    return [int(match[1]) for match in matches if match is not None]


def _base(path: Path) -> int | None:
    with open_weights(path) as file:
        base = (file.metadata() or {}).get("base")
    return None if base is None else int(base)


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """By name; of bytes, type and shape."""

    def digest(tensor: Tensor) -> str:
        content = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=16)
        content.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return content.hexdigest()

    with ThreadPoolExecutor(NUM_HASHING_THREADS) as pool:
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))
