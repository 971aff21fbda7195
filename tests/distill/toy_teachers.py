"""Small networks over tokens that mean nothing, as students and teachers; their prompts are made by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from openkeye.inputs.model_input import ModelInput
from openkeye.inputs.prompt import Picture, Prompt
from openkeye.model.config import KeyeConfig
from openkeye.model.keye import KeyeModel
from openkeye.model.weights import load_model, save_model
from openkeye.train.initialise import initialise
from tests.train.toy_runs import IMAGE, TOY, VOCABULARY

TEXT_TOY = replace(TOY, vision=None, num_hidden_layers=1)


def write_model(folder: Path, seed: int = 1, config: KeyeConfig = TEXT_TOY) -> Path:
    """A fresh model that says something: its head is as large as its embeddings."""
    model = KeyeModel(config)
    initialise(model, seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        model.lm_head.weight.copy_(0.3 * torch.randn(model.lm_head.weight.shape, generator=generator))
    save_model(model, folder)
    return folder


def write_descendant(base: Path, folder: Path, seed: int, names: tuple[str, ...] = ("lm_head.weight",), rows: int = 3) -> Path:
    """A copy of a model with a few rows of some tensors changed."""
    model = load_model(base)
    generator = torch.Generator().manual_seed(seed)
    weights = model.state_dict()
    for name in names:
        matrix = weights[name].view(-1, weights[name].shape[-1])
        chosen = torch.randperm(matrix.shape[0], generator=generator)[:rows]
        matrix[chosen] += torch.randn(len(chosen), matrix.shape[1], generator=generator)
    save_model(model, folder)
    return folder


def text_prompt(*ids: int) -> Prompt:
    """Of tokens alone."""
    tokens = torch.tensor(ids)
    return Prompt(ModelInput(tokens, torch.arange(len(tokens)).expand(3, -1)), "", (), (), tuple(ids))


def picture_prompt(seed: int = 0) -> Prompt:
    """Two tokens, a picture of two tokens, two tokens."""
    pixels = np.random.default_rng(seed).integers(0, 256, (28, 56, 3), dtype=np.uint8)
    ids = torch.tensor([3, 4, IMAGE, IMAGE, 5, 6])
    positions = torch.tensor([[0, 1, 2, 2, 4, 5], [0, 1, 2, 2, 4, 5], [0, 1, 2, 3, 4, 5]])
    return Prompt(ModelInput(ids, positions), "", (pixels,), (Picture(0, 2, 2, False),), (3, 4, IMAGE, 5, 6))


def response(seed: int, length: int = 9) -> np.ndarray:
    """Random tokens."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).astype(np.int32)
