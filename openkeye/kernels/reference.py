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
BLOCK_ROWS = 16
# of an expert's product where its shape is fixed
# Keys per picked key up to which scoring all of them beats gathering (measured on a CPU: they meet between 3 and 5).
DENSE_BELOW_RATIO = 3


def widen(x: Tensor) -> Tensor:
    """x in fp32, or as it is where it is wider."""
    return x if x.dtype == torch.float64 else x.float()


def slab_rows(row_bytes: int, max_scratch_bytes: int | None, device: torch.device) -> int:
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


def quantize_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., I] as e4m3 with one power-of-two scale a vector: x8 float8_e4m3fn [..., I] and scale float32 [...].

    The scale is 2^ceil(log2(a / 448)) of the exact quotient, where a = max |x| and at least 1e-4: the smallest power of two
    that brings the vector into e4m3's range. x / scale is rounded to the nearest, ties to even. For finite x.
    """
    wide = x.float()
    mantissa, exponent = torch.frexp(wide.abs().amax(dim=-1).clamp_min(1e-4))
    # frexp's mantissa lies in 0.5..1, and 448 is 0.875 * 2^9.
    exponent = exponent - 9 + (mantissa > 0.875).int()
    # Powers of two are put together from their bits: exact on every device, as pow need not be.
    scale, reciprocal = ((127 + sign * exponent << 23).view(torch.float32) for sign in (1, -1))
    scaled = wide * reciprocal.unsqueeze(-1)
    return scaled.clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y and its `rms_norm`."""
    total = x + y
    return total, rms_norm(total, weight, eps)


