"""`experts` without a host round trip: tokens sorted by expert, one grouped matrix product per projection."""

import torch
import torch.nn.functional as F
from torch import Tensor


def can_group(x_TD: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor) -> bool:
    """True where torch's grouped product serves: bf16 on a GPU of compute capability 9, rows of 16 bytes."""
    return (
        x_TD.is_cuda
        and x_TD.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x_TD.device)[0] == 9
        and x_TD.shape[1] % 8 == 0
        and gate_up_EDF.shape[2] % 8 == 0
        and down_EFD.shape[1] % 8 == 0
    )


def grouped_experts(x_TD: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """See `reference.experts`: the same result in the same layout."""
    num_tokens, num_picked = expert_ids_TK.shape
    flat_ids = expert_ids_TK.flatten()
    order = flat_ids.argsort(stable=True)
    experts = torch.arange(gate_up_EDF.shape[0], device=flat_ids.device)
    ends = (flat_ids[:, None] <= experts).sum(dim=0).int()
    rows = x_TD[order // num_picked]
    gate, up = torch._grouped_mm(rows, gate_up_EDF, offs=ends).chunk(2, dim=-1)
    out = torch._grouped_mm(F.silu(gate) * up, down_EFD, offs=ends)
    # Back to token order, then one sum over each token's experts: the same order of additions on every run.
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    picked = out[back].unflatten(0, (num_tokens, num_picked))
    return (picked.float() * weights_TK[..., None].float()).sum(dim=1).to(x_TD.dtype)
