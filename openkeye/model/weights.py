"""Checkpoints of the published layout in and out: strict, so that no tensor is ever left random or dropped in silence.

A folder holds `config.json` and either `model.safetensors` or shards named by `model.safetensors.index.json`. Experts are
fused 3-D tensors; the un-fused names of other releases are accepted and stacked.
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from openkeye.common.checks import InputError
from openkeye.model.config import KeyeConfig
from openkeye.model.keye import KeyeModel

PACKING_TABLE = "visual.vision_model.embeddings.packing_position_embedding.weight"
# In the published file, used by no computation: recognised, never loaded, written back on saving.
UNFUSED = re.compile(r"(?P<prefix>.*\.mlp\.experts)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj)\.weight")
SHARD_BYTES = 5 << 30


@dataclass(frozen=True)
class KeptTensor:
    """A tensor that stays in its file until it is written back."""

    path: Path
    name: str

    def read(self) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name)


@dataclass
class _Problems:
    """Everything wrong with a checkpoint, told in one error."""

    lines: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, what: str) -> None:
        self.lines[kind].append(what)

    def raise_if_any(self, model_dir: Path) -> None:
        if self.lines:
            told = "; ".join(f"{kind}: {', '.join(sorted(names))}" for kind, names in self.lines.items())
            raise InputError(f"{model_dir}: the weights do not fit config.json ({told}); use files of one checkpoint")


def load_model(model_dir: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> KeyeModel:
    """Read a checkpoint folder.

    Args:
        model_dir: folder of the published layout.
        device: where the weights go.
        dtype: of every weight; None keeps each tensor's own.

    Raises:
        InputError: a file is missing or unreadable, or names or shapes differ from what config.json asks for; all are listed.
    """
    folder = Path(model_dir)
    config = KeyeConfig.load(folder)
    with torch.device("meta"):
        model = KeyeModel(config)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    filled: dict[str, Tensor] = {}
    unfused: dict[str, dict[int, Tensor]] = defaultdict(dict)
    problems = _Problems()
    kept: list[KeptTensor] = []
    for path, names in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                present = set(file.keys())
                for name in sorted(names - present) if names else []:
                    problems.add(f"named by the index but not in {path.name}", name)
                for name in sorted(present):
                    if name == PACKING_TABLE and config.vision is not None:
                        kept.append(KeptTensor(path, name))
                    elif name.endswith("rotary_emb.inv_freq"):
                        continue
                    elif match := UNFUSED.fullmatch(name):
                        key = f"{match['prefix']}.{match['part']}"
                        if int(match["expert"]) in unfused[key]:
                            problems.add("twice", name)
                        unfused[key][int(match["expert"])] = file.get_tensor(name).to(device, dtype)
                    elif name == "lm_head.weight" and config.tie_word_embeddings:
                        continue
                    elif name not in wanted:
                        problems.add("unknown", name)
                    elif name in filled:
                        problems.add("twice", name)
                    else:
                        filled[name] = file.get_tensor(name).to(device, dtype)
        except SafetensorError as error:
            raise InputError(f"{path}: not a readable safetensors file ({error}); copy it from its source again") from None
    _fuse(unfused, filled, config, problems)
    for name, shape in wanted.items():
        if name not in filled:
            problems.add("missing", name)
        elif tuple(filled[name].shape) != shape:
            problems.add("misshapen", f"{name} {list(filled[name].shape)} instead of {list(shape)}")
    problems.raise_if_any(folder)
    model.load_state_dict(filled, strict=True, assign=True)
    model.kept_tensors = tuple(kept)
    return model.requires_grad_(False)


def _files(folder: Path) -> list[tuple[Path, set[str]]]:
    """Each weight file with the names that the index promises in it (none for a single file)."""
    index_path, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file() and not index_path.is_file():
        return [(single, set())]
    if not index_path.is_file():
        raise InputError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there; give a whole checkpoint")
    try:
        weight_map = json.loads(index_path.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{index_path}: not a weight index ({error!r}); copy it from its source again") from None
    names_of: dict[str, set[str]] = defaultdict(set)
    for name, file_name in weight_map.items():
        names_of[file_name].add(name)
    absent = [file_name for file_name in sorted(names_of) if not (folder / file_name).is_file()]
    if absent:
        raise InputError(f"{folder}: shards missing that the index names: {', '.join(absent)}; copy them from their source")
    return [(folder / file_name, names) for file_name, names in sorted(names_of.items())]


def _fuse(unfused: dict[str, dict[int, Tensor]], filled: dict[str, Tensor], config: KeyeConfig, problems: _Problems) -> None:
    """Stack per-expert [out, in] matrices into the fused, input-major tensors."""
    everyone = set(range(config.num_experts))
    for key, by_expert in unfused.items():
        for expert in sorted(everyone ^ set(by_expert)):
            prefix, part = key.rsplit(".", 1)
            problems.add("missing" if expert in everyone else "unknown", f"{prefix}.{expert}.{part}.weight")
    for prefix in {key.rsplit(".", 1)[0] for key in unfused}:
        parts = [unfused.get(f"{prefix}.{part}", {}) for part in ("gate_proj", "up_proj", "down_proj")]
        if any(set(part) != everyone for part in parts):
            continue
        gate, up, down = (torch.stack([part[expert] for expert in sorted(part)]).transpose(1, 2) for part in parts)
        for name, tensor in ((f"{prefix}.gate_up_proj", torch.cat([gate, up], dim=2)), (f"{prefix}.down_proj", down)):
            if name in filled:
                problems.add("twice", name)
            filled[name] = tensor.contiguous()


def save_model(model: KeyeModel, model_dir: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write `config.json` and the weights, in one file or in shards with an index; what was kept unread is written back.

    Files are written beside the old ones and then renamed, so that saving over the folder a model came from is safe.
    """
    folder = Path(model_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    tensors |= {kept.name: kept.read() for kept in model.kept_tensors}
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * tensor.element_size()
        if size + num_bytes > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += num_bytes
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / f"{name}.new", metadata={"format": "pt"})
    for old in folder.glob("model*.safetensors*"):
        if not old.name.endswith(".new"):
            old.unlink()
    for name in names:
        (folder / f"{name}.new").rename(folder / name)
    if len(shards) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=1) + "\n")
