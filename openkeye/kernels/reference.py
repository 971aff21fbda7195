"""Every operation of the model in plain PyTorch, fp32 inside: the definition, and what runs where no faster twin serves.

Double precision stays double throughout: `openkeye check` measures with it.

Letters: T query tokens, S keys, H query heads, G KV heads, D head width, J indexer heads, I indexer width, K picked tokens,
E experts, F expert width. Memory is O(T * K) everywhere: scores and gathered keys are made in slabs of queries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# What a slab may hold at a time: on a CPU about what its cache holds (measured twice as fast as larger slabs).
CPU_SCRATCH_BYTES = 8 << 20
GPU_SCRATCH_BYTES = 256 << 20
# Keys per picked key up to which scoring all of them beats gathering (measured on a CPU: they meet between 3 and 5).
DENSE_BELOW_RATIO = 3


def widen(x: Tensor) -> Tensor:
    """x in fp32, or as it is where it is wider."""
    return x if x.dtype == torch.float64 else x.float()


def _slab_rows(row_bytes: int, max_scratch_bytes: int | None, device: torch.device) -> int:
    """How many queries go through at a time."""
    default = CPU_SCRATCH_BYTES if device.type == "cpu" else GPU_SCRATCH_BYTES
    return max(1, (max_scratch_bytes or default) // max(1, row_bytes))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32, returned in x's dtype."""
    wide = widen(x)
    return (wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps) * widen(weight)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension, computed in fp32, returned in x's dtype."""
    return F.layer_norm(widen(x), (x.shape[-1],), widen(weight), widen(bias), eps).to(x.dtype)


def apply_rotary(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Half-split rotation: element d pairs with d + D / 2. cos and sin are [T, D], both halves alike; computed in fp32."""
    wide = widen(x_THD)
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (wide * cos_TD.unsqueeze(-2) + turned * sin_TD.unsqueeze(-2)).to(x_THD.dtype)


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of the last dimension, whose size must be a power of two."""
    width = x.shape[-1]
    if width & (width - 1):
        raise ValueError(f"hadamard needs a width that is a power of two, got {width}")
    y, span = widen(x), 1
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
    num_columns = scores_TS.shape[1]
    column = torch.arange(num_columns, device=scores_TS.device)
    scores = scores_TS.masked_fill(column >= num_valid_T[:, None], -torch.inf)
    if k < num_columns:
        best = scores.topk(k + 1, dim=-1)
        picked = best.indices[:, :k].sort(dim=-1).values.int()
        # Where the k-th equals the next, or fewer than k columns are valid, topk alone does not say which to take.
        is_open = (best.values[:, k - 1] == best.values[:, k]).nonzero().flatten()
        if is_open.numel():
            picked[is_open] = _pick_leftmost(scores[is_open], k)
        return picked
    return F.pad(_pick_leftmost(scores, num_columns), (0, k - num_columns), value=-1)


def _pick_leftmost(scores_TS: Tensor, k: int) -> Tensor:
    """`top_k_positions` for k <= S and scores that are -inf where not valid, whatever the ties."""
    num_columns = scores_TS.shape[1]
    threshold = scores_TS.topk(k, dim=-1).values[:, -1:]
    above = scores_TS > threshold
    equal = (scores_TS == threshold) & (scores_TS > -torch.inf)
    # Of the scores equal to the k-th, the leftmost fill what the strictly larger ones leave free.
    room = k - above.sum(dim=-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=-1) <= room))
    # Chosen columns sort before the sentinel, in ascending order.
    column = torch.arange(num_columns, device=scores_TS.device)
    order = torch.where(chosen, column, num_columns).topk(k, dim=-1, largest=False, sorted=True).values
    return torch.where(order < num_columns, order, -1).int()


def index_scores(query_TJI: Tensor, gates_TJ: Tensor, key_SI: Tensor) -> Tensor:
    """I[t, s] = sum_j gate_j relu(q_j . k_s) of every pair, [T, S] (report, DSA equations); T * J * S numbers on the way."""
    num_queries, num_heads, _ = query_TJI.shape
    products = (widen(query_TJI).flatten(0, 1) @ widen(key_SI).t()).relu().unflatten(0, (num_queries, num_heads))
    return (widen(gates_TJ)[:, None] @ products)[:, 0]


