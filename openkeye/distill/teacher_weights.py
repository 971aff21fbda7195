"""Weights of teachers that descend from one base: what differs, in a small file, swapped into the resident base to the bit.

A delta holds of every tensor that differs the whole tensor, or where few rows differ those rows: `NAME.rows`, `NAME.values`.
Rows are those of the tensor as a matrix [everything before the last dimension, last dimension].
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from openkeye.common.checks import InputError, writing_to
from openkeye.inputs.processor import resolve_model_dir
from openkeye.model.config import KeyeConfig
from openkeye.model.keye import KeyeModel
from openkeye.model.weights import load_model, open_weights, weight_files

DELTA_FILE = "delta.safetensors"
DELTA_SETTINGS = "delta.json"
ROWS, VALUES = ".rows", ".values"
MOST_ROWS_SHARE = 0.5
# of a tensor's rows that differ, above which it is kept whole
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
WEIGHT_ENDINGS = (".safetensors", ".safetensors.index.json")


def weights_hash(model_dir: str | Path) -> str:
    """32 hexadecimal digits: equal for equal tensors under equal names, however they are parted into files.

    Raises:
        InputError: no weights, or unreadable ones.
    """
    folder = resolve_model_dir(model_dir)
    settings = folder / DELTA_SETTINGS
    if settings.is_file():
        return _read_settings(settings)["weights_hash"]
    digests = {}
    for path, _ in weight_files(folder):
        with open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118 (the file is no mapping)
                digests[name] = _digest(file.get_tensor(name))
    whole = hashlib.blake2b(digest_size=16)
    for name in sorted(digests):
        whole.update(name.encode() + b"\0" + digests[name])
    return whole.hexdigest()


def is_delta(model_dir: str | Path) -> bool:
    """Whether a folder holds a delta in place of weights."""
    return (resolve_model_dir(model_dir) / DELTA_SETTINGS).is_file()


def _digest(tensor: Tensor) -> bytes:
    content = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=16)
    content.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return content.digest()


def make_delta(base: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What turns `base` into `other`, to the bit: minus zero and every NaN count as they are written.

    Raises:
        ValueError: other names, shapes or dtypes.
    """
    if base.keys() != other.keys():
        raise ValueError(f"no delta between weights of other names: {', '.join(sorted(base.keys() ^ other.keys())[:5])}")
    delta = {}
    for name, old in base.items():
        new = other[name]
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(f"{name}: {new.dtype} {list(new.shape)} has no delta to {old.dtype} {list(old.shape)}")
        differs = _bits(old) != _bits(new)
        if not bool(differs.any()):
            continue
        rows = _as_rows(differs).any(dim=-1).nonzero()[:, 0] if old.ndim > 1 else None
        if rows is None or len(rows) > MOST_ROWS_SHARE * _as_rows(differs).shape[0]:
            delta[name] = new.contiguous()
        else:
            delta[name + ROWS] = rows
            delta[name + VALUES] = _as_rows(new)[rows]
    return delta


@torch.no_grad()
def apply_delta(weights: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write a delta into weights, in place, on their device; returns the delta that undoes it."""
    undo: dict[str, Tensor] = {}
    for key, part in delta.items():
        if key.endswith(ROWS):
            name = key.removesuffix(ROWS)
            matrix = _as_rows(weights[name])
            rows = part.to(matrix.device)
            undo[key], undo[name + VALUES] = part, matrix[rows]
            matrix.index_copy_(0, rows, delta[name + VALUES].to(matrix.device))
        elif not key.endswith(VALUES):
            undo[key] = weights[key].clone()
            weights[key].copy_(part)
    return undo


def write_delta(base_dir: str | Path, teacher_dir: str | Path, out_dir: str | Path) -> int:
    """A teacher's folder with its delta in place of its weights, everything else copied; returns the delta's bytes.

    Raises:
        InputError: the two are not of one architecture, or the folder cannot be written.
    """
    base, teacher, out = resolve_model_dir(base_dir), resolve_model_dir(teacher_dir), Path(out_dir)
    try:
        delta = make_delta(load_model(base).state_dict(), load_model(teacher).state_dict())
    except ValueError as error:
        raise InputError(f"{teacher}: not a descendant of {base}: {error}") from error
    settings = {"base_hash": weights_hash(base), "weights_hash": weights_hash(teacher)}
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        for path in teacher.iterdir():
            if path.is_file() and not path.name.endswith(WEIGHT_ENDINGS):
                shutil.copy2(path, out / path.name)
        save_file(delta, out / f"{DELTA_FILE}.unfinished", metadata={"format": "pt"})
        os.replace(out / f"{DELTA_FILE}.unfinished", out / DELTA_FILE)
        # Last: with it the folder is a delta's.
        (out / DELTA_SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
    return sum(tensor.nbytes for tensor in delta.values())


def read_delta(folder: Path) -> dict[str, Tensor]:
    """The tensors of a delta's file, on the CPU."""
    with open_weights(folder / DELTA_FILE) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no mapping)


