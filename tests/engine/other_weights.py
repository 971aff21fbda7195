"""The bundled checkpoint with some of its weights changed: what a learner publishes."""

import torch
from torch import Tensor

from openkeye.inputs.processor import BUNDLED_DIR
from openkeye.model.weights import load_model

CHANGED = ("q_proj", "sa_indexer.k_proj", "experts", "lm_head", "input_layernorm", "mlp_AR")


def published() -> dict[str, Tensor]:
    """The checkpoint's own tensors."""
    return dict(load_model(BUNDLED_DIR, "cpu").state_dict())


def changed(tensors: dict[str, Tensor], seed: int = 0, share: float = 0.05, scale: float = 0.05) -> dict[str, Tensor]:
    """The same with a share of the elements of some tensors moved."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, tensor in tensors.items():
        if not any(part in name for part in CHANGED):
            moved[name] = tensor
            continue
        is_moved = torch.rand(tensor.shape, generator=generator) < share
        noise = scale * torch.randn(tensor.shape, generator=generator)
        moved[name] = torch.where(is_moved, tensor.float() + noise, tensor.float()).to(tensor.dtype)
    return moved
