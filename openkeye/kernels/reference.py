"""Every operation of the model in plain PyTorch, fp32 inside: the definition, and what runs where no faster twin serves.

Letters: T query tokens, S keys, H query heads, G KV heads, D head width, J indexer heads, I indexer width, K picked tokens,
E experts, F expert width. Memory is O(T * K) everywhere: scores and gathered keys are made in slabs of queries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SCRATCH_BYTES = 256 << 20


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32, returned in x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension, computed in fp32, returned in x's dtype."""
    return F.layer_norm(x.float(), (x.shape[-1],), weight.float(), bias.float(), eps).to(x.dtype)


def apply_rotary(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Half-split rotation: element d pairs with d + D / 2. cos and sin are [T, D], both halves alike; computed in fp32."""
    wide = x_THD.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (wide * cos_TD.unsqueeze(-2) + turned * sin_TD.unsqueeze(-2)).to(x_THD.dtype)


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of the last dimension, whose size must be a power of two."""
    width = x.shape[-1]
    if width & (width - 1):
        raise ValueError(f"hadamard needs a width that is a power of two, got {width}")
    y, span = x.float(), 1
    while span < width:
        pairs = y.unflatten(-1, (-1, 2, span))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        span *= 2
    return (y * width**-0.5).to(x.dtype)


def top_k_positions(scores_TS: Tensor, k: int, num_valid_T: Tensor) -> Tensor:
    """The k largest scores among the first num_valid columns of each row: exact, ties to the smaller position.

    Returns:
        [T, k] int32, ascending, -1 at the end of rows with fewer than k valid columns.
    """
    num_rows, num_columns = scores_TS.shape
    column = torch.arange(num_columns, device=scores_TS.device)
    valid = column < num_valid_T[:, None]
    scores = scores_TS.masked_fill(~valid, -torch.inf)
    width = min(k, num_columns)
    threshold = scores.topk(width, dim=-1).values[:, -1:]
    above = (scores > threshold) & valid
    equal = (scores == threshold) & valid
    # Of the scores equal to the k-th, the leftmost fill what the strictly larger ones leave free.
    room = width - above.sum(dim=-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=-1) <= room))
    # Chosen columns sort before the sentinel, in ascending order.
    order = torch.where(chosen, column, num_columns).topk(width, dim=-1, largest=False, sorted=True).values
    picked = torch.where(order < num_columns, order, -1).int()
    return F.pad(picked, (0, k - width), value=-1)


