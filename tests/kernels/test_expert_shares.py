"""The experts of one rank: each rank's twin and kernels agree, and the ranks' sum is what all experts give."""

import pytest
import torch
from torch import Tensor

from openkeye.kernels import reference, reference_sharding
from openkeye.kernels.expert_shares import experts_share
from openkeye.kernels.reference import quantize_expert_weights

NUM_EXPERTS, DEPTH, WIDTH, PICKED = 12, 72, 40, 3


def case(num_tokens: int, device: str) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, DEPTH, generator=generator)
    gate_up = torch.randn(NUM_EXPERTS, DEPTH, 2 * WIDTH, generator=generator) * 0.2
    down = torch.randn(NUM_EXPERTS, WIDTH, DEPTH, generator=generator) * 0.2
    weights = torch.rand(num_tokens, PICKED, generator=generator)
    ids = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(dim=1)[:, :PICKED]
    return [tensor.to(device) for tensor in (x, gate_up, down)], weights.to(device), ids.to(device)


@pytest.fixture
def filled_with_nan():
    """Memory that nobody wrote is NaN."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(was)


@pytest.mark.usefixtures("filled_with_nan")
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("num_tokens", [1, 2, 63, 200])
def test_shares_equal_those_of_the_twin_and_sum_to_all(device, num_tokens, size):
    (x, gate_up, down), weights, ids = case(num_tokens, device)
    total = torch.zeros_like(x)
    for first in range(0, NUM_EXPERTS, NUM_EXPERTS // size):
        own = slice(first, first + NUM_EXPERTS // size)
        tensors = (x, gate_up[own], down[own], weights, ids, first)
        expected = reference_sharding.experts_share(*tensors)
        torch.testing.assert_close(experts_share(*tensors), expected, atol=1e-4, rtol=1e-4)
        total += expected
    torch.testing.assert_close(total, reference.experts(x, gate_up, down, weights, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("filled_with_nan")
def test_shares_in_e4m3_equal_those_of_the_twin(device):
    (x, gate_up, down), weights, ids = case(30, device)
    own = slice(3, 6)
    (gate_up8, gate_up_scale), (down8, down_scale) = quantize_expert_weights(gate_up[own]), quantize_expert_weights(down[own])
    tensors = (x, gate_up8, down8, weights, ids, 3, gate_up_scale, down_scale)
    torch.testing.assert_close(experts_share(*tensors), reference_sharding.experts_share(*tensors), atol=1e-3, rtol=1e-3)


def test_a_rank_that_nobody_picked_adds_nothing(device):
    (x, gate_up, down), weights, ids = case(20, device)
    tensors = (x, gate_up[:4], down[:4], weights, ids % 4 + 4, 0)
    assert not experts_share(*tensors).any() and not reference_sharding.experts_share(*tensors).any()
    empty = (x[:0], gate_up[:4], down[:4], weights[:0], ids[:0], 0)
    assert experts_share(*empty).shape == reference_sharding.experts_share(*empty).shape == (0, DEPTH)
