"""Teachers merged without learning: averages of their weights, or of what they have gone from their common base."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from openkeye.common.checks import InputError, writing_to
from openkeye.distill.teacher_weights import DELTA_SETTINGS, ResidentWeights
from openkeye.inputs.processor import resolve_model_dir
from openkeye.model.config import KeyeConfig
from openkeye.model.keye import KeyeModel
from openkeye.model.weights import save_model
from openkeye.train.start import MODEL_CARD, WEIGHT_ENDINGS


def average(models: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The weighted mean of every tensor, summed in fp64 and rounded once to the tensor's own dtype.

    Args:
        models: tensors by name, alike in names and shapes.
        weights: of each, above 0 in sum; they are divided by it. None: all alike.

    Raises:
        ValueError: models that are not alike, or weights that sum to nothing.
    """
    shares = _shares(models, weights)
    first = models[0]
    merged = {}
    for name, tensor in first.items():
        _check_alike(models, name)
        total = torch.zeros(tensor.shape, dtype=torch.float64)
        for model, share in zip(models, shares, strict=True):
            total += share * model[name].double()
        merged[name] = total.to(tensor.dtype)
    return merged


def add_directions(base: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]], scale: float) -> dict[str, Tensor]:
    """base + scale * (sum over models of model - base), task arithmetic (Ilharco et al. 2022); 1 / models is the mean.

    Raises:
        ValueError: models that are not alike.
    """
    merged = {}
    for name, tensor in base.items():
        _check_alike([base, *models], name)
        total = tensor.double()
        for model in models:
            total = total + scale * (model[name].double() - tensor.double())
        merged[name] = total.to(tensor.dtype)
    return merged


def write_average(
    teachers: Sequence[str | Path],
    out_dir: str | Path,
    weights: Sequence[float] | None = None,
    base_dir: str | Path | None = None,
) -> None:
    """The mean of teachers as a checkpoint, with the first one's other files.

    Args:
        teachers: folders: checkpoints, or deltas of the base.
        out_dir: where it goes.
        weights: see `average`.
        base_dir: that deltas are of.

    Raises:
        InputError: teachers of unlike architectures, a delta without its base, or a folder that cannot be written.
    """
    folders = [resolve_model_dir(teacher) for teacher in teachers]
    if not folders:
        raise InputError("no teachers to average; give at least one folder")
    unlike = [str(folder) for folder in folders if KeyeConfig.load(folder) != KeyeConfig.load(folders[0])]
    if unlike:
        raise InputError(f"{', '.join(unlike)}: config.json is not that of {folders[0]}; average models of one architecture")
    models = [_weights_of(folder, base_dir) for folder in folders]
    try:
        merged = average(models, weights)
    except ValueError as error:
        raise InputError(f"weights cannot be averaged: {error}") from error
    with torch.device("meta"):
        model = KeyeModel(KeyeConfig.load(folders[0]))
    model.load_state_dict(merged, assign=True)
    out = Path(out_dir)
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        for path in folders[0].iterdir():
            if path.is_file() and path.name not in (MODEL_CARD, DELTA_SETTINGS) and not path.name.endswith(WEIGHT_ENDINGS):
                shutil.copy2(path, out / path.name)
        save_model(model, out)


def _weights_of(folder: Path, base_dir: str | Path | None) -> dict[str, Tensor]:
    return ResidentWeights(base_dir).use(folder).state_dict()


def _shares(models: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None) -> list[float]:
    given = [1.0] * len(models) if weights is None else list(weights)
    if len(given) != len(models) or not sum(given) > 0 or min(given) < 0:
        raise ValueError(f"weights {given} for {len(models)} models; give one each, none below 0 and one above")
    return [weight / sum(given) for weight in given]


def _check_alike(models: Sequence[Mapping[str, Tensor]], name: str) -> None:
    for model in models:
        if model.keys() != models[0].keys() or model[name].shape != models[0][name].shape:
            raise ValueError(f"the models differ in their tensors ({name})")