def indexer_select(
    query_TJI: Tensor,
    gates_TJ: Tensor,
    key_SI: Tensor,
    k: int,
    query_positions_T: Tensor,
    max_scratch_bytes: int = SCRATCH_BYTES,
) -> Tensor:
    """Positions each query attends to: the k largest index scores I[t, s] = sum_j gate_j relu(q_j . k_s) with s <= position t.

    Rows that see at most k positions take them all without scoring (report, DSA equations).

    Args:
        query_TJI, gates_TJ, key_SI: the indexer's projections; gates already scaled by I ** -0.5.
        query_positions_T: index of each query among the S keys.
        max_scratch_bytes: bound on the scores that stand in memory at a time.

    Returns:
        [T, k] int32 into 0..S-1, ascending, -1 pads.
    """
    num_queries, num_heads, _ = query_TJI.shape
    num_keys = key_SI.shape[0]
    device = key_SI.device
    indices = torch.full((num_queries, k), -1, dtype=torch.int32, device=device)
    num_valid = query_positions_T + 1
    everything = torch.arange(k, dtype=torch.int32, device=device).expand(num_queries, k)
    is_short = num_valid <= k
    indices = torch.where(is_short[:, None] & (everything < num_valid[:, None]), everything, indices)
    rows = (~is_short).nonzero().flatten()
    key_IS = key_SI.float().t().contiguous()
    # Scores, their threshold masks and column numbers: about 8 times 4 bytes a score.
    slab = max(1, max_scratch_bytes // (num_keys * 4 * (num_heads + 8)))
    for start in range(0, rows.shape[0], slab):
        part = rows[start : start + slab]
        last = int(num_valid[part].max())
        products = (query_TJI[part].float().flatten(0, 1) @ key_IS[:, :last]).relu_().unflatten(0, (-1, num_heads))
        scores = torch.einsum("tj,tjs->ts", gates_TJ[part].float(), products)
        indices[part] = top_k_positions(scores, k, num_valid[part])
    return indices


def sparse_attention(
    query_THD: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    indices_TK: Tensor,
    scale: float,
    max_scratch_bytes: int = SCRATCH_BYTES,
) -> Tensor:
    """softmax(q . k * scale) v over the keys named by each row of indices_TK (-1: none), [T, H, D].

    Gathers K keys a query, in slabs of queries.
    """
    num_queries, num_heads, width = query_THD.shape
    num_groups = key_SGD.shape[1]
    slab = max(1, max_scratch_bytes // (2 * 4 * indices_TK.shape[1] * num_groups * width))
    outputs = []
    for start in range(0, num_queries, slab):
        indices = indices_TK[start : start + slab]
        is_pad = indices < 0
        safe = indices.clamp_min(0).long()
        keys_TGKD = key_SGD[safe].transpose(1, 2).float()
        values_TGKD = value_SGD[safe].transpose(1, 2).float()
        query_TGRD = query_THD[start : start + slab].float().unflatten(1, (num_groups, num_heads // num_groups))
        scores = (query_TGRD @ keys_TGKD.transpose(2, 3)) * scale
        scores = scores.masked_fill(is_pad[:, None, None], -torch.inf)
        outputs.append((scores.softmax(dim=-1) @ values_TGKD).flatten(1, 2))
    return torch.cat(outputs).to(query_THD.dtype)


def dense_attention(
    query_THD: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    query_positions_T: Tensor | None,
    scale: float,
    max_scratch_bytes: int = SCRATCH_BYTES,
) -> Tensor:
    """softmax(q . k * scale) v over all keys at or before each query's position (all keys where positions are None), [T, H, D]."""
    num_queries, num_heads, _ = query_THD.shape
    num_keys, num_groups, _ = key_SGD.shape
    key = key_SGD.float().transpose(0, 1).repeat_interleave(num_heads // num_groups, dim=0)
    value = value_SGD.float().transpose(0, 1).repeat_interleave(num_heads // num_groups, dim=0)
    query = query_THD.float().transpose(0, 1)
    slab = num_queries if query_positions_T is None else max(1, max_scratch_bytes // (4 * num_keys * (num_heads + 1)))
    columns = torch.arange(num_keys, device=key.device)
    outputs = []
    for start in range(0, num_queries, slab):
        mask = None if query_positions_T is None else columns <= query_positions_T[start : start + slab, None]
        outputs.append(F.scaled_dot_product_attention(query[:, start : start + slab], key, value, attn_mask=mask, scale=scale))
    return torch.cat(outputs, dim=1).transpose(0, 1).to(query_THD.dtype)


def experts(x_TD: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """sum_k weight_k * ((silu(x G_e) * (x U_e)) D_e) over each token's K experts, [T, D].

    gate_up_EDF is [E, D, 2F], gate columns first; down_EFD is [E, F, D]: the published, input-major layout.
    """
    output = torch.zeros_like(x_TD, dtype=torch.float32)
    for expert in range(gate_up_EDF.shape[0]):
        token, slot = (expert_ids_TK == expert).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        gate, up = (x_TD[token] @ gate_up_EDF[expert]).chunk(2, dim=-1)
        part = (F.silu(gate) * up) @ down_EFD[expert]
        output = output.index_add(0, token, part.float() * weights_TK[token, slot, None].float())
    return output.to(x_TD.dtype)
