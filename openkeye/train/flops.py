"""Floating-point operations of training, counted from the configuration, and the peaks of GPUs."""

import torch

from openkeye.data.packed_batch import PackedBatch
from openkeye.model.config import KeyeConfig
from openkeye.model.keye import KeyeModel
from openkeye.train.config import StageConfig
from openkeye.train.groups import part_of

PEAKS = {"H100": 989e12, "H200": 989e12, "GH200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12}
# dense bf16 operations a second, by a part of the device's name


def device_peak(device: torch.device) -> float | None:
    """Of one GPU, from its name; None where it is not known, and on a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def decoder_flops(keye: KeyeModel) -> float:
    """Of the matrix products that every token goes through in the decoder's layers, forward; the indexer is not among them."""
    total = 0.0
    for name, parameter in keye.model.layers.named_parameters():
        if part_of(f"model.layers.{name}") == "decoder" and parameter.ndim >= 2:
            # Of a stack of experts a token meets a few.
            share = keye.config.num_experts_per_tok / parameter.shape[0] if parameter.ndim == 3 else 1.0
            total += 2.0 * parameter.numel() * share
    return total


def vision_flops(config: KeyeConfig, num_patches: int, num_pictures: int) -> float:
    """Of the vision tower and the projector, forward; pictures are taken to be equally large."""
    if config.vision is None or not num_patches:
        return 0.0
    vision = config.vision
    merged = vision.hidden_size * vision.spatial_merge_size**2
    layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    attention = 2 * num_patches / max(1, num_pictures) * vision.hidden_size
    projector = merged * (merged + config.hidden_size) / vision.spatial_merge_size**2
    embedding = vision.num_channels * vision.patch_size**2 * vision.hidden_size
    return 2.0 * num_patches * (vision.num_hidden_layers * (layer + attention) + projector + embedding)


def pairs(batch: PackedBatch, limit: int | None = None) -> float:
    """Pairs of a query and a key that it sees, of at most `limit` keys each."""
    total = 0.0
    for span in batch.layout.spans:
        trunk = span.trunk_end - span.start
        segments = [(0, trunk)]
        ends = (*span.branches[1:], span.end)
        segments += [(trunk, end - start) for start, end in zip(span.branches, ends, strict=bool(span.branches))]
        total += sum(_seen(before, length, limit) for before, length in segments)
    return total


def _seen(before: int, length: int, limit: int | None) -> float:
    """sum of min(limit, before + 1 + t) over t < length."""
    if limit is None:
        return length * before + length * (length + 1) / 2
    num_short = min(length, max(0, limit - before))
    return num_short * before + num_short * (num_short + 1) / 2 + (length - num_short) * limit


def pass_flops(config: KeyeConfig, per_token: float, stage: StageConfig, batch: PackedBatch) -> float:
    """Of one pack, forward and backward, recomputation not counted: what the model asks for, not what a run spends.

    per_token: `decoder_flops` of the model.
    """
    width = config.num_attention_heads * config.head_dim
    layers = config.num_hidden_layers
    limit = config.indexer.top_k if stage.attention == "sparse" else None
    trunk = batch.num_tokens * per_token + 4.0 * layers * width * pairs(batch, limit)
    head = 2.0 * batch.num_learnt * config.hidden_size * config.vocab_size if stage.answer_weight else 0.0
    num_pictures = sum(pictures.num_pictures for pictures in batch.pictures)
    merge = config.vision.spatial_merge_size**2 if config.vision is not None else 0
    vision = vision_flops(config, batch.media_positions.shape[0] * merge, num_pictures)
    index_width = config.indexer.num_heads * config.indexer.head_dim
    index = 0.0
    if stage.attention == "sparse" or stage.indexer_target != "none":
        projections = config.hidden_size * (index_width + config.indexer.num_heads + config.indexer.head_dim)
        index = 2.0 * layers * (batch.num_tokens * projections + index_width * pairs(batch))
    # Gradients of the input where anything below learns, gradients of the weights where they learn.
    reaches = any(part in stage.trains for part in ("vision", "projector", "decoder"))
    learns = "decoder" in stage.trains
    return (
        trunk * (1 + reaches + learns)
        + head * (1 + reaches + learns)
        + vision * (1 + 2 * ("vision" in stage.trains))
        + index * (1 + 2 * ("indexer" in stage.trains))
    )
