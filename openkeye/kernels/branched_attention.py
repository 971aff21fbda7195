"""Attention over packs of documents with branches through torch's own back ends, in two launches whatever the number of them.

Twin: `reference_packs.branched_attention`. Every trunk and every branch attends to itself, causally; the branches' tokens
attend to their trunks, without a mask; the two are merged by the logarithms of their sums. A part's gradients follow from the
whole's output and sums. No mask of queries by keys is made. Letters as in `dense_attention`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from openkeye.kernels.dense_attention import dense_attention_with_lse, merge_parts, packed_attention_with_lse
from openkeye.kernels.visible_keys import Offsets, VisibleKeys

Attend = Callable[[Tensor, Tensor, Tensor, Offsets, float, bool], tuple[Tensor, Tensor, tuple[Tensor, ...]]]


def branched_attention_with_lse(
    query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, visible: VisibleKeys, scale: float
) -> tuple[Tensor, Tensor]:
    """See `reference_packs.branched_attention`, and float32 sums [T, H], which carry no gradient; bfloat16 and float16."""
    if visible.branched is not None:
        output, lse_HT = BranchedAttention.apply(query_THD, key_TGD, value_TGD, visible, scale, flash_part, flash_part_backward)
        return output, lse_HT.t().contiguous()
    if len(visible.spans) == 1:
        return dense_attention_with_lse(query_THD, key_TGD, value_TGD, visible.last_T, scale)
    own = visible.segments
    offsets = (own.queries_N, own.keys_N, own.max_queries, own.max_keys)
    return packed_attention_with_lse(query_THD, key_TGD, value_TGD, *offsets, scale, True)


class BranchedAttention(torch.autograd.Function):
    """Output [T, H, D] and sums [H, T] of a pack of which some documents have branches."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query_THD: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        visible: VisibleKeys,
        scale: float,
        attend: Attend,
        attend_backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """attend and attend_backward: of a part, as `flash_part` and `flash_part_backward`."""
        assert visible.branched is not None
        query, key, value = (x.contiguous() for x in (query_THD, key_TGD, value_TGD))
        rows, trunk_rows = visible.branched.rows, visible.branched.trunk_rows
        output, lse_HT, extra = attend(query, key, value, visible.segments, scale, True)
        its_query, its_key, its_value = (
            x.index_select(0, its_rows) for x, its_rows in ((query, rows), (key, trunk_rows), (value, trunk_rows))
        )
        part, part_lse, part_extra = attend(its_query, its_key, its_value, visible.branched.offsets, scale, False)
        merged = merge_parts(output.index_select(0, rows), lse_HT.index_select(1, rows), part, part_lse)
        output, lse_HT = output.index_copy(0, rows, merged[0]), lse_HT.index_copy(1, rows, merged[1])
        ctx.save_for_backward(query, key, value, output, lse_HT, *extra, *part_extra)
        ctx.visible, ctx.scale = visible, scale  # type: ignore[attr-defined]
        ctx.attend_backward, ctx.num_extra = attend_backward, len(extra)  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(lse_HT)
        return output, lse_HT

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Each part's gradients from the whole's output and sums, added up."""
        query, key, value, output, lse_HT, *extra = ctx.saved_tensors  # type: ignore[attr-defined]
        visible, scale = ctx.visible, ctx.scale  # type: ignore[attr-defined]
        attend_backward, num_extra = ctx.attend_backward, ctx.num_extra  # type: ignore[attr-defined]
        gradient = gradients[0].contiguous()
        rows, trunk_rows = visible.branched.rows, visible.branched.trunk_rows
        whole = (gradient, query, key, value, output, lse_HT)
        made = attend_backward(*whole, extra[:num_extra], visible.segments, scale, True)
        picks = (rows, rows, trunk_rows, trunk_rows, rows)
        part = [x.index_select(0, its_rows) for x, its_rows in zip(whole[:5], picks, strict=True)]
        part_lse = lse_HT.index_select(1, rows)
        added = attend_backward(*part, part_lse, extra[num_extra:], visible.branched.offsets, scale, False)
        # Every row once: nothing is added in an order that chance decides.
        query_gradient, key_gradient, value_gradient = (
            x.index_copy(0, its_rows, x.index_select(0, its_rows) + more)
            for x, more, its_rows in zip(made, added, (rows, trunk_rows, trunk_rows), strict=True)
        )
        return query_gradient, key_gradient, value_gradient, None, None, None, None


def flash_part(
    query_THD: Tensor, key_SGD: Tensor, value_SGD: Tensor, offsets: Offsets, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Output [T, H, D], sums [H, T] and what the backward pass asks for besides."""
    output, lse_HT, *extra = torch.ops.aten._flash_attention_forward(
        query_THD,
        key_SGD,
        value_SGD,
        offsets.queries_N,
        offsets.keys_N,
        offsets.max_queries,
        offsets.max_keys,
        0.0,
        is_causal,
        False,
        scale=scale,
    )
    return output, lse_HT, (extra[0], extra[1])


def flash_part_backward(
    gradient_THD: Tensor,
    query_THD: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    output_THD: Tensor,
    lse_HT: Tensor,
    extra: list[Tensor],
    offsets: Offsets,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a part's queries, keys and values from the whole's output and sums."""
    return torch.ops.aten._flash_attention_backward(
        gradient_THD,
        query_THD,
        key_SGD,
        value_SGD,
        output_THD,
        lse_HT,
        offsets.queries_N,
        offsets.keys_N,
        offsets.max_queries,
        offsets.max_keys,
        0.0,
        is_causal,
        *extra,
        scale=scale,
    )
