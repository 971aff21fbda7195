"""`route`: the softmax over all experts, the best few and their shares, one launch, in Triton, on any CUDA GPU.

Twin: `reference.route`. Letters: T tokens, E experts, K picked experts, R tokens of a program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_EXPERTS = 1024
PROGRAM_ELEMENTS = 512


def route(logits_TE: Tensor, num_picked: int, is_normalised: bool) -> tuple[Tensor, Tensor]:
    """See `reference.route`; without gradients, and of equal probabilities the smaller expert comes first.

    Raises:
        ValueError: more experts than are served, or another dtype.
    """
    num_tokens, num_experts = logits_TE.shape
    if logits_TE.dtype not in DTYPES or not 1 <= num_picked <= num_experts <= MAX_EXPERTS or logits_TE.stride(1) != 1:
        raise ValueError(
            f"route serves bfloat16, float16 and float32 rows of at most {MAX_EXPERTS} experts, got {logits_TE.dtype} of "
            f"{tuple(logits_TE.shape)} and {num_picked} to pick"
        )
    weights = torch.empty(num_tokens, num_picked, dtype=logits_TE.dtype, device=logits_TE.device)
    ids = torch.empty(num_tokens, num_picked, dtype=torch.int64, device=logits_TE.device)
    padded = triton.next_power_of_2(num_experts)
    rows = max(1, PROGRAM_ELEMENTS // padded)
    if num_tokens:
        _route[(triton.cdiv(num_tokens, rows),)](
            logits_TE,
            weights,
            ids,
            num_tokens,
            logits_TE.stride(0),
            EXPERTS=num_experts,
            PADDED=padded,
            PICKED=num_picked,
            PADDED_PICKED=triton.next_power_of_2(num_picked),
            ROWS=rows,
            IS_NORMALISED=is_normalised,
            num_warps=4 if rows > 1 else 1,
        )
    return weights, ids


@triton.jit
def _route(
    logits,
    weights,
    ids,
    num_tokens,
    logits_row,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    PICKED: tl.constexpr,
    PADDED_PICKED: tl.constexpr,
    ROWS: tl.constexpr,
    IS_NORMALISED: tl.constexpr,
):
    token_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert_E = tl.arange(0, PADDED)
    is_token_R = token_R < num_tokens
    is_logit_RE = is_token_R[:, None] & (expert_E < EXPERTS)[None, :]
    place_RE = logits + token_R[:, None] * logits_row + expert_E[None, :]
    logit_RE = tl.load(place_RE, mask=is_logit_RE, other=float("-inf")).to(tl.float32)
    # Rows beyond the last token hold nothing but -inf, whose difference would be no number.
    top_R = tl.where(is_token_R, tl.max(logit_RE, 1), 0.0)
    share_RE = tl.exp(logit_RE - top_R[:, None])
    share_RE = share_RE / tl.where(is_token_R, tl.sum(share_RE, 1), 1.0)[:, None]
    # A padded expert comes after every real one, whose share may be zero.
    left_RE = tl.where((expert_E < EXPERTS)[None, :], share_RE, -1.0)
    pick_K = tl.arange(0, PADDED_PICKED)
    weight_RK = tl.zeros([ROWS, PADDED_PICKED], tl.float32)
    id_RK = tl.zeros([ROWS, PADDED_PICKED], tl.int32)
    for pick in tl.static_range(PICKED):
        best_R = tl.max(left_RE, 1)
        id_R = tl.min(tl.where(left_RE == best_R[:, None], expert_E[None, :], PADDED), 1)
        weight_RK = tl.where((pick_K == pick)[None, :], best_R[:, None], weight_RK)
        id_RK = tl.where((pick_K == pick)[None, :], id_R[:, None], id_RK)
        left_RE = tl.where(expert_E[None, :] == id_R[:, None], -2.0, left_RE)
    if IS_NORMALISED:
        weight_RK = weight_RK / tl.where(is_token_R, tl.sum(weight_RK, 1), 1.0)[:, None]
    out_RK = token_R[:, None] * PICKED + pick_K[None, :]
    is_pick_RK = is_token_R[:, None] & (pick_K < PICKED)[None, :]
    tl.store(weights + out_RK, weight_RK.to(weights.dtype.element_ty), mask=is_pick_RK)
    tl.store(ids + out_RK, id_RK.to(tl.int64), mask=is_pick_RK)
