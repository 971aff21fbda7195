"""Rotary tables: three-axis, sectioned (decoder and indexer) and two-axis (vision)."""

import math

import torch
from torch import Tensor

from openkeye.model.config import RopeScaling


def mrope_table(
    position_ids_3T: Tensor, sections: tuple[int, ...], theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D], D = 2 * sum(sections): frequency i belongs to the axis whose section holds it, both halves alike.

    Frequencies theta^(-2i/D), slowed down where `scaling` says so; the first section is time, then height, then width
    (sectioned, not interleaved).
    """
    half = sum(sections)
    device = position_ids_3T.device
    frequencies = _frequencies(half, theta, device)
    if scaling is not None:
        frequencies = _rescaled(frequencies, scaling)
    # Rows repeated by hand: an index made on the host would be a copy that waits for the device.
    positions = torch.cat([row.expand(count, -1) for row, count in zip(position_ids_3T, sections, strict=True)])
    angles = positions.t().float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _frequencies(count: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-i / count) for i = 0..count-1, in fp32.

    In this very form, a reciprocal of an fp32 power, because the weights were trained with it: at position 200,000 the last
    bit of a frequency turns an angle by a hundredth, so a "more exact" table would be a different network.
    """
    return 1.0 / theta ** (torch.arange(count, dtype=torch.float32, device=device) / count)


def _rescaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Long waves slowed by the factor, short ones kept, between them a ramp over the number of turns in the first context."""
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = ramp.clamp(0.0, 1.0)
    return (1.0 - kept) * frequencies / scaling.factor + kept * frequencies


def grid_table(height: int, width: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [height * width, head_dim] of a patch grid, row-major: first the row's angles, then the column's, twice."""
    frequencies = _frequencies(head_dim // 4, theta, device)
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=-1)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()
