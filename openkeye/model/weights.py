"""Checkpoints of the published layout in and out: strict, so that no tensor is ever left random or dropped in silence.

A folder holds `config.json` and either `model.safetensors` or shards named by `model.safetensors.index.json`. Experts are
fused 3-D tensors; the un-fused names of other releases are accepted and stacked. A dense model has the usual names.
"""

import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from openkeye.common.checks import InputError
from openkeye.kernels.dispatch import quantize_expert_weights
from openkeye.model.config import KeyeConfig
from openkeye.model.keye import KeyeModel
from openkeye.model.sharding import ALONE, Shard, own_part, shard_model

PACKING_TABLE = "visual.vision_model.embeddings.packing_position_embedding.weight"
POOLING_HEAD = "visual.vision_model.head."
# Used by no computation (the first is in the published file, the second in older ones): never loaded, written back on saving.
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# Tensors of all experts of a layer, and the parts of one expert that other releases name.
UNFUSED = re.compile(r"(?P<prefix>.*\.mlp\.experts)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj)\.weight")
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5 << 30


@dataclass(frozen=True)
class KeptTensor:
    """A tensor that stays in its file until it is written back."""

    path: Path
    name: str

    def read(self) -> Tensor:
        """The tensor, on the CPU."""
        with open_weights(self.path) as file:
            return file.get_tensor(self.name)


