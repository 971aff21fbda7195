"""Attention over all keys through torch's own back ends: one sequence, chunks of it, and packed documents.

Twin: `reference.dense_attention`, `reference.dense_attention_with_lse` and `reference.packed_attention`. In bfloat16 and
float16 a GPU runs FlashAttention-2, and cuDNN from compute capability 9 on where the work pays for building its plan; float32
runs the memory-efficient kernel; whatever else, and a CPU, runs the twin. No mask of queries by keys is made but by the twin.

Letters: T queries, S keys, H query heads, G KV heads, D head width, N documents.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from openkeye.kernels import reference

HALF_DTYPES = (torch.bfloat16, torch.float16)
CUDNN_CAPABILITY = 9
# from this compute capability on cuDNN is the faster back end: 616 TFLOP/s beside 340 on an H100, 16,384 causal tokens
CUDNN_FLOPS = 1e12
# cuDNN builds a plan for every new shape, tens of milliseconds once; 48 layers of this much work repay it the first time
CUDNN_MIN_KEYS = 64
MERGE_ROWS = 16


def choose_back_end(query_THD: Tensor, key_SGD: Tensor, is_causal: bool) -> str:
    """Which back end serves one sequence: "cudnn", "flash", "efficient" or "reference"."""
    width, num_keys = query_THD.shape[2], key_SGD.shape[0]
    if (
        not query_THD.is_cuda
        or query_THD.shape[1] % key_SGD.shape[1]
        or torch.cuda.get_device_capability(query_THD.device)[0] < 8
    ):
        return "reference"
    if query_THD.dtype in HALF_DTYPES and width % 8 == 0 and width <= 256:
        return "cudnn" if _pays_for_cudnn(query_THD, num_keys, is_causal) else "flash"
    if query_THD.dtype == torch.float32 and width % 4 == 0:
        return "efficient"
    return "reference"


def _pays_for_cudnn(query_THD: Tensor, num_keys: int, is_causal: bool) -> bool:
    num_queries, num_heads, width = query_THD.shape
    before = num_keys - num_queries if is_causal else num_keys
    pairs = num_queries * (before + num_queries / 2) if is_causal else num_queries * num_keys
    return (
        torch.cuda.get_device_capability(query_THD.device)[0] >= CUDNN_CAPABILITY
        and width <= 128
        and 4 * pairs * num_heads * width >= CUDNN_FLOPS
        and (before == 0 or before >= CUDNN_MIN_KEYS)
        and torch.backends.cudnn.is_available()
        and (torch.backends.cudnn.version() or 0) >= 90000
        and not torch.are_deterministic_algorithms_enabled()
    )


def dense_attention(
    query_THD: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    query_positions_T: Tensor | None,
    scale: float,
    max_scratch_bytes: int | None = None,
    back_end: str | None = None,
) -> Tensor:
    """See `reference.dense_attention`; with gradients.

    Args:
        query_positions_T: None, or on a GPU S - T, ..., S - 1: the queries are the last of the keys. The device checks it.
        max_scratch_bytes: for the twin where it serves.
        back_end: None chooses (`choose_back_end`).

    Raises:
        ValueError: more queries than keys, or a back end of another name.
    """
    back_end = back_end or choose_back_end(query_THD, key_SGD, query_positions_T is not None)
    if back_end == "reference":
        return reference.dense_attention(query_THD, key_SGD, value_SGD, query_positions_T, scale, max_scratch_bytes)
    _check_last(query_THD, key_SGD, query_positions_T)
    return _attend(query_THD, key_SGD, value_SGD, scale, query_positions_T is not None, back_end)[0]


def dense_attention_with_lse(
    query_THD: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    query_positions_T: Tensor | None,
    scale: float,
    max_scratch_bytes: int | None = None,
    back_end: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`dense_attention` and the natural logarithm of the softmax's sum, float32 [T, H], which carries no gradient."""
    back_end = back_end or choose_back_end(query_THD, key_SGD, query_positions_T is not None)
    if back_end == "reference":
        return reference.dense_attention_with_lse(query_THD, key_SGD, value_SGD, query_positions_T, scale, max_scratch_bytes)
    _check_last(query_THD, key_SGD, query_positions_T)
    output, lse_HT = _attend(query_THD, key_SGD, value_SGD, scale, query_positions_T is not None, back_end)
    return output, lse_HT.detach().t().contiguous()


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
    """Attention inside each of the documents that lie one after the other, [T, H, D]; with gradients.

    One launch in bfloat16 and float16 on a GPU. Elsewhere one call a document, which waits for the device's offsets.

    Args:
        query_offsets_N, key_offsets_N: int32 [N + 1], where each document begins and where the last one ends.
        max_queries, max_keys: of the longest document, so that no launch waits for the device.
        is_causal: the queries of a document are the last of its keys, and see no later ones.
    """
    return packed_attention_with_lse(
        query_THD, key_SGD, value_SGD, query_offsets_N, key_offsets_N, max_queries, max_keys, scale, is_causal
    )[0]


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
    """`packed_attention` and the natural logarithm of the softmax's sum, float32 [T, H], which carries no gradient."""
    back_end = choose_back_end(query_THD, key_SGD, is_causal)
    if back_end in ("flash", "cudnn"):
        output, lse_HT = torch.ops.aten._flash_attention_forward(
            query_THD,
            key_SGD,
            value_SGD,
            query_offsets_N.int(),
            key_offsets_N.int(),
            max_queries,
            max_keys,
            0.0,
            is_causal,
            False,
            scale=scale,
        )[:2]
        return output, lse_HT.detach().t().contiguous()
    if back_end == "reference":
        return reference.packed_attention_with_lse(
            query_THD, key_SGD, value_SGD, query_offsets_N, key_offsets_N, max_queries, max_keys, scale, is_causal
        )
    outputs, sums = [], []
    for queries, keys in documents(query_offsets_N, key_offsets_N):
        output, lse_HT = _attend(query_THD[queries], key_SGD[keys], value_SGD[keys], scale, is_causal, back_end)
        outputs.append(output)
        sums.append(lse_HT.detach().t())
    return torch.cat(outputs), torch.cat(sums)


