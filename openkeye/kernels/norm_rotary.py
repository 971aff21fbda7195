"""Between projections and attention in one pass, on any CUDA GPU, in Triton: norms, rotary, Hadamard, e4m3 and cache writes.

Twins: the functions of the same names in `reference`. Every step rounds to the tensors' dtype where the twins round, and no
product is fused with a sum, so that what remains is the order of one sum of squares.

Letters: T tokens, N slots of a cache, H query heads, G KV heads, D head width, J indexer heads, I indexer width, R rows of a
program (a token's head each).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from openkeye.kernels.quantize import e4m3_code, power_of_two_scale

WIDTHS = (16, 32, 64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_RMS_WIDTH = 16384
MANY_ROWS = 16384
# from here on programs of 32 rows fill the GPU; fewer rows go in programs of 8


def _check(name: str, tensors: tuple[Tensor, ...], width: int, cos: Tensor, sin: Tensor) -> None:
    """Raises ValueError with one sentence where these tensors are not served."""
    if width not in WIDTHS:
        raise ValueError(f"{name} serves heads of {', '.join(map(str, WIDTHS))} numbers, got {width}")
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        raise ValueError(f"{name} serves bfloat16, float16 and float32, all tensors alike, got {sorted(map(str, dtypes))}")
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        raise ValueError(f"{name} serves rows without gaps, got strides {[tensor.stride() for tensor in tensors]}")
    if any(table.dtype != torch.float32 or table.shape[1] != width or not table.is_contiguous() for table in (cos, sin)):
        raise ValueError(f"{name} serves float32 tables of contiguous rows of {width}, got {cos.dtype} of {tuple(cos.shape)}")


def _check_caches(name: str, dtype: torch.dtype, caches: tuple[Tensor, ...], scales: tuple[Tensor | None, ...]) -> None:
    """Raises ValueError where a cache does not hold what will be written."""
    expected = torch.float8_e4m3fn if scales[0] is not None else dtype
    if any((scale is None) != (scales[0] is None) for scale in scales):
        raise ValueError(f"{name} serves scales for all caches or for none")
    if any(cache.dtype != expected or cache.stride(-1) != 1 for cache in caches):
        raise ValueError(f"{name} writes {expected} here, got caches of {[str(cache.dtype) for cache in caches]}")
    if any(scale is not None and (scale.dtype != torch.float32 or not scale.is_contiguous()) for scale in scales):
        raise ValueError(
            f"{name} serves contiguous float32 scales, got {[str(scale.dtype) for scale in scales if scale is not None]}"
        )


def norm_rotary(
    query_TX: Tensor,
    key_TX: Tensor,
    query_weight_D: Tensor | None,
    key_weight_D: Tensor | None,
    cos_TD: Tensor,
    sin_TD: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Queries and keys with the RMS norm of every head and the rotary turn, [T, H, D] and [T, G, D]; without gradients.

    Args:
        query_TX, key_TX: the projections, H * D and G * D wide; rows of any stride, as the parts of a joint projection have.
        query_weight_D, key_weight_D: of the norms; both None where the heads of a model have none.
        cos_TD, sin_TD: float32, both halves of a row alike (`model/rotary.py`).

    Raises:
        ValueError: a width, dtype or layout that is not served.
    """
    num_tokens, width = query_TX.shape[0], cos_TD.shape[1]
    _check("norm_rotary", (query_TX, key_TX), width, cos_TD, sin_TD)
    key_out = torch.empty(num_tokens, key_TX.shape[1] // width, width, dtype=key_TX.dtype, device=key_TX.device)
    query_out = _launch(query_TX, key_TX, None, query_weight_D, key_weight_D, cos_TD, sin_TD, eps, None, (key_out, None))
    return query_out, key_out


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
    """`norm_rotary`, keys and values going straight to their slots of the caches; returns the queries, [T, H, D].

    Args:
        slots_T: int64 or int32, one slot a token, all different; a negative one writes nothing.
        key_cache_NGD, value_cache_NGD: of the projections' dtype, or e4m3 where scales are given; rows of any stride.
        key_scales_NG, value_scales_NG: float32, one power of two for every token and KV head (`quantize_vectors`).

    Raises:
        ValueError: a width, dtype or layout that is not served.
    """
    name = "norm_rotary_write"
    _check(name, (query_TX, key_TX, value_TX), cos_TD.shape[1], cos_TD, sin_TD)
    _check_caches(name, key_TX.dtype, (key_cache_NGD, value_cache_NGD), (key_scales_NG, value_scales_NG))
    return _launch(
        query_TX,
        key_TX,
        value_TX,
        query_weight_D,
        key_weight_D,
        cos_TD,
        sin_TD,
        eps,
        slots_T,
        (key_cache_NGD, value_cache_NGD),
        (key_scales_NG, value_scales_NG),
    )


def _launch(
    query_TX: Tensor,
    key_TX: Tensor,
    value_TX: Tensor | None,
    query_weight_D: Tensor | None,
    key_weight_D: Tensor | None,
    cos_TD: Tensor,
    sin_TD: Tensor,
    eps: float,
    slots_T: Tensor | None,
    targets: tuple[Tensor, Tensor | None],
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """One program for every few rows of queries, then of keys, then of values."""
    num_tokens, width = query_TX.shape[0], cos_TD.shape[1]
    has_norms = query_weight_D is not None and key_weight_D is not None
    assert has_norms or (query_weight_D is None and key_weight_D is None), "norms of queries and keys come together"
    heads, groups = query_TX.shape[1] // width, key_TX.shape[1] // width
    output = torch.empty(num_tokens, heads, width, dtype=query_TX.dtype, device=query_TX.device)
    key_target, value_target = (
        target if scales[0] is None or target is None else target.view(torch.uint8) for target in targets
    )
    # Arguments that a variant of the kernel never touches take a tensor that is at hand.
    value, value_target = (value_TX, value_target) if value_TX is not None else (key_TX, key_target)
    assert value is not None and key_target is not None and value_target is not None
    rows, warps = _rows(num_tokens * heads, width)
    grid = triton.cdiv(num_tokens * heads, rows) + (2 if value_TX is not None else 1) * triton.cdiv(num_tokens * groups, rows)
    if num_tokens:
        _norm_rotary[(grid,)](
            query_TX,
            key_TX,
            value,
            query_weight_D if has_norms else cos_TD,
            key_weight_D if has_norms else cos_TD,
            cos_TD,
            sin_TD,
            slots_T if slots_T is not None else cos_TD,
            output,
            key_target,
            value_target,
            scales[0] if scales[0] is not None else cos_TD,
            scales[1] if scales[1] is not None else cos_TD,
            num_tokens,
            query_TX.stride(0),
            key_TX.stride(0),
            value.stride(0),
            key_target.stride(0),
            key_target.stride(1),
            value_target.stride(0),
            value_target.stride(1),
            eps,
            HEADS=heads,
            GROUPS=groups,
            WIDTH=width,
            ROWS=rows,
            HAS_NORMS=has_norms,
            HAS_SLOTS=slots_T is not None,
            IS_E4M3=scales[0] is not None,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return output


def _rows(num_rows: int, width: int) -> tuple[int, int]:
    """Rows and warps of a program: 32 numbers a thread at most, and programs for every SM where there are few rows."""
    rows = 32 if num_rows >= MANY_ROWS else 8
    return rows, max(1, min(8, rows * width // 1024))


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
    """The indexer's view of each token from its projections: queries [T, J, I], gates [T, J] float32 and keys [T, I].

    Queries take an RMS norm and keys a LayerNorm; both are turned over all dimensions and go through the Hadamard transform.
    Without gradients.

    Args:
        projected_TX: J * I numbers of queries, then J gates, which leave multiplied by I ** -0.5.

    Raises:
        ValueError: a width, dtype or layout that is not served.
    """
    _check("index_norm_rotary", (projected_TX, key_TI), key_TI.shape[1], cos_TI, sin_TI)
    key_out = torch.empty(key_TI.shape, dtype=key_TI.dtype, device=key_TI.device)
    weights = (query_weight_I, key_weight_I, key_bias_I)
    query, gates = _launch_index(projected_TX, key_TI, weights, cos_TI, sin_TI, eps, None, key_out, None)
    return query, gates, key_out


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
    """`index_norm_rotary`, keys going straight to their slots of the index cache; returns queries and gates.

    Args:
        slots_T: int64 or int32, one slot a token, all different; a negative one writes nothing.
        key_cache_NI: of the projections' dtype, or e4m3 where scales are given.
        key_scales_N: float32, one power of two a token. The queries then are e4m3 too, and their scales go into the gates.

    Raises:
        ValueError: a width, dtype or layout that is not served.
    """
    name = "index_norm_rotary_write"
    _check(name, (projected_TX, key_TI), key_TI.shape[1], cos_TI, sin_TI)
    _check_caches(name, key_TI.dtype, (key_cache_NI,), (key_scales_N,))
    weights = (query_weight_I, key_weight_I, key_bias_I)
    return _launch_index(projected_TX, key_TI, weights, cos_TI, sin_TI, eps, slots_T, key_cache_NI, key_scales_N)


def _launch_index(
    projected_TX: Tensor,
    key_TI: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    cos_TI: Tensor,
    sin_TI: Tensor,
    eps: float,
    slots_T: Tensor | None,
    key_target: Tensor,
    key_scales_N: Tensor | None,
) -> tuple[Tensor, Tensor]:
    num_tokens, width = key_TI.shape
    heads, rest = divmod(projected_TX.shape[1], width + 1)
    if rest:
        raise ValueError(
            f"index_norm_rotary got {projected_TX.shape[1]} columns, which are no whole heads of {width} and a gate"
        )
    is_e4m3 = key_scales_N is not None
    dtype = torch.uint8 if is_e4m3 else projected_TX.dtype
    query = torch.empty(num_tokens, heads, width, dtype=dtype, device=key_TI.device)
    gates = torch.empty(num_tokens, heads, dtype=torch.float32, device=key_TI.device)
    # One warp a program: the butterflies then change threads without waiting for other warps.
    rows = max(8, min(32, 1024 // width))
    if num_tokens:
        _index_norm_rotary[(triton.cdiv(num_tokens * heads, rows) + triton.cdiv(num_tokens, rows),)](
            projected_TX,
            key_TI,
            *weights,
            cos_TI,
            sin_TI,
            slots_T if slots_T is not None else cos_TI,
            query,
            gates,
            key_target.view(torch.uint8) if is_e4m3 else key_target,
            key_scales_N if key_scales_N is not None else cos_TI,
            num_tokens,
            projected_TX.stride(0),
            key_TI.stride(0),
            key_target.stride(0),
            eps,
            width**-0.5,
            HEADS=heads,
            WIDTH=width,
            ROWS=rows,
            LOG_HALF=width.bit_length() - 2,
            HAS_SLOTS=slots_T is not None,
            IS_E4M3=is_e4m3,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return query.view(torch.float8_e4m3fn) if is_e4m3 else query, gates


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`; without gradients.

    Raises:
        ValueError: a dtype or a width that is not served.
    """
    return _launch_rms(x, None, weight, eps)[1]


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y and its `rms_norm`, in one pass; without gradients.

    Raises:
        ValueError: a dtype or a width that is not served.
    """
    return _launch_rms(x, y, weight, eps)


def _launch_rms(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    if x.dtype not in DTYPES or width > MAX_RMS_WIDTH or (y is not None and (y.dtype, y.shape) != (x.dtype, x.shape)):
        raise ValueError(
            f"rms_norm serves bfloat16, float16 and float32 rows of at most {MAX_RMS_WIDTH} numbers, got {x.dtype} of "
            f"{tuple(x.shape)}" + ("" if y is None else f" and {y.dtype} of {tuple(y.shape)}")
        )
    x = x.contiguous()
    normed = torch.empty_like(x)
    total = torch.empty_like(x) if y is not None else x
    block = triton.next_power_of_2(width)
    if x.numel():
        _rms_norm[(x.numel() // width,)](
            x,
            y.contiguous() if y is not None else x,
            weight,
            total,
            normed,
            eps,
            WIDTH=width,
            BLOCK=block,
            ADDS=y is not None,
            num_warps=max(1, min(16, block // 512)),
            enable_fp_fusion=False,
        )
    return total, normed


@triton.jit
def _load_halves(source, place_R, is_row, WIDTH: tl.constexpr):
    """Both halves of every row in float32."""
    dim = tl.arange(0, WIDTH // 2)
    place = source + place_R[:, None] + dim[None, :]
    first = tl.load(place, mask=is_row[:, None], other=0.0).to(tl.float32)
    return first, tl.load(place + WIDTH // 2, mask=is_row[:, None], other=0.0).to(tl.float32)


@triton.jit
def _weigh(first, second, factor_R, weight, dtype: tl.constexpr, WIDTH: tl.constexpr):
    """The end of an RMS norm, rounded as the twin rounds it."""
    dim = tl.arange(0, WIDTH // 2)
    low = tl.load(weight + dim).to(tl.float32)
    high = tl.load(weight + WIDTH // 2 + dim).to(tl.float32)
    first = (first * factor_R[:, None] * low[None, :]).to(dtype).to(tl.float32)
    return first, (second * factor_R[:, None] * high[None, :]).to(dtype).to(tl.float32)


@triton.jit
def _turn(first, second, cos, sin, token_R, is_row, dtype: tl.constexpr, WIDTH: tl.constexpr):
    """Half-split rotation, rounded. The tables' halves are alike, so that one of them is read."""
    dim = tl.arange(0, WIDTH // 2)
    place = token_R[:, None] * WIDTH + dim[None, :]
    c = tl.load(cos + place, mask=is_row[:, None], other=0.0)
    s = tl.load(sin + place, mask=is_row[:, None], other=0.0)
    return (first * c - second * s).to(dtype).to(tl.float32), (second * c + first * s).to(dtype).to(tl.float32)


@triton.jit
def _store_halves(target, place_R, first, second, is_row, WIDTH: tl.constexpr):
    dim = tl.arange(0, WIDTH // 2)
    place = target + place_R[:, None] + dim[None, :]
    tl.store(place, first.to(target.dtype.element_ty), mask=is_row[:, None])
    tl.store(place + WIDTH // 2, second.to(target.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def _quantise_halves(first, second):
    """e4m3 codes of both halves of every row and the row's scale."""
    largest = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
    scale_R, inverse_R = power_of_two_scale(tl.maximum(largest, 1e-4))
    return e4m3_code(first * inverse_R[:, None]), e4m3_code(second * inverse_R[:, None]), scale_R


@triton.jit
def _store_cached(
    target, scales, slots, first, second, token_R, group_R, is_row, row, group, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    HAS_SLOTS: tl.constexpr, IS_E4M3: tl.constexpr,
):  # fmt: skip
    """Rows to their slots, quantised where the cache is."""
    slot_R = token_R
    if HAS_SLOTS:
        slot_R = tl.load(slots + token_R, mask=is_row, other=-1).to(tl.int64)
        is_row &= slot_R >= 0
    if IS_E4M3:
        first, second, scale_R = _quantise_halves(first, second)
        tl.store(scales + slot_R * GROUPS + group_R, scale_R, mask=is_row)
    _store_halves(target, slot_R * row + group_R * group, first, second, is_row, WIDTH)


@triton.jit
def _norm_rotary(
    query,
    key,
    value,
    query_weight,
    key_weight,
    cos,
    sin,
    slots,
    output,
    key_target,
    value_target,
    key_scales,
    value_scales,
    num_tokens,
    query_row,
    key_row,
    value_row,
    key_target_row,
    key_target_group,
    value_target_row,
    value_target_group,
    eps,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    IS_E4M3: tl.constexpr,
):
    dtype: tl.constexpr = query.dtype.element_ty
    program = tl.program_id(0)
    num_query = (num_tokens * HEADS + ROWS - 1) // ROWS
    num_key = (num_tokens * GROUPS + ROWS - 1) // ROWS
    if program < num_query:
        row_R = program * ROWS + tl.arange(0, ROWS)
        token_R, head_R = (row_R // HEADS).to(tl.int64), row_R % HEADS
        is_row = token_R < num_tokens
        first, second = _load_halves(query, token_R * query_row + head_R * WIDTH, is_row, WIDTH)
        if HAS_NORMS:
            factor_R = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / WIDTH + eps)
            first, second = _weigh(first, second, factor_R, query_weight, dtype, WIDTH)
        first, second = _turn(first, second, cos, sin, token_R, is_row, dtype, WIDTH)
        _store_halves(output, row_R.to(tl.int64) * WIDTH, first, second, is_row, WIDTH)
    elif program < num_query + num_key:
        row_R = (program - num_query) * ROWS + tl.arange(0, ROWS)
        token_R, group_R = (row_R // GROUPS).to(tl.int64), row_R % GROUPS
        is_row = token_R < num_tokens
        first, second = _load_halves(key, token_R * key_row + group_R * WIDTH, is_row, WIDTH)
        if HAS_NORMS:
            factor_R = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / WIDTH + eps)
            first, second = _weigh(first, second, factor_R, key_weight, dtype, WIDTH)
        first, second = _turn(first, second, cos, sin, token_R, is_row, dtype, WIDTH)
        _store_cached(
            key_target, key_scales, slots, first, second, token_R, group_R, is_row, key_target_row, key_target_group, GROUPS,
            WIDTH, HAS_SLOTS, IS_E4M3,
        )  # fmt: skip
    else:
        row_R = (program - num_query - num_key) * ROWS + tl.arange(0, ROWS)
        token_R, group_R = (row_R // GROUPS).to(tl.int64), row_R % GROUPS
        is_row = token_R < num_tokens
        first, second = _load_halves(value, token_R * value_row + group_R * WIDTH, is_row, WIDTH)
        _store_cached(
            value_target, value_scales, slots, first, second, token_R, group_R, is_row, value_target_row, value_target_group,
            GROUPS, WIDTH, HAS_SLOTS, IS_E4M3,
        )  # fmt: skip


@triton.jit
def _butterflies(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, LOG_WIDTH: tl.constexpr):
    """Walsh-Hadamard transform of every row without its factor: the twin's sums in the twin's order."""
    for step in tl.static_range(LOG_WIDTH):
        pairs = tl.permute(tl.reshape(x, (ROWS, WIDTH // (2 << step), 2, 1 << step)), (0, 1, 3, 2))
        a, b = tl.split(pairs)
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (ROWS, WIDTH))
    return x


@triton.jit
def _hadamard(first, second, factor, dtype: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, LOG_HALF: tl.constexpr):
    """Orthonormal transform of rows that come and go in halves, rounded."""
    a = _butterflies(first, ROWS, WIDTH // 2, LOG_HALF)
    b = _butterflies(second, ROWS, WIDTH // 2, LOG_HALF)
    return ((a + b) * factor).to(dtype).to(tl.float32), ((a - b) * factor).to(dtype).to(tl.float32)


@triton.jit
def _index_norm_rotary(
    projected,
    key,
    query_weight,
    key_weight,
    key_bias,
    cos,
    sin,
    slots,
    query,
    gates,
    key_target,
    key_scales,
    num_tokens,
    projected_row,
    key_row,
    key_target_row,
    eps,
    factor,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    LOG_HALF: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    IS_E4M3: tl.constexpr,
):
    dtype: tl.constexpr = key.dtype.element_ty
    half: tl.constexpr = WIDTH // 2
    program = tl.program_id(0)
    num_query = (num_tokens * HEADS + ROWS - 1) // ROWS
    if program < num_query:
        row_R = program * ROWS + tl.arange(0, ROWS)
        token_R, head_R = (row_R // HEADS).to(tl.int64), row_R % HEADS
        is_row = token_R < num_tokens
        first, second = _load_halves(projected, token_R * projected_row + head_R * WIDTH, is_row, WIDTH)
        gate_R = tl.load(projected + token_R * projected_row + HEADS * WIDTH + head_R, mask=is_row, other=0.0).to(tl.float32)
        factor_R = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / WIDTH + eps)
        first, second = _weigh(first, second, factor_R, query_weight, dtype, WIDTH)
        first, second = _turn(first, second, cos, sin, token_R, is_row, dtype, WIDTH)
        first, second = _hadamard(first, second, factor, dtype, ROWS, WIDTH, LOG_HALF)
        gate_R *= factor
        place_R = row_R.to(tl.int64) * WIDTH
        if IS_E4M3:
            low_code, high_code, scale_R = _quantise_halves(first, second)
            gate_R *= scale_R
            _store_halves(query, place_R, low_code, high_code, is_row, WIDTH)
        else:
            _store_halves(query, place_R, first, second, is_row, WIDTH)
        tl.store(gates + row_R, gate_R, mask=is_row)
    else:
        token_R = ((program - num_query) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        is_row = token_R < num_tokens
        first, second = _load_halves(key, token_R * key_row, is_row, WIDTH)
        mean_R = (tl.sum(first, 1) + tl.sum(second, 1)) / WIDTH
        first, second = first - mean_R[:, None], second - mean_R[:, None]
        factor_R = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / WIDTH + eps)
        dim = tl.arange(0, half)
        low, high = tl.load(key_weight + dim).to(tl.float32), tl.load(key_weight + half + dim).to(tl.float32)
        low_bias, high_bias = tl.load(key_bias + dim).to(tl.float32), tl.load(key_bias + half + dim).to(tl.float32)
        first = (first * factor_R[:, None] * low[None, :] + low_bias[None, :]).to(dtype).to(tl.float32)
        second = (second * factor_R[:, None] * high[None, :] + high_bias[None, :]).to(dtype).to(tl.float32)
        first, second = _turn(first, second, cos, sin, token_R, is_row, dtype, WIDTH)
        first, second = _hadamard(first, second, factor, dtype, ROWS, WIDTH, LOG_HALF)
        _store_cached(
            key_target, key_scales, slots, first, second, token_R, tl.zeros([ROWS], tl.int32), is_row, key_target_row, 0, 1,
            WIDTH, HAS_SLOTS, IS_E4M3,
        )  # fmt: skip


@triton.jit
def _rms_norm(x, y, weight, total, normed, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr):
    dtype: tl.constexpr = x.dtype.element_ty
    column = tl.arange(0, BLOCK)
    is_column = column < WIDTH
    place = tl.program_id(0).to(tl.int64) * WIDTH + column
    row = tl.load(x + place, mask=is_column, other=0.0).to(tl.float32)
    if ADDS:
        row = (row + tl.load(y + place, mask=is_column, other=0.0).to(tl.float32)).to(dtype)
        tl.store(total + place, row, mask=is_column)
        row = row.to(tl.float32)
    factor = tl.rsqrt(tl.sum(row * row, 0) / WIDTH + eps)
    weights = tl.load(weight + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(normed + place, (row * factor * weights).to(dtype), mask=is_column)