def indexer_select(
    query_TJI: Tensor,
    gates_TJ: Tensor,
    key_SI: Tensor,
    k: int,
    query_positions_T: Tensor,
    max_scratch_bytes: int | None = None,
) -> Tensor:
    """Positions each query attends to: the k largest index scores I[t, s] = sum_j gate_j relu(q_j . k_s) with s <= position t.

    Rows that see at most k positions take them all without scoring (report, DSA equations).

    Args:
        query_TJI, gates_TJ, key_SI: the indexer's projections; gates already scaled by I ** -0.5.
        query_positions_T: index of each query among the S keys.
        max_scratch_bytes: bound on the scores that stand in memory at a time (at least one query's); None: by device.

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
    # A score and its copies: one product per head, the sum, the masked sum and its column number.
    slab = _slab_rows(num_keys * key_SI.element_size() * (num_heads + 3), max_scratch_bytes, device)
    for start in range(0, rows.shape[0], slab):
        part = rows[start : start + slab]
        last = int(num_valid[part].max())
        scores = index_scores(query_TJI[part], gates_TJ[part], key_SI[:last])
        indices[part] = top_k_positions(scores, k, num_valid[part])
    return indices


def sparse_attention(
    query_THD: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    indices_TK: Tensor,
    scale: float,
    max_scratch_bytes: int | None = None,
) -> Tensor:
    """softmax(q . k * scale) v over the keys named by each row of indices_TK (-1: none), [T, H, D].

    Gathers K keys a query, one KV head after the other, in slabs of queries. Where K is a good part of S, scoring every key
    and masking is the cheaper way to the same result.
    """
    if key_SGD.shape[0] <= DENSE_BELOW_RATIO * indices_TK.shape[1]:
        return _masked_attention(query_THD, key_SGD, value_SGD, indices_TK, scale, max_scratch_bytes)
    num_queries, num_heads, width = query_THD.shape
    num_groups = key_SGD.shape[1]
    query_TGRD = widen(query_THD).unflatten(1, (num_groups, num_heads // num_groups)) * scale
    # Gathered keys and values of all groups, as they come and widened.
    row_bytes = 4 * indices_TK.shape[1] * num_groups * width * query_TGRD.element_size()
    slab = _slab_rows(row_bytes, max_scratch_bytes, key_SGD.device)
    outputs = []
    for start in range(0, num_queries, slab):
        indices = indices_TK[start : start + slab]
        is_pad = (indices < 0)[:, None]
        safe = indices.clamp_min(0).flatten()
        for group in range(num_groups):
            # One group at a time lies ready for the product: [slab, K, D] without a copy.
            keys, values = (
                widen(tensor[:, group].index_select(0, safe)).unflatten(0, indices.shape) for tensor in (key_SGD, value_SGD)
            )
            scores = query_TGRD[start : start + slab, group] @ keys.transpose(1, 2)
            outputs.append(scores.masked_fill(is_pad, -torch.inf).softmax(dim=-1) @ values)
    parts = [torch.stack(outputs[first : first + num_groups], dim=1) for first in range(0, len(outputs), num_groups)]
    return torch.cat(parts).flatten(1, 2).to(query_THD.dtype)


def _masked_attention(
    query_THD: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    indices_TK: Tensor,
    scale: float,
    max_scratch_bytes: int | None,
) -> Tensor:
    """`sparse_attention` through the scores of all S keys, slab by slab."""
    num_queries, num_heads, _ = query_THD.shape
    num_keys, num_groups, _ = key_SGD.shape
    keys_GSD, values_GSD = widen(key_SGD).transpose(0, 1), widen(value_SGD).transpose(0, 1)
    query_GTRD = widen(query_THD).unflatten(1, (num_groups, num_heads // num_groups)).transpose(0, 1) * scale
    # Scores, masked scores and weights of all heads.
    slab = _slab_rows(3 * num_keys * num_heads * query_GTRD.element_size(), max_scratch_bytes, key_SGD.device)
    outputs = []
    for start in range(0, num_queries, slab):
        indices = indices_TK[start : start + slab].long()
        # One column more takes the pads.
        is_named = torch.zeros(indices.shape[0], num_keys + 1, dtype=torch.bool, device=key_SGD.device)
        is_named.scatter_(1, torch.where(indices < 0, num_keys, indices), True)
        query = query_GTRD[:, start : start + slab]
        scores = (query.flatten(1, 2) @ keys_GSD.transpose(1, 2)).unflatten(1, query.shape[1:3])
        weights = scores.masked_fill(~is_named[:, None, :num_keys], -torch.inf).softmax(dim=-1)
        outputs.append((weights.flatten(1, 2) @ values_GSD).unflatten(1, query.shape[1:3]))
    return torch.cat(outputs, dim=1).transpose(0, 1).flatten(1, 2).to(query_THD.dtype)


def dense_attention(
    query_THD: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    query_positions_T: Tensor | None,
    scale: float,
    max_scratch_bytes: int | None = None,
) -> Tensor:
    """softmax(q . k * scale) v over all keys at or before each query's position (None: over all keys), [T, H, D]."""
    num_queries, num_heads, _ = query_THD.shape
    num_keys, num_groups, _ = key_SGD.shape
    key = widen(key_SGD).transpose(0, 1).repeat_interleave(num_heads // num_groups, dim=0)
    value = widen(value_SGD).transpose(0, 1).repeat_interleave(num_heads // num_groups, dim=0)
    query = widen(query_THD).transpose(0, 1)
    # The fused product needs no scores in memory but the mask; where it falls back on plain products, those of all heads.
    slab = num_queries
    if query_positions_T is not None:
        slab = _slab_rows(num_keys * key.element_size() * (num_heads + 1), max_scratch_bytes, key.device)
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
    num_picked = expert_ids_TK.shape[1]
    wide = widen(x_TD)
    output = torch.zeros_like(wide)
    order = expert_ids_TK.flatten().argsort(stable=True)
    counts = torch.bincount(expert_ids_TK.flatten(), minlength=gate_up_EDF.shape[0]).tolist()
    for expert, slots in enumerate(order.split(counts)):
        if not counts[expert]:
            continue
        token = slots // num_picked
        gate, up = (wide[token] @ widen(gate_up_EDF[expert])).chunk(2, dim=-1)
        part = (F.silu(gate) * up) @ widen(down_EFD[expert])
        output.index_add_(0, token, part * widen(weights_TK.flatten()[slots, None]))
    return output.to(x_TD.dtype)
