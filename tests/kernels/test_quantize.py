"""Quantisation to e4m3: scales at exact boundaries, and the Triton kernel's bits against the plain twin's."""

import math

import pytest
import torch

from openkeye.kernels import reference
from openkeye.kernels.quantize import quantize_vectors

IMPLEMENTATIONS = [reference.quantize_vectors, quantize_vectors]


def assert_same_bits(x: torch.Tensor, device: str) -> None:
    expected, expected_scale = reference.quantize_vectors(x)
    codes, scale = quantize_vectors(x.to(device))
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == x.shape and scale.shape == x.shape[:-1]
    assert torch.equal(scale.cpu(), expected_scale)
    assert torch.equal(codes.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
def test_scales_are_the_smallest_power_of_two_that_fits_at_every_boundary(device, quantize):
    boundary = torch.tensor([448.0 * 2.0**n for n in range(-22, 100)])
    above = torch.nextafter(boundary, torch.tensor(torch.inf))
    below = torch.nextafter(boundary, torch.tensor(0.0))
    powers = torch.tensor([2.0**n for n in range(-22, 100)])
    for largest, expected in ((boundary, powers), (below, powers), (above, 2 * powers)):
        x = torch.stack([largest, -largest / 3], dim=-1)
        codes, scale = quantize(x.to(device))
        assert torch.equal(scale.cpu(), expected)
        assert (codes.float().abs() <= 448).all() and codes.float().isfinite().all()


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
def test_small_vectors_stop_at_the_floor(device, quantize):
    x = torch.tensor([[0.0, -0.0], [1e-20, -1e-20], [1e-4, 0.0]], device=device)
    codes, scale = quantize(x)
    assert torch.equal(scale.cpu(), torch.full((3,), 2.0 ** math.ceil(math.log2(1e-4 / 448))))
    assert torch.equal(codes[:2].float().cpu(), torch.zeros(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (37, 16, 64), (5, 4, 128), (3, 96), (2, 1)])
def test_the_kernel_gives_the_bits_of_its_twin(device, dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    spread = torch.logspace(-6, 4, x[..., 0].numel()).view(shape[:-1]).unsqueeze(-1)
    assert_same_bits((x * spread).to(dtype), device)


def test_every_e4m3_number_and_every_midpoint_rounds_to_even(device):
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    near = [torch.nextafter(middles, torch.tensor(limit)) for limit in (0.0, 1e9)]
    numbers = torch.cat([codes, middles, *near])
    signed = torch.cat([numbers, -numbers])
    assert_same_bits(torch.stack([torch.full_like(signed, 448.0), signed], dim=-1), device)


def test_the_error_is_at_most_a_sixteenth_of_each_number():
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(5))
    codes, scale = reference.quantize_vectors(x)
    error = (codes.float() * scale[:, None] - x).abs()
    assert (error <= torch.maximum(x.abs() / 16, scale[:, None] * 2.0**-10)).all()


def test_other_dtypes_are_refused_in_one_sentence(device):
    with pytest.raises(
        ValueError, match=r"serves bfloat16, float16 and float32 vectors of at most 1024 numbers, got torch.int32"
    ):
        quantize_vectors(torch.zeros(2, 3, dtype=torch.int32, device=device))


def test_no_vectors_give_no_codes(device):
    codes, scale = quantize_vectors(torch.zeros(0, 64, device=device))
    assert codes.shape == (0, 64) and scale.shape == (0,)
