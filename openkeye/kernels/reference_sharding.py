"""Operations of which several ranks each do a part, in plain PyTorch; the parts make what `reference.py` defines.

Letters: T tokens, E experts of this rank, D model width, F expert width, K picked experts or tokens, B requests, C candidates.
"""

import torch
from torch import Tensor

from openkeye.kernels.reference import experts, widen

NONE = torch.iinfo(torch.int64).min
# a candidate that there is not
POSITION_BITS = 32


def experts_share(
    x_TD: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    weights_TK: Tensor,
    expert_ids_TK: Tensor,
    first_expert: int,
    gate_up_scale_EF: Tensor | None = None,
    down_scale_ED: Tensor | None = None,
    has_fixed_blocks: bool = False,
) -> Tensor:
    """`reference.experts` of which a rank holds E from first_expert on: what they add, [T, D]. Other picks add nothing."""
    ids_TK = expert_ids_TK - first_expert
    token, pick = ((ids_TK >= 0) & (ids_TK < gate_up_EDF.shape[0])).nonzero(as_tuple=True)
    wide = widen(x_TD)
    picks = (widen(weights_TK)[token, pick, None], ids_TK[token, pick, None])
    rows = experts(wide[token], gate_up_EDF, down_EFD, *picks, gate_up_scale_EF, down_scale_ED, has_fixed_blocks)
    return torch.zeros_like(wide).index_add_(0, token, rows).to(x_TD.dtype)


def rank_candidates(scores_BC: Tensor, positions_BC: Tensor) -> Tensor:
    """A number for a score and its position, int64 [B, C]: larger for a larger score, of equal ones for the smaller position.

    Scores are float32; where a position is negative there is no candidate (`NONE`, below all others).
    """
    # -0.0 equals 0.0 and must not come behind it.
    bits = (scores_BC.float() + 0.0).view(torch.int32)
    # Floats above zero are ordered as their bits are, those below zero the other way round.
    ordered = torch.where(bits < 0, ~bits ^ torch.iinfo(torch.int32).min, bits).long()
    number = (ordered << POSITION_BITS) + (torch.iinfo(torch.int32).max - positions_BC.long())
    return torch.where(positions_BC < 0, NONE, number)


def merge_candidates(numbers_BC: Tensor, k: int) -> Tensor:
    """Positions of the k best of `rank_candidates`, [B, k] int32, ascending, -1 at the end where there are fewer."""
    best_BK = numbers_BC.topk(min(k, numbers_BC.shape[1]), dim=-1).values
    positions = torch.iinfo(torch.int32).max - (best_BK & ((1 << POSITION_BITS) - 1))
    last = torch.iinfo(torch.int64).max
    positions = torch.where(best_BK == NONE, last, positions).sort(dim=-1).values
    picked = torch.where(positions == last, -1, positions).int()
    return torch.nn.functional.pad(picked, (0, k - picked.shape[1]), value=-1)
