"""`read_pages`: one sequence's keys or values out of their pages, in order and in the model's dtype, in Triton, on any GPU.

Twin: `reference.read_pages`. Attention over pages needs none of this but where caches are e4m3 and many queries share what is
read, or where a back end takes no page table. Letters: N slots of the cache, G KV heads, D head width, P pages, S positions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from openkeye.kernels.quantize import e4m3_half

ROWS = 32
# positions of a program


def read_pages(
    cache_NGD: Tensor, page_table_P: Tensor, num_keys: int, page_size: int, dtype: torch.dtype, scales_NG: Tensor | None = None
) -> Tensor:
    """See `reference.read_pages`.

    Raises:
        ValueError: a cache that is not of `dtype`, or e4m3 without scales, or fewer pages than keys need.
    """
    is_e4m3 = cache_NGD.dtype == torch.float8_e4m3fn
    if is_e4m3 != (scales_NG is not None) or not (is_e4m3 or cache_NGD.dtype == dtype) or not cache_NGD[0].is_contiguous():
        raise ValueError(
            f"read_pages gives {dtype} of caches in it, or in e4m3 with scales, whose slots have no gaps; got {cache_NGD.dtype}"
            f"{' with' if scales_NG is not None else ' without'} scales, strides {cache_NGD.stride()}"
        )
    if page_table_P.shape[0] * page_size < num_keys or page_table_P.dtype != torch.int32:
        raise ValueError(
            f"read_pages got {page_table_P.shape[0]} pages of {page_size} in {page_table_P.dtype} for {num_keys} keys; "
            "give enough of them in int32"
        )
    groups, width = cache_NGD.shape[1:]
    output = torch.empty(num_keys, groups, width, dtype=dtype, device=cache_NGD.device)
    if num_keys:
        _read[(triton.cdiv(num_keys, ROWS), groups)](
            cache_NGD.view(torch.uint8) if is_e4m3 else cache_NGD,
            scales_NG if scales_NG is not None else output,
            page_table_P.contiguous(),
            output,
            num_keys,
            cache_NGD.stride(0),
            GROUPS=groups,
            WIDTH=width,
            PADDED=triton.next_power_of_2(width),
            PAGE_SIZE=page_size,
            ROWS=ROWS,
            IS_E4M3=is_e4m3,
            num_warps=4,
        )
    return output


@triton.jit
def _read(
    cache,
    scales,
    page_table,
    output,
    num_keys,
    cache_row,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    IS_E4M3: tl.constexpr,
):
    position_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    is_key_R = position_R < num_keys
    page_R = tl.load(page_table + position_R // PAGE_SIZE, mask=is_key_R, other=0).to(tl.int64)
    slot_R = page_R * PAGE_SIZE + position_R % PAGE_SIZE
    dim = tl.arange(0, PADDED)
    mask_RD = is_key_R[:, None] & (dim < WIDTH)[None, :]
    x_RD = tl.load(cache + slot_R[:, None] * cache_row + group * WIDTH + dim[None, :], mask=mask_RD, other=0)
    if IS_E4M3:
        # Halves of 2^-8 of their numbers: the scale, a power of two, makes up for it exactly.
        scale_R = tl.load(scales + slot_R * GROUPS + group, mask=is_key_R, other=1.0) * 256.0
        x_RD = e4m3_half(x_RD).to(tl.float32) * scale_R[:, None]
    place_RD = (position_R.to(tl.int64)[:, None] * GROUPS + group) * WIDTH + dim[None, :]
    tl.store(output + place_RD, x_RD.to(output.dtype.element_ty), mask=mask_RD)
