"""Where the weights of a run come from, and where they go when it is finished."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor

from openkeye.common.checks import writing_to
from openkeye.inputs.processor import resolve_model_dir
from openkeye.model.config import KeyeConfig
from openkeye.model.fresh_indexer import fresh_indexers
from openkeye.model.keye import KeyeModel
from openkeye.model.weights import INDEX_FILE, PACKING_TABLE, POOLING_HEAD, SINGLE_FILE, KeptTensor, load_model, save_model
from openkeye.train.config import PARTS, RunConfig
from openkeye.train.groups import part_of
from openkeye.train.initialise import initialise
from openkeye.train.shard import Ranks

WEIGHT_ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".pt")
# of files that a finished model has its own of
MODEL_CARD = "README.md"
# tells of the model that the run began with


def first_weights(config: RunConfig, model_config: KeyeConfig) -> dict[str, Tensor]:
    """Every parameter in fp32 on the CPU, loaded or fresh.

    Raises:
        InputError: the checkpoint does not fit its config.json.
    """
    weights: dict[str, Tensor] = {}
    if not is_all_fresh(config):
        weights |= loaded_weights(config.model_dir)
    if config.fresh:
        model = KeyeModel(model_config)
        initialise(model, config.seed)
        weights |= {name: tensor for name, tensor in model.state_dict().items() if part_of(name) in config.fresh}
    if "indexer" in config.fresh:
        layers = range(model_config.num_hidden_layers)
        gains = [weights[f"model.layers.{number}.input_layernorm.weight"] for number in layers]
        weights |= {name: tensor.float() for name, tensor in fresh_indexers(model_config, gains, config.seed).items()}
    return weights


def is_all_fresh(config: RunConfig) -> bool:
    """Whether `model_dir` needs no weights."""
    return set(config.fresh) == set(PARTS)


def kept_tensors(folder: Path) -> tuple[KeptTensor, ...]:
    """What no computation uses of a checkpoint whose weights were loaded before, maybe by another process."""
    names = [SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        names = sorted(set(json.loads((folder / INDEX_FILE).read_text())["weight_map"].values()))
    kept = []
    for path in (folder / name for name in names):
        with safe_open(path, framework="pt") as file:
            kept += [KeptTensor(path, name) for name in file.keys() if name == PACKING_TABLE or name.startswith(POOLING_HEAD)]  # noqa: SIM118
    return tuple(kept)


def loaded_weights(model_dir: str) -> dict[str, Tensor]:
    """Every parameter of a checkpoint in fp32 on the CPU.

    Raises:
        InputError: the checkpoint does not fit its config.json.
    """
    return load_model(resolve_model_dir(model_dir), dtype=torch.float32).state_dict()


def fill(keye: KeyeModel, make_weights: Callable[[], dict[str, Tensor]], ranks: Ranks) -> None:
    """Rank 0 makes the first weights, and every rank gets its part of them."""
    weights: dict[str, Any] = make_weights() if ranks.rank == 0 else {}
    set_model_state_dict(keye, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def write_finished(keye: KeyeModel, model_dir: str, out_dir: Path, ranks: Ranks, keeps_tensors: bool = True) -> None:
    """The model in the published layout in `out_dir`, with the tokenizer's and processor's files; all ranks call it.

    The folder is written beside the old one and takes its place when it is whole.

    Args:
        model_dir: that the run began with.
        keeps_tensors: whether its tensors that no computation uses are written back.

    Raises:
        InputError: the folder cannot be written.
    """
    dtype = getattr(torch, keye.config.dtype)
    weights: dict[str, Tensor] = {}
    for name, parameter in keye.named_parameters():
        tensor = parameter.detach()
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if ranks.rank == 0:
            weights[name] = tensor.to("cpu", dtype)
    if ranks.rank != 0:
        return
    with torch.device("meta"):
        model = KeyeModel(keye.config)
    model.load_state_dict(weights, assign=True)
    if keeps_tensors:
        model.kept_tensors = kept_tensors(resolve_model_dir(model_dir))
    unfinished, old = out_dir.with_name(out_dir.name + ".unfinished"), out_dir.with_name(out_dir.name + ".old")
    with writing_to(out_dir):
        for rest in (unfinished, old):
            if rest.exists():
                shutil.rmtree(rest)
        unfinished.mkdir(parents=True)
        for path in resolve_model_dir(model_dir).iterdir():
            if path.is_file() and path.name != MODEL_CARD and not path.name.endswith(WEIGHT_ENDINGS):
                shutil.copy2(path, unfinished / path.name)
        save_model(model, unfinished)
        if out_dir.exists():
            os.replace(out_dir, old)
        os.replace(unfinished, out_dir)
        shutil.rmtree(old, ignore_errors=True)
