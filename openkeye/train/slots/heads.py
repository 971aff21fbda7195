"""Training-only heads: small classifiers that make the features say what we know because we drew the scene."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openkeye.data.slots.slot_batch import CellLabels

EMPTY_CELL_WEIGHT = 0.1
# of cells in which no sprite has its centre: most of them, and all alike
NUM_ONSETS = 4
NUM_DIRECTIONS = 6


class CellHead(nn.Module):
    """What is in each merged cell, straight from the projected features: colour, sprite, and the centre's place in the cell."""

    def __init__(self, hidden_size: int, num_colours: int, num_sprites: int) -> None:
        super().__init__()
        self.colour = nn.Linear(hidden_size, num_colours + 1)
        self.sprite = nn.Linear(hidden_size, num_sprites + 1)
        self.offset = nn.Linear(hidden_size, 2)
        _zero(self)

    def loss(self, features_MD: Tensor, labels: CellLabels) -> Tensor:
        """Mean cross entropy of both names, and squared error of the place (in cells) where there is one."""
        weight = _cell_weight(labels)
        names = _mean_entropy(self.colour(features_MD), labels.colours, weight)
        names = names + _mean_entropy(self.sprite(features_MD), labels.sprites, weight)
        error = (self.offset(features_MD).float() - labels.offsets).pow(2).sum(dim=-1)
        is_filled = (labels.sprites > 0).float()
        return names + 4.0 * (error * is_filled).sum() / is_filled.sum().clamp_min(1)


class SightHead(nn.Module):
    """What each cell has become since the frame before, from a middle layer of the decoder.

    Onset: nothing, the same thing as before, a thing's first appearance, a return. Direction: nothing, at rest or new,
    left, right, up, down. Counting, first and last moments, and motion are sums and comparisons of these.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.onset = nn.Linear(hidden_size, NUM_ONSETS)
        self.direction = nn.Linear(hidden_size, NUM_DIRECTIONS)
        _zero(self)

    def loss(self, hidden_MD: Tensor, labels: CellLabels) -> Tensor:
        """Mean cross entropy of both, [M, D] at the cells' tokens."""
        hidden_MD = F.layer_norm(hidden_MD, hidden_MD.shape[-1:])
        weight = _cell_weight(labels)
        onset = _mean_entropy(self.onset(hidden_MD), labels.onsets, weight)
        return onset + _mean_entropy(self.direction(hidden_MD), labels.directions, weight)


def _zero(head: nn.Module) -> None:
    """A head that begins at zero pulls at the features only after it has learnt something itself."""
    for parameter in head.parameters():
        nn.init.zeros_(parameter)


def _cell_weight(labels: CellLabels) -> Tensor:
    return torch.where(labels.sprites > 0, 1.0, EMPTY_CELL_WEIGHT)


def _mean_entropy(logits_MC: Tensor, labels_M: Tensor, weight_M: Tensor) -> Tensor:
    return (F.cross_entropy(logits_MC.float(), labels_M, reduction="none") * weight_M).sum() / weight_M.sum()