def documents(query_offsets_N: Tensor, key_offsets_N: Tensor) -> list[tuple[slice, slice]]:
    """Queries and keys of every document that has queries; waits for the device."""
    queries, keys = query_offsets_N.tolist(), key_offsets_N.tolist()
    return [
        (slice(queries[number], queries[number + 1]), slice(keys[number], keys[number + 1]))
        for number in range(len(queries) - 1)
        if queries[number + 1] > queries[number]
    ]


def _check_last(query_THD: Tensor, key_SGD: Tensor, query_positions_T: Tensor | None) -> None:
    """Positions must be those of the last keys; the device stops where they are not, and the host waits for nothing."""
    num_queries, num_keys = query_THD.shape[0], key_SGD.shape[0]
    if query_positions_T is None:
        return
    if num_queries > num_keys:
        raise ValueError(
            f"dense_attention serves causal queries that are the last of the keys, got {num_queries} of {num_keys}"
        )
    expected = torch.arange(num_keys - num_queries, num_keys, device=query_positions_T.device)
    torch._assert_async((query_positions_T == expected).all(), "dense_attention serves the positions of the last keys only")


def _attend(
    query_THD: Tensor, key_SGD: Tensor, value_SGD: Tensor, scale: float, is_causal: bool, back_end: str
) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] and lse [H, T] of one sequence, whose queries are the last of the keys where it is causal."""
    # A single query that is the last key sees them all.
    is_causal = is_causal and query_THD.shape[0] > 1
    if back_end == "cudnn" and is_causal and query_THD.shape[0] < key_SGD.shape[0]:
        output, lse = _SplitAttention.apply(query_THD, key_SGD, value_SGD, scale, _cudnn_part, _cudnn_part_backward)
        return output, lse
    serve = {"cudnn": _cudnn, "flash": _flash, "efficient": _efficient}.get(back_end)
    if serve is None:
        raise ValueError(f"dense_attention knows the back ends cudnn, flash, efficient and reference, got {back_end!r}")
    return serve(query_THD, key_SGD, value_SGD, scale, is_causal)


def _flash(query_THD: Tensor, key_SGD: Tensor, value_SGD: Tensor, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    """FlashAttention-2, whose causal mask ends at the last key."""
    output, lse = torch.ops.aten._flash_attention_forward(
        query_THD[None],
        key_SGD[None],
        value_SGD[None],
        None,
        None,
        query_THD.shape[0],
        key_SGD.shape[0],
        0.0,
        is_causal,
        False,
        scale=scale,
    )[:2]
    return output[0], lse[0]


def _efficient(query_THD: Tensor, key_SGD: Tensor, value_SGD: Tensor, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    """The memory-efficient kernel, which knows no groups of heads; its mask 2 is causal and ends at the last key."""
    group = query_THD.shape[1] // key_SGD.shape[1]
    key, value = (tensor.repeat_interleave(group, dim=1)[None] for tensor in (key_SGD, value_SGD))
    output, lse = torch.ops.aten._efficient_attention_forward(
        query_THD[None], key, value, None, None, None, None, None, 0.0, 2 if is_causal else 0, True, scale=scale
    )[:2]
    # Its rows of sums are padded.
    return output[0], lse[0, :, : query_THD.shape[0]]


def _cudnn(query_THD: Tensor, key_SGD: Tensor, value_SGD: Tensor, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    """cuDNN, whose causal mask begins at the first key: for squares and without a mask."""
    output, lse, _ = _cudnn_part(query_THD, key_SGD, value_SGD, scale, is_causal)
    return output, lse


def _batch(x_THD: Tensor) -> Tensor:
    """[T, H, D] as [1, H, T, D] without a copy."""
    return x_THD[None].transpose(1, 2)


def _cudnn_part(
    query_THD: Tensor, key_SGD: Tensor, value_SGD: Tensor, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Output [T, H, D], lse [H, T] and what cuDNN's backward pass asks for besides."""
    results = torch.ops.aten._scaled_dot_product_cudnn_attention(
        _batch(query_THD), _batch(key_SGD), _batch(value_SGD), None, True, 0.0, is_causal, False, scale=scale
    )
    output, lse = results[:2]
    return output[0].transpose(0, 1), lse.reshape(query_THD.shape[1], query_THD.shape[0]), (lse, *results[6:8])