def norm_rotary(
    query_TX: Tensor,
    key_TX: Tensor,
    query_weight_D: Tensor | None,
    key_weight_D: Tensor | None,
    cos_TD: Tensor,
    sin_TD: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Projections [T, H * D] and [T, G * D] to queries [T, H, D] and keys [T, G, D]: RMS norm of every head, then the turn.

    Weights of None: a model whose heads have no norm; they are turned as they come.
    """
    query, key = (x.unflatten(1, (-1, cos_TD.shape[1])) for x in (query_TX, key_TX))
    if query_weight_D is not None and key_weight_D is not None:
        query, key = rms_norm(query, query_weight_D, eps), rms_norm(key, key_weight_D, eps)
    return apply_rotary(query, cos_TD, sin_TD), apply_rotary(key, cos_TD, sin_TD)


def norm_rotary_write(
    query_TX: Tensor,
    key_TX: Tensor,
    value_TX: Tensor,
    query_weight_D: Tensor | None,
    key_weight_D: Tensor | None,
    cos_TD: Tensor,
    sin_TD: Tensor,
    eps: float,
    slots_T: Tensor,
    key_cache_NGD: Tensor,
    value_cache_NGD: Tensor,
    key_scales_NG: Tensor | None = None,
    value_scales_NG: Tensor | None = None,
) -> Tensor:
    """`norm_rotary`; keys and values go to their slots (none where negative), e4m3 where scales are given; returns queries."""
    query, key = norm_rotary(query_TX, key_TX, query_weight_D, key_weight_D, cos_TD, sin_TD, eps)
    _write(key, slots_T, key_cache_NGD, key_scales_NG)
    _write(value_TX.unflatten(1, key.shape[1:]), slots_T, value_cache_NGD, value_scales_NG)
    return query


def _write(x: Tensor, slots_T: Tensor, cache: Tensor, scales: Tensor | None) -> None:
    """Tokens to their slots of a cache; those without one are dropped."""
    rows = (slots_T >= 0).nonzero().flatten()
    slots = slots_T[rows].long()
    if scales is None:
        cache[slots] = x[rows]
        return
    codes, scales[slots] = quantize_vectors(x[rows])
    # Bytes, because not every device copies e4m3 by index.
    cache.view(torch.uint8)[slots] = codes.view(torch.uint8)


def index_norm_rotary(
    projected_TX: Tensor,
    key_TI: Tensor,
    query_weight_I: Tensor,
    key_weight_I: Tensor,
    key_bias_I: Tensor,
    cos_TI: Tensor,
    sin_TI: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Projections (J * I numbers of queries, then J gates; and keys) to queries [T, J, I], float32 gates and keys [T, I]."""
    width = key_TI.shape[1]
    num_heads = projected_TX.shape[1] // (width + 1)
    query_TJI = projected_TX[:, : num_heads * width].unflatten(1, (num_heads, width))
    gates_TJ = widen(projected_TX[:, num_heads * width :]) * width**-0.5
    query_TJI = apply_rotary(rms_norm(query_TJI, query_weight_I, eps), cos_TI, sin_TI)
    key_T1I = apply_rotary(layer_norm(key_TI, key_weight_I, key_bias_I, eps)[:, None], cos_TI, sin_TI)
    return hadamard(query_TJI), gates_TJ, hadamard(key_T1I)[:, 0]


def index_norm_rotary_write(
    projected_TX: Tensor,
    key_TI: Tensor,
    query_weight_I: Tensor,
    key_weight_I: Tensor,
    key_bias_I: Tensor,
    cos_TI: Tensor,
    sin_TI: Tensor,
    eps: float,
    slots_T: Tensor,
    key_cache_NI: Tensor,
    key_scales_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`index_norm_rotary`; keys go to their slots. With scales all is e4m3, and the queries' scales go into the gates."""
    query_TJI, gates_TJ, key_TI = index_norm_rotary(
        projected_TX, key_TI, query_weight_I, key_weight_I, key_bias_I, cos_TI, sin_TI, eps
    )
    _write(key_TI, slots_T, key_cache_NI, key_scales_N)
    if key_scales_N is None:
        return query_TJI, gates_TJ
    codes_TJI, scales_TJ = quantize_vectors(query_TJI)
    return codes_TJI, gates_TJ * scales_TJ


def top_k_positions(scores_TS: Tensor, k: int, num_valid_T: Tensor, out_TK: Tensor | None = None) -> Tensor:
    """The k largest scores among the first num_valid columns of each row: exact, ties to the smaller position.

    A score of -inf is a score like any other; NaN is not served. out_TK: where the result is written to, if given.

    Returns:
        [T, k] int32, ascending, -1 at the end of rows with fewer than k valid columns.
    """
    if out_TK is not None:
        return out_TK.copy_(top_k_positions(scores_TS, k, num_valid_T))
    num_columns = scores_TS.shape[1]
    column = torch.arange(num_columns, device=scores_TS.device)
    scores = scores_TS.masked_fill(column >= num_valid_T[:, None], -torch.inf)
    if k < num_columns:
        best = scores.topk(k + 1, dim=-1)
        picked = best.indices[:, :k].sort(dim=-1).values.int()
        # Where the k-th equals the next, or fewer than k columns are valid, topk alone does not say which to take.
        is_open = (best.values[:, k - 1] == best.values[:, k]).nonzero().flatten()
        if is_open.numel():
            picked[is_open] = _pick_leftmost(scores[is_open], k, num_valid_T[is_open])
        return picked
    return F.pad(_pick_leftmost(scores, num_columns, num_valid_T), (0, k - num_columns), value=-1)


def _pick_leftmost(scores_TS: Tensor, k: int, num_valid_T: Tensor) -> Tensor:
    """`top_k_positions` for k <= S and scores that are -inf where not valid, whatever the ties."""
    num_columns = scores_TS.shape[1]
    threshold = scores_TS.topk(k, dim=-1).values[:, -1:]
    above = scores_TS > threshold
    column = torch.arange(num_columns, device=scores_TS.device)
    equal = (scores_TS == threshold) & (column < num_valid_T[:, None])
    # Of the scores equal to the k-th, the leftmost fill what the strictly larger ones leave free.
    room = k - above.sum(dim=-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=-1) <= room))
    # Chosen columns sort before the sentinel, in ascending order.
    order = torch.where(chosen, column, num_columns).topk(k, dim=-1, largest=False, sorted=True).values
    return torch.where(order < num_columns, order, -1).int()