@dataclass
class _Intake:
    """Tensors as they come in, and everything wrong with them, told in one error."""

    config: KeyeConfig
    wanted: dict[str, tuple[int, ...]]
    # shapes of the whole tensors
    device: torch.device | str
    dtype: torch.dtype | None
    are_experts_e4m3: bool
    shard: Shard
    filled: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    # of experts in e4m3
    kept: dict[str, KeptTensor] = field(default_factory=dict)
    unfused: dict[str, dict[int, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    tied_head: Tensor | None = None
    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def take(self, name: str, path: Path, file: Any) -> None:
        """One tensor of one open file."""
        if (name == PACKING_TABLE or name.startswith(POOLING_HEAD)) and self.config.vision is not None:
            if name in self.kept:
                self.problems["twice"].append(name)
            self.kept[name] = KeptTensor(path, name)
        elif name.endswith("rotary_emb.inv_freq"):
            return
        elif name == "lm_head.weight" and self.config.tie_word_embeddings:
            self.tied_head = file.get_tensor(name).to(self.device, self.dtype)
        elif match := UNFUSED.fullmatch(name):
            self._take_unfused(match, file)
        elif name not in self.wanted:
            self.problems["unknown"].append(name)
        elif name in self.filled:
            self.problems["twice"].append(name)
        else:
            # The shape is read from the header, so that a wrong tensor is never moved to the device.
            shape = tuple(file.get_slice(name).get_shape())
            if shape == self.wanted[name]:
                part = own_part(name, self.config, self.shard)
                tensor = file.get_slice(name)[part] if part else file.get_tensor(name)
                # A slice of columns comes as a view of the file's pages.
                self._fill(name, tensor.contiguous().to(self.device, self.dtype))
            else:
                self._misshapen(name, shape, self.wanted[name])

    def _take_unfused(self, match: re.Match[str], file: Any) -> None:
        """One expert's [out, in] matrix."""
        name, part, expert = match[0], match["part"], int(match["expert"])
        narrow, wide = self.config.moe_intermediate_size, self.config.hidden_size
        expected = (wide, narrow) if part == "down_proj" else (narrow, wide)
        shape = tuple(file.get_slice(name).get_shape())
        by_expert = self.unfused[f"{match['prefix']}.{part}"]
        if f"{match['prefix']}.down_proj" not in self.wanted or expert >= self.config.num_experts:
            self.problems["unknown"].append(name)
        elif shape != expected:
            self._misshapen(name, shape, expected)
        elif expert in by_expert:
            self.problems["twice"].append(name)
        elif expert in self._own_experts:
            by_expert[expert] = file.get_tensor(name).to(self.device, self.dtype)
            # As soon as a layer's experts are whole, so that they never stand beside each other in two layouts and formats.
            fused = next(fused for fused, parts in FUSED.items() if part in parts)
            if all(len(self.unfused[f"{match['prefix']}.{one}"]) == len(self._own_experts) for one in FUSED[fused]):
                self._stack(match["prefix"], fused)

    @property
    def _own_experts(self) -> range:
        """Experts of this rank; those of other ranks are not read."""
        part = self.shard.part(self.config.num_experts)
        return range(part.start, part.stop)

    def _fill(self, name: str, tensor: Tensor) -> None:
        if self.are_experts_e4m3 and ".mlp.experts." in name:
            self.filled[name], self.scales[name] = quantize_expert_weights(tensor)
        else:
            self.filled[name] = tensor

    def _stack(self, prefix: str, name: str) -> None:
        """Per-expert [out, in] matrices, all there, become the fused, input-major tensor."""
        fused = f"{prefix}.{name}"
        stacks = [torch.stack([self.unfused[f"{prefix}.{part}"].pop(one) for one in self._own_experts]) for part in FUSED[name]]
        if fused in self.filled:
            self.problems["twice"].append(fused)
        else:
            self._fill(fused, torch.cat([stack.transpose(1, 2) for stack in stacks], dim=2).contiguous())

    def _misshapen(self, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        # Stands in for the tensor, so that it is not told again as missing.
        self.filled.setdefault(name, torch.empty(0))
        self.problems["misshapen"].append(f"{name} {list(shape)} instead of {list(expected)}")

    def tell_incomplete(self) -> None:
        """Per-expert matrices that are still here miss some of their layer's, or their layer was there already."""
        everyone = self._own_experts
        for prefix in sorted({key.rpartition(".")[0] for key in self.unfused}):
            for name, parts in FUSED.items():
                fused = f"{prefix}.{name}"
                absent = [
                    f"{prefix}.{expert}.{part}.weight"
                    for part in parts
                    for expert in everyone
                    if expert not in self.unfused[f"{prefix}.{part}"]
                ]
                if fused not in self.wanted or len(absent) == len(parts) * len(everyone):
                    continue
                if fused in self.filled:
                    self.problems["twice"].append(fused)
                else:
                    self.problems["missing"].extend(one for one in absent if one not in self.filled)
                    self.filled[fused] = torch.empty(0)

    def finish(self, folder: Path) -> dict[str, Tensor]:
        """Every wanted tensor.

        Raises:
            InputError: names every tensor that is unknown, missing, misshapen or there twice.
        """
        self.tell_incomplete()
        self.problems["missing"].extend(name for name in self.wanted if name not in self.filled)
        embeddings = self.filled.get("model.embed_tokens.weight")
        if self.tied_head is not None and embeddings is not None and not torch.equal(self.tied_head, embeddings):
            self.problems["unlike the embeddings, though tie_word_embeddings is true"].append("lm_head.weight")
        told = "; ".join(f"{kind}: {', '.join(sorted(names))}" for kind, names in self.problems.items() if names)
        if told:
            raise InputError(f"{folder}: the weights do not fit config.json ({told}); use files of one checkpoint")
        return self.filled


def load_model(
    model_dir: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    are_experts_e4m3: bool = False,
    shard: Shard = ALONE,
) -> KeyeModel:
    """Read a checkpoint folder.

    Args:
        model_dir: folder of the published layout.
        device: where the weights go.
        dtype: of every weight; None keeps each tensor's own.
        are_experts_e4m3: the experts' weights, nineteen of twenty, are rounded to e4m3 with one scale an output column as they
            come in: half the bytes, for answering only.
        shard: the rank whose parts are read, and no others; the published layout is the same for any number of ranks.

    Raises:
        InputError: a file is missing or unreadable, or names or shapes differ from what config.json asks for; all are listed;
            or the ranks cannot share this model; or experts in e4m3 of a model that has none.
    """
    folder = Path(model_dir)
    config = KeyeConfig.load(folder)
    if are_experts_e4m3 and not config.num_experts:
        raise InputError(f"{folder}: experts in e4m3 were asked for, but this model has a dense MLP; leave the option out")
    with torch.device("meta"):
        model = KeyeModel(config)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    shard_model(model, config, shard)
    intake = _Intake(config, wanted, device, dtype, are_experts_e4m3, shard)
    for path, promised in weight_files(folder):
        with open_weights(path) as file:
            present = set(file.keys())
            intake.problems[f"named by {INDEX_FILE} but not in {path.name}"] += sorted(promised - present)
            for name in sorted(present):
                intake.take(name, path, file)
    model.load_state_dict(intake.finish(folder), strict=True, assign=True)
    for name, scale in intake.scales.items():
        prefix, _, projection = name.rpartition(".")
        setattr(model.get_submodule(prefix), projection.replace("_proj", "_scale"), scale)
    model.kept_tensors = tuple(intake.kept.values())
    return model.requires_grad_(False)


def count_packing_parameters(model_dir: str | Path) -> int:
    """Elements of the unused packing table in the weight files of a folder; 0 where there is none, or no weight file at all."""
    folder = Path(model_dir)
    if not (folder / SINGLE_FILE).is_file() and not (folder / INDEX_FILE).is_file():
        return 0
    for path, _ in weight_files(folder):
        with open_weights(path) as file:
            if PACKING_TABLE in set(file.keys()):
                return math.prod(file.get_slice(PACKING_TABLE).get_shape())
    return 0


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """An open safetensors file; a broken one is told as wrong input."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); copy it from its source again") from None


def weight_files(folder: Path) -> list[tuple[Path, set[str]]]:
    """Each weight file with the names that the index promises in it (none for a single file)."""
    index_path, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if not index_path.is_file():
        if not single.is_file():
            raise InputError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there; give a whole checkpoint")
        return [(single, set())]
    try:
        weight_map = json.loads(index_path.read_text())["weight_map"]
        names_of: dict[str, set[str]] = defaultdict(set)
        for name, file_name in weight_map.items():
            names_of[file_name].add(name)
        if not names_of:
            raise ValueError("it names no tensor")
        paths = {file_name: folder / file_name for file_name in sorted(names_of)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index_path}: not a weight index ({error!r}); copy it from its source again") from None
    absent = [file_name for file_name, path in paths.items() if not path.is_file()]
    if absent:
        raise InputError(f"{folder}: shards missing that the index names: {', '.join(absent)}; copy them from their source")
    return [(path, names_of[file_name]) for file_name, path in paths.items()]


def _shards(tensors: dict[str, Tensor], shard_bytes: int) -> dict[str, dict[str, Tensor]]:
    """File name -> its tensors, in order, each file at most `shard_bytes` (or one tensor that is larger)."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, start=1)}


def save_model(model: KeyeModel, model_dir: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write `config.json` and the weights, in one file or in shards with an index; what was kept unread is written back.

    Files are written beside the old ones and then renamed, so that saving over the folder a model came from is safe.

    Raises:
        ValueError: experts in e4m3, whose scales the published layout has no place for, or one rank's part of a model.
    """
    if model.shard.size > 1:
        raise ValueError("one rank's part of a model cannot be saved; load the checkpoint without shard")
    if any(parameter.dtype == torch.float8_e4m3fn for parameter in model.parameters()):
        raise ValueError("experts in e4m3 are for answering and cannot be saved; load the checkpoint without are_experts_e4m3")
    folder = Path(model_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    tensors |= {kept.name: kept.read() for kept in model.kept_tensors}
    shards = _shards(tensors, shard_bytes)
    for name, shard in shards.items():
        save_file(shard, folder / f"{name}.new", metadata={"format": "pt"})
    for old in folder.glob("model*.safetensors*"):
        if old.suffix != ".new":
            old.unlink()
    for name in shards:
        (folder / f"{name}.new").rename(folder / name)
    file_of = {name: file_name for file_name, shard in shards.items() for name in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": file_of}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=1) + "\n")
    for name in shards:
        # The library writes them for their owner's eyes alone.
        shutil.copymode(folder / "config.json", folder / name)
    # The files that the kept tensors came from may just have been replaced.
    model.kept_tensors = tuple(KeptTensor(folder / file_of[kept.name], kept.name) for kept in model.kept_tensors)
