"""Small random checkpoints of other families, written by transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.inputs.checkpoint import write_checkpoint

transformers = pytest.importorskip("transformers")

SHAPE: dict[str, Any] = {
    "vocab_size": 308, "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 80, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "eos_token_id": 2,
}  # fmt: skip


def write_source(folder: Path, family: str = "Llama", **changes: Any) -> tuple[Path, Any]:
    """A folder as `save_pretrained` leaves it, with a tokenizer, and the model."""
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().to(config.dtype or torch.float32)
    for name, parameter in model.named_parameters():
        # Their own initialisation is so small that attention would be flat.
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3 if parameter.ndim == 1 else 0.15)
    model.save_pretrained(folder)
    write_checkpoint(folder.with_name("tokenizer"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder.with_name("tokenizer") / name).read_text())
    return folder, model