def index_scores(query_TJI: Tensor, gates_TJ: Tensor, key_SI: Tensor, key_scales_S: Tensor | None = None) -> Tensor:
    """I[t, s] = sum_j gate_j relu(q_j . k_s) of every pair, [T, S] (report, DSA equations); T * J * S numbers on the way.

    Keys in e4m3 come with a scale each; then the query is e4m3 too, quantised here unless it comes so (with its scales in the
    gates), and I[t, s] = scale[s] * sum_j gate_j * scale_j * relu(q8_j . k8[s]).
    """
    num_queries, num_heads, _ = query_TJI.shape
    if key_scales_S is not None:
        query_TJI, gates_TJ = quantized_query(query_TJI, gates_TJ)
    products = (widen(query_TJI).flatten(0, 1) @ widen(key_SI).t()).relu().unflatten(0, (num_queries, num_heads))
    scores = (widen(gates_TJ)[:, None] @ products)[:, 0]
    return scores if key_scales_S is None else scores * key_scales_S


def quantized_query(query_TJI: Tensor, gates_TJ: Tensor) -> tuple[Tensor, Tensor]:
    """The indexer's query in e4m3 and gates that hold its scales: what they are already, or `quantize_vectors` of them."""
    if query_TJI.dtype == torch.float8_e4m3fn:
        return query_TJI, gates_TJ
    codes_TJI, scales_TJ = quantize_vectors(query_TJI)
    return codes_TJI, gates_TJ * scales_TJ


