"""The grouped matrix product gives the plain twin's experts, forward and backward."""

import pytest
import torch

from openkeye.kernels import reference
from openkeye.kernels.grouped_experts import can_group, grouped_experts


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("num_tokens", [1, 63, 2049])
def test_grouped_experts_match_the_plain_twin(num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to("cuda", torch.bfloat16).requires_grad_()

    inputs = [draw(num_tokens, 256), draw(8, 256, 192, scale=1 / 16), draw(8, 96, 256, scale=0.1)]
    weights = torch.rand(num_tokens, 4, generator=generator).to("cuda", torch.bfloat16)
    ids = torch.rand(num_tokens, 8, generator=generator).argsort(dim=1)[:, :4].to("cuda")
    assert can_group(*inputs)
    fast, gradient = grouped_experts(*inputs, weights, ids), draw(num_tokens, 256).detach()
    fast_gradients = torch.autograd.grad(fast, inputs, gradient)
    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
    exact = reference.experts(*wide, weights.float(), ids)
    exact_gradients = torch.autograd.grad(exact, wide, gradient.float())
    for ours, truth in zip((fast, *fast_gradients), (exact, *exact_gradients), strict=True):
        assert (ours.float() - truth).norm() / truth.norm() < 2e-2