def _cudnn_part_backward(
    gradient_THD: Tensor,
    query_THD: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    output_THD: Tensor,
    lse_HT: Tensor,
    extra: tuple[Tensor, ...],
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a part whose probabilities follow from the whole's output and lse."""
    part_lse, seed, offset = extra
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        _batch(gradient_THD),
        _batch(query_THD),
        _batch(key_SGD),
        _batch(value_SGD),
        _batch(output_THD),
        lse_HT.view(part_lse.shape),
        seed,
        offset,
        None,
        None,
        None,
        query_THD.shape[0],
        key_SGD.shape[0],
        0.0,
        is_causal,
        scale=scale,
    )
    query, key, value = (gradient[0].transpose(0, 1) for gradient in gradients)
    return query, key, value


class _SplitAttention(torch.autograd.Function):
    """Causal attention of the last queries: all earlier keys without a mask, their own as a square, merged by their lse."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query_THD: Tensor,
        key_SGD: Tensor,
        value_SGD: Tensor,
        scale: float,
        attend: Callable[..., tuple[Tensor, Tensor, tuple[Tensor, ...]]],
        attend_backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Output [T, H, D] and lse [H, T]."""
        query_THD = query_THD.contiguous()
        split = key_SGD.shape[0] - query_THD.shape[0]
        output, lse, extra = attend(query_THD, key_SGD[:split], value_SGD[:split], scale, False)
        own_output, own_lse, own_extra = attend(query_THD, key_SGD[split:], value_SGD[split:], scale, True)
        output, lse = merge_parts(output, lse, own_output, own_lse)
        ctx.save_for_backward(query_THD, key_SGD, value_SGD, output, lse, *extra, *own_extra)
        ctx.scale, ctx.attend_backward = scale, attend_backward  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(lse)
        return output, lse

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Each part's gradients from the whole's output and lse; the queries' are summed."""
        query, key, value, output, lse, *extra = ctx.saved_tensors  # type: ignore[attr-defined]
        split = key.shape[0] - query.shape[0]
        gradient = gradients[0].contiguous()
        half = len(extra) // 2
        parts = [
            ctx.attend_backward(  # type: ignore[attr-defined]
                gradient,
                query,
                key[keys],
                value[keys],
                output,
                lse,
                tuple(its_extra),
                ctx.scale,  # type: ignore[attr-defined]
                is_causal,
            )
            for keys, its_extra, is_causal in (
                (slice(0, split), extra[:half], False),
                (slice(split, None), extra[half:], True),
            )
        ]
        key_gradient, value_gradient = (torch.cat([part[number] for part in parts]) for number in (1, 2))
        return parts[0][0] + parts[1][0], key_gradient, value_gradient, None, None, None


def merge_parts(output_THD: Tensor, lse_HT: Tensor, other_THD: Tensor, other_lse_HT: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each: output [T, H, D] and lse [H, T]."""
    num_tokens, num_heads, width = output_THD.shape
    merged, lse = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (output_THD, lse_HT))
    _merge[(triton.cdiv(num_tokens * num_heads, MERGE_ROWS),)](
        output_THD.contiguous(),
        lse_HT.contiguous(),
        other_THD.contiguous(),
        other_lse_HT.contiguous(),
        merged,
        lse,
        num_tokens,
        HEADS=num_heads,
        WIDTH=width,
        PADDED=triton.next_power_of_2(width),
        ROWS=MERGE_ROWS,
        num_warps=4,
    )
    return merged, lse


@triton.jit
def _merge(
    output,
    lse,
    other,
    other_lse,
    merged,
    merged_lse,
    num_tokens,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_tokens * HEADS
    # Outputs lie token by token, sums head by head.
    place = row % HEADS * num_tokens + row // HEADS
    a = tl.load(lse + place, mask=is_row, other=0.0)
    b = tl.load(other_lse + place, mask=is_row, other=0.0)
    top = tl.maximum(a, b)
    share, other_share = tl.exp(a - top), tl.exp(b - top)
    total = share + other_share
    dim = tl.arange(0, PADDED)
    spot = row.to(tl.int64)[:, None] * WIDTH + dim[None, :]
    mask = is_row[:, None] & (dim < WIDTH)[None, :]
    x = tl.load(output + spot, mask=mask, other=0.0).to(tl.float32) * (share / total)[:, None]
    x += tl.load(other + spot, mask=mask, other=0.0).to(tl.float32) * (other_share / total)[:, None]
    tl.store(merged + spot, x.to(merged.dtype.element_ty), mask=mask)
    tl.store(merged_lse + place, top + tl.log(total), mask=is_row)