def indexer_decode(
    query_BJI: Tensor,
    gates_BJ: Tensor,
    key_SI: Tensor,
    page_table_BP: Tensor,
    lengths_B: Tensor,
    max_len: int,
    scales_S: Tensor | None = None,
    page_size: int = 64,
    out_BL: Tensor | None = None,
) -> Tensor:
    """Index scores of one query a request over its pages, float32 [B, max_len]; columns from its length on are left alone.

    Keys in e4m3 come with a scale each; then the query is e4m3 too, quantised here unless it comes so (with its scales in the
    gates), and I[b, s] = scale[s] * sum_j gate_j * scale_j * relu(q8_j . k8[s]).
    """
    if out_BL is None:
        out_BL = torch.empty(query_BJI.shape[0], max_len, dtype=torch.float32, device=key_SI.device)
    for request, length in enumerate(lengths_B.tolist()):
        position = torch.arange(length, device=key_SI.device)
        slots = page_table_BP[request].long()[position // page_size] * page_size + position % page_size
        query, gates = query_BJI[request], widen(gates_BJ[request])
        if scales_S is None:
            scores = index_scores(query[None], gates[None], key_SI[slots])[0]
        else:
            if query.dtype != torch.float8_e4m3fn:
                query, query_scale = quantize_vectors(query)
                gates = gates * query_scale
            scores = index_scores(query.float()[None], gates[None], key_SI[slots].float())[0] * scales_S[slots]
        out_BL[request, :length] = scores
    return out_BL


def in_page_order(
    key_SI: Tensor, key_scales_S: Tensor | None, page_table_P: Tensor, page_size: int
) -> tuple[Tensor, Tensor | None]:
    """Keys and scales of a sequence's pages, one page after the other, out of all slots of a cache."""
    pages = page_table_P.long()
    # Bytes, because not every device gathers e4m3 by index.
    stored = key_SI.view(torch.uint8) if key_SI.dtype == torch.float8_e4m3fn else key_SI
    keys = stored.unflatten(0, (-1, page_size))[pages].flatten(0, 1).view(key_SI.dtype)
    return keys, None if key_scales_S is None else key_scales_S.unflatten(0, (-1, page_size))[pages].flatten()


def read_pages(
    cache_NGD: Tensor, page_table_P: Tensor, num_keys: int, page_size: int, dtype: torch.dtype, scales_NG: Tensor | None = None
) -> Tensor:
    """Keys or values of a sequence's first positions out of its pages, [num_keys, G, D] in dtype; e4m3 times its scales."""
    position = torch.arange(num_keys, device=cache_NGD.device)
    slots = page_table_P.long()[position // page_size] * page_size + position % page_size
    if scales_NG is None:
        return cache_NGD.index_select(0, slots).to(dtype)
    # Bytes, because not every device gathers e4m3 by index.
    codes = cache_NGD.view(torch.uint8).index_select(0, slots).view(torch.float8_e4m3fn)
    return (codes.float() * scales_NG.index_select(0, slots)[:, :, None]).to(dtype)


def indexer_select(
    query_TJI: Tensor,
    gates_TJ: Tensor,
    key_SI: Tensor,
    k: int,
    query_positions_T: Tensor,
    max_scratch_bytes: int | None = None,
    first_keys_T: Tensor | None = None,
    key_scales_S: Tensor | None = None,
    page_table_P: Tensor | None = None,
    page_size: int = 64,
) -> Tensor:
    """Positions each query attends to: the k largest `index_scores` with first key t <= s <= position t.

    Rows that see at most k positions take them all without scoring (report, DSA equations).

    Args:
        query_TJI, gates_TJ, key_SI: the indexer's projections; gates already scaled by I ** -0.5.
        query_positions_T: index of each query among the S keys.
        max_scratch_bytes: bound on the scores that stand in memory at a time (at least one query's); None: by device.
        first_keys_T: where each query's document begins among the packed keys; None: at 0.
        key_scales_S: float32, of keys in e4m3 (`index_scores`).
        page_table_P: int32, the page of every page_size positions of one sequence, each a page of the cache; keys and scales
            are then all slots of the cache, and positions those of the sequence. None: keys are in order.

    Returns:
        [T, k] int32 into 0..S-1, ascending, -1 pads.
    """
    if page_table_P is not None:
        key_SI, key_scales_S = in_page_order(key_SI, key_scales_S, page_table_P, page_size)
    num_queries, num_heads, _ = query_TJI.shape
    num_keys = key_SI.shape[0]
    device = key_SI.device
    if key_scales_S is not None:
        query_TJI, gates_TJ = quantized_query(query_TJI, gates_TJ)
    first = torch.zeros_like(query_positions_T) if first_keys_T is None else first_keys_T
    indices = torch.full((num_queries, k), -1, dtype=torch.int32, device=device)
    num_visible = query_positions_T - first + 1
    everything = torch.arange(k, dtype=torch.int32, device=device).expand(num_queries, k)
    is_short = num_visible <= k
    is_taken = is_short[:, None] & (everything < num_visible[:, None])
    indices = torch.where(is_taken, everything + first[:, None].int(), indices)
    rows = (~is_short).nonzero().flatten()
    # A score and its copies: one product per head, the sum, the masked sum and its column number.
    row_bytes = num_keys * widen(key_SI[:0]).element_size() * (num_heads + 3)
    slab = slab_rows(row_bytes, max_scratch_bytes, device)
    for start in range(0, rows.shape[0], slab):
        part = rows[start : start + slab]
        last = int(query_positions_T[part].max()) + 1
        scales = None if key_scales_S is None else key_scales_S[:last]
        scores = index_scores(query_TJI[part], gates_TJ[part], key_SI[:last], scales)
        if first_keys_T is not None:
            scores = scores.masked_fill(torch.arange(last, device=device) < first[part][:, None], -torch.inf)
        indices[part] = top_k_positions(scores, k, query_positions_T[part] + 1)
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
    slab = slab_rows(row_bytes, max_scratch_bytes, key_SGD.device)
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
    slab = slab_rows(3 * num_keys * num_heads * query_GTRD.element_size(), max_scratch_bytes, key_SGD.device)
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


def sparse_decode(
    query_BHD: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    indices_BK: Tensor,
    scale: float,
    page_table_BP: Tensor | None = None,
    page_size: int = 64,
    key_scales_SG: Tensor | None = None,
    value_scales_SG: Tensor | None = None,
) -> Tensor:
    """`sparse_attention` of one query a request over its pages, [B, H, D]; an empty list gives zeros.

    indices_BK are positions of the request's own sequence, or slots where there is no page table; caches in e4m3 come with a
    scale for each slot and KV head.
    """
    output = torch.zeros_like(query_BHD)
    for request, row in enumerate(indices_BK):
        slots = row[row >= 0].long()
        if page_table_BP is not None:
            slots = page_table_BP[request].long()[slots // page_size] * page_size + slots % page_size
        if not slots.numel():
            continue
        key, value = (x[slots] for x in (key_SGD, value_SGD))
        if key_scales_SG is not None and value_scales_SG is not None:
            key, value = key.float() * key_scales_SG[slots, :, None], value.float() * value_scales_SG[slots, :, None]
        everything = torch.arange(slots.shape[0], device=slots.device)[None]
        output[request] = sparse_attention(query_BHD[request : request + 1], key, value, everything, scale)[0]
    return output


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
        slab = slab_rows(num_keys * key.element_size() * (num_heads + 1), max_scratch_bytes, key.device)
    columns = torch.arange(num_keys, device=key.device)
    outputs = []
    for start in range(0, num_queries, slab):
        mask = None if query_positions_T is None else columns <= query_positions_T[start : start + slab, None]
        outputs.append(F.scaled_dot_product_attention(query[:, start : start + slab], key, value, attn_mask=mask, scale=scale))
    return torch.cat(outputs, dim=1).transpose(0, 1).to(query_THD.dtype)


@torch.no_grad()
def attention_lse(
    query_THD: Tensor,
    key_SGD: Tensor,
    query_positions_T: Tensor | None,
    scale: float,
    first_keys_T: Tensor | None = None,
    max_scratch_bytes: int | None = None,
) -> Tensor:
    """log sum exp(q . k * scale) over the keys that each query sees, [T, H], without gradient; -inf where it sees none.

    It sees those at or before its position (None: all), and not those before first_keys_T where that is given.
    """
    num_queries, num_heads, _ = query_THD.shape
    num_keys, num_groups, _ = key_SGD.shape
    key_GDS = widen(key_SGD).permute(1, 2, 0)
    query_GTRD = widen(query_THD).unflatten(1, (num_groups, num_heads // num_groups)).transpose(0, 1) * scale
    # Scores of all heads and their masked copy.
    slab = slab_rows(2 * num_keys * num_heads * key_GDS.element_size(), max_scratch_bytes, key_SGD.device)
    columns = torch.arange(num_keys, device=key_SGD.device)
    sums = []
    for start in range(0, num_queries, slab):
        query = query_GTRD[:, start : start + slab]
        scores = (query.flatten(1, 2) @ key_GDS).unflatten(1, query.shape[1:3])
        if query_positions_T is not None:
            scores.masked_fill_((columns > query_positions_T[start : start + slab, None])[:, None], -torch.inf)
        if first_keys_T is not None:
            scores.masked_fill_((columns < first_keys_T[start : start + slab, None])[:, None], -torch.inf)
        sums.append(scores.logsumexp(dim=-1).transpose(0, 1).flatten(1))
    return torch.cat(sums)


def dense_attention_with_lse(
    query_THD: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    query_positions_T: Tensor | None,
    scale: float,
    max_scratch_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`dense_attention` and `attention_lse`."""
    output = dense_attention(query_THD, key_SGD, value_SGD, query_positions_T, scale, max_scratch_bytes)
    return output, attention_lse(query_THD, key_SGD, query_positions_T, scale, max_scratch_bytes=max_scratch_bytes)


def packed_attention_with_lse(
    query_THD: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    query_offsets_N: Tensor,
    key_offsets_N: Tensor,
    max_queries: int,
    max_keys: int,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """`dense_attention_with_lse` inside each document; offsets are where documents begin, and where the last one ends.

    A document's queries are the last of its keys where it is causal. max_queries and max_keys are not needed here.
    """
    outputs, sums = [], []
    query_ends, key_ends = query_offsets_N.tolist(), key_offsets_N.tolist()
    for number in range(len(query_ends) - 1):
        queries = slice(query_ends[number], query_ends[number + 1])
        keys = slice(key_ends[number], key_ends[number + 1])
        if queries.start == queries.stop:
            continue
        query, num_keys = query_THD[queries], keys.stop - keys.start
        positions = torch.arange(num_keys - query.shape[0], num_keys, device=query.device) if is_causal else None
        output, lse = dense_attention_with_lse(query, key_SGD[keys], value_SGD[keys], positions, scale)
        outputs.append(output)
        sums.append(lse)
    return torch.cat(outputs), torch.cat(sums)


def packed_attention(
    query_THD: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    query_offsets_N: Tensor,
    key_offsets_N: Tensor,
    max_queries: int,
    max_keys: int,
    scale: float,
    is_causal: bool,
) -> Tensor:
    """The first of `packed_attention_with_lse`."""
    return packed_attention_with_lse(
        query_THD, key_SGD, value_SGD, query_offsets_N, key_offsets_N, max_queries, max_keys, scale, is_causal
    )[0]


def route(logits_TE: Tensor, num_picked: int, is_normalised: bool) -> tuple[Tensor, Tensor]:
    """The router's picks: weights [T, K] in the logits' dtype and expert ids [T, K] int64, the likeliest first.

    Softmax over all experts in fp32, the best K, where asked for divided by their sum (spec: 3.10).
    """
    weights, expert_ids = widen(logits_TE).softmax(dim=-1).topk(num_picked, dim=-1)
    if is_normalised:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(logits_TE.dtype), expert_ids


def experts(
    x_TD: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    weights_TK: Tensor,
    expert_ids_TK: Tensor,
    gate_up_scale_EF: Tensor | None = None,
    down_scale_ED: Tensor | None = None,
    has_fixed_blocks: bool = False,
) -> Tensor:
    """sum_k weight_k * ((silu(x G_e) * (x U_e)) D_e) over each token's K experts, [T, D].

    gate_up_EDF is [E, D, 2F], gate columns first; down_EFD is [E, F, D]: the published, input-major layout. Scales [E, 2F]
    and [E, D] belong to weights in fp8 (`quantize_expert_weights`). has_fixed_blocks: a product's rows come in blocks of one
    size, so that a token's bits do not depend on how many others chose its experts; slower.
    """
    multiply = _multiply_in_blocks if has_fixed_blocks else torch.matmul
    num_picked = expert_ids_TK.shape[1]
    wide = widen(x_TD)
    output = torch.zeros_like(wide)
    order = expert_ids_TK.flatten().argsort(stable=True)
    counts = torch.bincount(expert_ids_TK.flatten(), minlength=gate_up_EDF.shape[0]).tolist()
    for expert, slots in enumerate(order.split(counts)):
        if not counts[expert]:
            continue
        token = slots // num_picked
        projected = multiply(wide[token], widen(gate_up_EDF[expert]))
        gate, up = (projected if gate_up_scale_EF is None else projected * gate_up_scale_EF[expert]).chunk(2, dim=-1)
        part = multiply(F.silu(gate) * up, widen(down_EFD[expert]))
        if down_scale_ED is not None:
            part = part * down_scale_ED[expert]
        output.index_add_(0, token, part * widen(weights_TK.flatten()[slots, None]))
    return output.to(x_TD.dtype)


def _multiply_in_blocks(x_RI: Tensor, weight_IO: Tensor) -> Tensor:
    """A product whose shape is the same whatever the number of rows; a row's place in it changes no bit."""
    padded = F.pad(x_RI, (0, 0, 0, -x_RI.shape[0] % BLOCK_ROWS))
    return torch.cat([block @ weight_IO for block in padded.split(BLOCK_ROWS)])[: x_RI.shape[0]]


def quantize_expert_weights(weight_EIO: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [E, I, O] as e4m3 with one scale an output column: (float8_e4m3fn [E, I, O], float32 [E, O]), their product.

    The scale is max |w| / 448 of the column, 1 where that is zero or below the smallest normal number. w / scale is rounded to
    the nearest, ties to even. For finite weights.
    """
    wide = weight_EIO.float()
    scale = wide.abs().amax(dim=1) / 448.0
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    return (wide / scale[:, None]).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale
