"""Vectors as e4m3 with one power-of-two scale each, in Triton: the same bits on any CUDA GPU, with or without fp8 of its own.

Twin: `reference.quantize_vectors`. Letters: R vectors, I their width, N vectors of a program. `power_of_two_scale`,
`e4m3_code` and `e4m3_half` serve inside other kernels too: none divides or takes a logarithm, so no bit depends on the GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_WIDTH = 1024
PROGRAM_ELEMENTS = 4096


def quantize_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_vectors`.

    Raises:
        ValueError: a dtype or a width that is not served.
    """
    width = x.shape[-1]
    if x.dtype not in DTYPES or not 1 <= width <= MAX_WIDTH:
        raise ValueError(
            f"quantize_vectors serves bfloat16, float16 and float32 vectors of at most {MAX_WIDTH} numbers, got {x.dtype} of "
            f"shape {tuple(x.shape)}"
        )
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    padded = triton.next_power_of_2(width)
    rows = max(1, PROGRAM_ELEMENTS // padded)
    if scales.numel():
        _quantize[(triton.cdiv(scales.numel(), rows),)](
            x.contiguous(), codes, scales, scales.numel(), WIDTH=width, PADDED=padded, ROWS=rows, num_warps=4
        )
    return codes.view(torch.float8_e4m3fn), scales


@triton.jit
def power_of_two_scale(largest):
    """2^ceil(log2(largest / 448)) and its reciprocal, both exact, for float32 of at least 1e-4: from the bits alone."""
    bits = largest.to(tl.int32, bitcast=True)
    # 448 is 1.75 * 2^8: a mantissa above 1.75 needs the next power.
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_code(x):
    """e4m3 of float32 in -448..448 as its eight bits, rounded to nearest, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # From 2^-6 on three bits of the mantissa stay; the exponent's bias falls from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below, codes count steps of 2^-9: numbers from 2^14 on have that spacing, so adding 2^14 rounds to it.
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, small, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def e4m3_half(code):
    """2^-8 of the number that eight bits of e4m3 stand for, exactly, as float16: what a GPU without fp8 multiplies instead."""
    wide = code.to(tl.uint16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def _quantize(x, codes, scales, num_rows, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    row_N = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, PADDED)
    is_row = row_N < num_rows
    mask = is_row[:, None] & (dim < WIDTH)[None, :]
    place = row_N[:, None] * WIDTH + dim[None, :]
    x_NI = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    scale_N, inverse_N = power_of_two_scale(tl.maximum(tl.max(tl.abs(x_NI), 1), 1e-4))
    tl.store(codes + place, e4m3_code(x_NI * inverse_N[:, None]), mask=mask)
    tl.store(scales + row_N, scale_N, mask=is_row)
