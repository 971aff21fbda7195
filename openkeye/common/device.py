"""Moving tensors to the device that computes."""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """To the device, through pinned memory where that lets the copy run while the host goes on.

    An ordinary copy to a GPU makes the host wait until everything before it has run there.
    """
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
