"""Which experts every cached token was sent to, beside its keys: whoever shares a page shares its routes.

Letters: T new tokens, S slots, L layers, K experts a token.
"""

import numpy as np
import torch
from torch import Tensor

from openkeye.common.checks import InputError
from openkeye.model.experts import MixtureOfExperts
from openkeye.model.keye import KeyeModel


class RouteCache:
    """Expert ids by cache slot, written on the device by the step that makes the keys; a captured graph may hold that write."""

    def __init__(self, model: KeyeModel, num_slots: int) -> None:
        """Let the model's routers keep what they pick.

        Raises:
            InputError: a model without experts.
        """
        self._mixtures = [part for part in model.modules() if isinstance(part, MixtureOfExperts)]
        if not self._mixtures:
            raise InputError("records_routes was asked for, but this model has a dense MLP; leave it out")
        for mixture in self._mixtures:
            mixture.keeps_picks = True
        shape = (num_slots + 1, len(self._mixtures), model.config.num_experts_per_tok)
        self._routes_SLK = torch.full(shape, -1, dtype=torch.int16, device=model.model.embed_tokens.weight.device)
        # The last row takes those of tokens that pad, whose slot is -1.

    def write(self, slots_T: Tensor) -> None:
        """Keep the picks of the model call before: slots_T int64, one of each of its tokens, -1 for one that pads."""
        picked = [mixture.picked_TK for mixture in self._mixtures]
        self._routes_SLK[slots_T] = torch.stack([ids_TK for ids_TK in picked if ids_TK is not None], dim=1).short()

    def read(self, slots_S: Tensor) -> np.ndarray:
        """[S, L, K] int16 of some slots, on the host."""
        return self._routes_SLK[slots_S].cpu().numpy()
