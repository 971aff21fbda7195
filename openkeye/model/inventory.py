"""What a configuration costs: parameters per part, and bytes of weights and caches, counted on the module itself.

The module is built on the meta device, so that counting 31 billion parameters takes no memory.
"""

from dataclasses import dataclass

import torch

from openkeye.model.config import KeyeConfig
from openkeye.model.keye import KeyeModel
from openkeye.model.sharding import Shard, local_config, shard_model

BFLOAT16_BYTES = 2
FP8_SCALE_BYTES = 4


@dataclass(frozen=True)
class Part:
    """One line of the table."""

    name: str
    num_parameters: int
    num_tensors: int
    num_active: int
    # parameters that take part in one text token


@dataclass(frozen=True)
class Inventory:
    """Parameters by part and cache sizes per token."""

    parts: tuple[Part, ...]
    kv_bytes_per_token: int
    # bf16 keys and values of all layers
    index_bytes_per_token: int
    # fp8 keys of the indexer with one fp32 scale a token and layer, as published
    index_bytes_per_token_bf16: int
    expert_scale_bytes: int
    # one fp32 scale an output column of experts in e4m3

    @property
    def num_parameters(self) -> int:
        return sum(part.num_parameters for part in self.parts)

    @property
    def num_tensors(self) -> int:
        return sum(part.num_tensors for part in self.parts)

    @property
    def weight_bytes(self) -> int:
        """All weights in bf16."""
        return self.num_parameters * BFLOAT16_BYTES

    @property
    def weight_bytes_e4m3(self) -> int:
        """Experts in e4m3 with their scales, all else in bf16; what no computation reads is not loaded."""
        used = [part for part in self.parts if "unused" not in part.name]
        widths = {part.name: 1 if part.name == "experts" else BFLOAT16_BYTES for part in used}
        return sum(widths[part.name] * part.num_parameters for part in used) + self.expert_scale_bytes

    @property
    def num_active(self) -> int:
        return sum(part.num_active for part in self.parts)


# (part, how its names look), first match wins; the order is the order of the data.
PART_MARKS = (
    ("vision tower", "visual."),
    ("projector", "mlp_AR."),
    ("token embeddings", "model.embed_tokens."),
    ("indexer", ".sa_indexer."),
    ("attention", ".self_attn."),
    ("router", ".mlp.gate."),
    ("experts", ".mlp.experts."),
    ("dense MLPs", ".mlp."),
    ("output head", "lm_head."),
    ("decoder norms", "norm"),
)
# Pixels alone run these.
INACTIVE_FOR_TEXT = ("vision tower", "projector")


def take_inventory(config: KeyeConfig, num_packing_parameters: int, num_ranks: int = 1) -> Inventory:
    """Count everything of a configuration, or of what one rank of several holds of it.

    Args:
        config: the network.
        num_packing_parameters: elements of the packing table, which the checkpoint carries and no computation reads; 0: none.
        num_ranks: that share the model; `num_active` is then the part of one of them too.

    Raises:
        InputError: so many cannot share it.
    """
    with torch.device("meta"):
        model = KeyeModel(config)
    shard_model(model, config, Shard(0, num_ranks))
    sizes: dict[str, list[int]] = {name: [] for name, _ in PART_MARKS}
    for name, parameter in model.named_parameters():
        part = next(part for part, mark in PART_MARKS if mark in name)
        sizes[part].append(parameter.numel())
    parts = []
    for part, counts in sizes.items():
        active = 0 if part in INACTIVE_FOR_TEXT else sum(counts)
        if part == "experts" and counts:
            active = active * config.num_experts_per_tok // config.num_experts
        if counts:
            parts.append(Part(part, sum(counts), len(counts), active))
        if part == "vision tower" and num_packing_parameters:
            parts.append(Part("packing table (unused)", num_packing_parameters, 1, 0))
    layers, index_width = config.num_hidden_layers, config.indexer.head_dim
    num_groups = local_config(config, num_ranks).num_key_value_heads
    return Inventory(
        parts=tuple(parts),
        kv_bytes_per_token=layers * 2 * num_groups * config.head_dim * BFLOAT16_BYTES,
        index_bytes_per_token=layers * (index_width + FP8_SCALE_BYTES),
        index_bytes_per_token_bf16=layers * index_width * BFLOAT16_BYTES,
        expert_scale_bytes=layers
        * (config.num_experts // num_ranks)
        * (2 * config.moe_intermediate_size + config.hidden_size)
        * FP8_SCALE_BYTES,
    )
