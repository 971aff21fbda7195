"""Fresh weights for a network that will be trained from nothing."""

import torch
from torch import nn

from openkeye.model.keye import KeyeModel

OUTPUT_NAMES = ("o_proj.weight", "out_proj.weight", "fc2.weight", "down_proj", "down_proj.weight")
# matrices that write into the residual stream


@torch.no_grad()
def initialise(model: KeyeModel, seed: int) -> None:
    """Normal weights of variance 1 / fan-in, residual writers divided by sqrt(2 * layers), norms one, biases zero.

    The generator runs on the host, so that every device starts from the same weights.
    """
    generator = torch.Generator().manual_seed(seed)
    num_text = model.config.num_hidden_layers
    num_vision = model.config.vision.num_hidden_layers if model.config.vision is not None else 1
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            continue
        fan_in = parameter.shape[1] if parameter.ndim <= 3 else parameter[0].numel()
        # Fused experts are input-major [E, in, out]; linear layers are [out, in].
        std = fan_in**-0.5
        if "embed_tokens" in name:
            std = 0.5
        elif "position_embedding" in name:
            std = 0.2
        elif "lm_head" in name:
            std = 0.02
        elif name.endswith(OUTPUT_NAMES):
            std *= (2 * (num_vision if name.startswith("visual") else num_text)) ** -0.5
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


def count_parameters(model: nn.Module) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in model.parameters())