@dataclass
class WeightFigures:
    """What bringing weights in has cost so far."""

    num_loads: int = 0
    # whole checkpoints read
    num_swaps: int = 0
    # deltas brought in
    load_seconds: float = 0.0
    swap_seconds: float = 0.0


class ResidentWeights:
    """One network at a time on the device. Teachers that are deltas of the base share it; others are read whole."""

    def __init__(
        self, base_dir: str | Path | None, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        """
        Args:
            base_dir: of which deltas are; None where there are none.
            device: where the network is.
            dtype: of all weights; None keeps the files' own, which deltas need.

        Raises:
            InputError: no such folder.
        """
        self.figures = WeightFigures()
        self._base_dir = None if base_dir is None else resolve_model_dir(base_dir)
        self._base_hash: str | None = None
        self._device, self._dtype = device, dtype
        self._model: KeyeModel | None = None
        self._loaded: Path | None = None
        # folder of the whole checkpoint that the network was read from
        self._undo: dict[str, Tensor] = {}
        self.changed_names: frozenset[str] = frozenset()
        # tensors that the last `use` may have changed

    def use(self, model_dir: str | Path) -> KeyeModel:
        """The network with a teacher's weights; the one handed out before has them too, or is let go of.

        Raises:
            InputError: a delta of another base, or files that do not fit.
        """
        folder = resolve_model_dir(model_dir)
        has_base = is_delta(folder)
        before, num_loads = _names_of(self._undo), self.figures.num_loads
        model = self._whole(self._base_of(folder) if has_base else folder)
        if has_base:
            began = time.monotonic()
            delta, loaded = read_delta(folder), self._loaded
            # Until it is whole, the network is nobody's, and would be read anew.
            self._loaded = None
            self._undo = apply_delta(model.state_dict(), delta)
            self._loaded = loaded
            self.figures.num_swaps += 1
            self.figures.swap_seconds += time.monotonic() - began
        is_same = self.figures.num_loads == num_loads
        self.changed_names = before | _names_of(self._undo) if is_same else frozenset(model.state_dict())
        return model

    def _whole(self, folder: Path) -> KeyeModel:
        """The network of a whole checkpoint, with no delta in it."""
        if self._model is not None and self._loaded is not None and self._undo:
            apply_delta(self._model.state_dict(), self._undo)
            self._undo = {}
        if self._model is None or self._loaded != folder:
            began = time.monotonic()
            # Let go of first: two may not fit.
            self._model, self._undo = None, {}
            self._model, self._loaded = load_model(folder, self._device, self._dtype), folder
            self.figures.num_loads += 1
            self.figures.load_seconds += time.monotonic() - began
        return self._model

    def _base_of(self, folder: Path) -> Path:
        if self._base_dir is None:
            raise InputError(
                f"{folder} holds a delta, and there is no base; name the checkpoint that it was made from as base_dir"
            )
        if self._base_hash is None:
            self._base_hash = weights_hash(self._base_dir)
        wanted = _read_settings(folder / DELTA_SETTINGS)["base_hash"]
        if wanted != self._base_hash:
            raise InputError(
                f"{folder} holds a delta of weights {wanted}, and {self._base_dir} has {self._base_hash}; give the base that "
                "it was made from, or make it anew"
            )
        if self._dtype is not None:
            raise InputError(f"{folder} holds a delta, which needs the base in its own dtype; leave dtype out")
        if KeyeConfig.load(folder) != KeyeConfig.load(self._base_dir):
            raise InputError(f"{folder}: its config.json is not that of {self._base_dir}; copy it from its teacher again")
        return self._base_dir


def _read_settings(path: Path) -> dict[str, str]:
    try:
        settings = json.loads(path.read_text())
        return {name: settings[name] for name in ("base_hash", "weights_hash")}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a delta's settings ({error!r}); make the delta anew") from error


def _names_of(delta: Mapping[str, Tensor]) -> frozenset[str]:
    return frozenset(key.removesuffix(ROWS).removesuffix(VALUES) for key in delta)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(BITS[tensor.element_size()])


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor.view(-1, tensor.shape[-1])
