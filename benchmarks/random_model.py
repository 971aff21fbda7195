"""The 30B shape with random weights, and prompts whose neighbouring tokens select alike, as those of a trained model do.

Random weights select at random: then 16 neighbours share next to nothing, which no trained model does. Selection depends on
hidden states alone, so the inputs are given the structure: the vocabulary falls into topics, the embeddings of a topic's tokens
differ by some noise, and a prompt stays with a topic for a while. How many keys 16 neighbours choose between them follows from
the noise and is measured (`Unions`); with noise alone nothing is shared, which is the worst case.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from openkeye.engine import batch
from openkeye.inputs.model_input import ModelInput
from openkeye.inputs.processor import Processor, resolve_model_dir
from openkeye.inputs.prompt import Prompt
from openkeye.kernels.dispatch import quantize_expert_weights
from openkeye.kernels.unions import TILE
from openkeye.model.config import KeyeConfig
from openkeye.model.experts import Experts
from openkeye.model.keye import KeyeModel
from openkeye.model.published import published_config
from openkeye.model.weights import save_model

TOPIC_TOKENS = 37
# of the vocabulary in one topic
RUN = 64
# tokens of a prompt that stay with a topic
MEASURED_TILES = 4
# of each chunk and layer whose unions are counted


def shape_30b() -> KeyeConfig:
    return published_config("keye-vl-2.0-30b-a3b")


def shape_tiny() -> KeyeConfig:
    """The same network of a size for rehearsals."""
    indexer = dataclasses.replace(shape_30b().indexer, num_heads=4, head_dim=32, top_k=16)
    return dataclasses.replace(
        shape_30b(),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        mrope_section=(8, 12, 12),
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        vocab_size=740,
        vision=None,
        indexer=indexer,
        max_position_embeddings=512,
    )


def random_model(config: KeyeConfig, device: str, dtype: torch.dtype, are_experts_e4m3: bool, noise: float) -> KeyeModel:
    """Matrices that keep the size of what goes through them; tensor by tensor, so that e4m3 needs no room for more."""
    with torch.device("meta"):
        model = KeyeModel(config)
    generator = torch.Generator(device).manual_seed(0)
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            made = torch.empty(parameter.shape, dtype=dtype, device=device)
            if f"{name}.{key}" == "model.embed_tokens.weight":
                made = topic_embeddings(parameter.shape, noise, generator, device).to(dtype)
            elif parameter.dim() == 1:
                made.fill_(0.0 if key == "bias" else 1.0)
            else:
                # Experts are input-major: their depth is the middle one.
                made.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
            if are_experts_e4m3 and isinstance(module, Experts):
                made, scale = quantize_expert_weights(made)
                setattr(module, key.replace("_proj", "_scale"), scale)
            setattr(module, key, nn.Parameter(made, requires_grad=False))
    return model.requires_grad_(False)


def topic_embeddings(shape: torch.Size, noise: float, generator: torch.Generator, device: str) -> Tensor:
    """[V, D]: a vector a topic, and noise of that many times its size a token."""
    vocabulary, width = shape
    topics = torch.randn(-(-vocabulary // TOPIC_TOKENS), width, generator=generator, device=device)
    own = torch.randn(vocabulary, width, generator=generator, device=device)
    return topics.repeat_interleave(TOPIC_TOKENS, 0)[:vocabulary] + noise * own


def topical_ids(num_tokens: int, vocabulary: int, seed: int = 0) -> Tensor:
    """[T] int64: runs of tokens of one topic."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randint(vocabulary // TOPIC_TOKENS, (-(-num_tokens // RUN),), generator=generator)
    within = torch.randint(TOPIC_TOKENS, (num_tokens,), generator=generator)
    return topics.repeat_interleave(RUN)[:num_tokens] * TOPIC_TOKENS + within


def text_prompt(ids_T: Tensor) -> Prompt:
    """Tokens as text."""
    positions = torch.arange(ids_T.shape[0]).expand(3, -1).contiguous()
    return Prompt(ModelInput(ids_T, positions), "", (), ())


class Unions:
    """How many keys 16 neighbouring queries of a prompt choose between them, over all layers."""

    def __init__(self) -> None:
        self.sizes: list[Tensor] = []

    def mean(self) -> float:
        """Of all counted tiles."""
        return float(torch.stack(self.sizes).float().mean()) if self.sizes else float("nan")

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Selections of prompts in pages are counted meanwhile."""
        select = batch.indexer_select

        def record(*arguments: Tensor, **pages: object) -> Tensor:
            lists = select(*arguments, **pages)  # type: ignore[arg-type]
            for tile in range(MEASURED_TILES):
                first = tile * lists.shape[0] // MEASURED_TILES // TILE * TILE
                chosen = lists[first : first + TILE].flatten()
                self.sizes.append((chosen[chosen >= 0]).unique().numel() * torch.ones(()))
            return lists

        batch.indexer_select = record  # type: ignore[assignment]
        try:
            yield
        finally:
            batch.indexer_select = select


def write_random_model(folder: Path, config: KeyeConfig, device: str, dtype: torch.dtype) -> None:
    """A text model with random weights as a checkpoint, with the bundled model's tokenizer, which knows of fewer tokens.

    No token ends an answer, so that all are as long as they may be.
    """
    bundled = resolve_model_dir("openkeye-tiny")
    tokenizer = Processor.load(bundled)
    ids = {"image_token_id": tokenizer.image_token_id, "video_token_id": tokenizer.video_token_id}
    config = dataclasses.replace(config, vision=None, dtype=str(dtype).removeprefix("torch."), **ids)
    save_model(random_model(config, device, dtype, False, 0.0), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy2(bundled / name, folder / name)
    (folder / "generation_config.json").write_text('{"eos_token_id": []}\n')
