"""Gradients of selected attention against autograd through the plain twin."""

import pytest
import torch
from torch import Tensor

from openkeye.kernels import reference
from openkeye.kernels.sparse_attention import sparse_attention_with_lse
from openkeye.kernels.sparse_attention_backward import SparseAttention, sparse_attention_backward, summed_probabilities
from openkeye.kernels.unions import build_unions
from tests.kernels.test_sparse_attention import draw, draw_lists


def case(heads: int, groups: int, width: int, num_queries: int, device: str) -> tuple[Tensor, ...]:
    query = draw((num_queries, heads, width), device, torch.float32, 1)
    key, value = (draw((70, groups, width), device, torch.float32, seed) for seed in (2, 3))
    indices = draw_lists(num_queries, 70, 20, 0.5, device)
    return query, key, value, indices, draw((num_queries, heads, width), device, torch.float32, 4)


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize(("heads", "groups", "width"), [(8, 1, 64), (9, 3, 64), (16, 1, 64), (4, 4, 64), (8, 2, 128)])
@pytest.mark.parametrize("num_queries", [1, 33])
def test_gradients_equal_those_of_the_twin(device, heads, groups, width, num_queries, is_deterministic):
    *tensors, indices, gradient = case(heads, groups, width, num_queries, device)
    ours = [tensor.clone().requires_grad_() for tensor in tensors]
    SparseAttention.apply(*ours, indices, width**-0.5, is_deterministic).backward(gradient)
    theirs = [tensor.clone().requires_grad_() for tensor in tensors]
    reference.sparse_attention(*theirs, indices, width**-0.5).backward(gradient)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=5e-6, rtol=1e-4)


def test_the_deterministic_mode_does_not_depend_on_its_slabs(device):
    query, key, value, indices, gradient = case(8, 1, 64, 50, device)
    unions = build_unions(indices, key.shape[0])
    output, lse = sparse_attention_with_lse(query, key, value, indices, 0.1, unions)
    runs = [
        sparse_attention_backward(query, key, value, unions, output, lse, gradient, 0.1, True, slab_bytes)
        for slab_bytes in (1, 1 << 20, 1)
    ]
    for run in runs[1:]:
        assert all(torch.equal(first, other) for first, other in zip(runs[0], run, strict=True))


def test_a_query_that_selected_nothing_has_no_gradient(device):
    query, key, value, indices, gradient = case(8, 1, 64, 18, device)
    indices[3] = -1
    tensors = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    SparseAttention.apply(*tensors, indices, 0.1, False).backward(gradient)
    assert torch.equal(tensors[0].grad[3], torch.zeros_like(query[3]))
    assert all(torch.isfinite(tensor.grad).all() for tensor in tensors)


@pytest.mark.parametrize(("heads", "groups"), [(8, 1), (9, 3), (16, 1), (8, 2)])
def test_probabilities_are_summed_over_heads_in_the_lists_order(device, heads, groups):
    query, key, value, indices, _ = case(heads, groups, 64, 21, device)
    unions = build_unions(indices, key.shape[0])
    _, lse = sparse_attention_with_lse(query, key, value, indices, 0.1, unions)
    sums = summed_probabilities(query, key, unions, lse, indices.shape[1], 0.1)
    keys = key.repeat_interleave(heads // groups, dim=1)[indices.clamp_min(0).long()]
    scores = torch.einsum("thd,tkhd->thk", query, keys) * 0.1
    expected = scores.masked_fill((indices < 0)[:, None], -torch.inf).softmax(dim=-1).sum(dim=1)
    torch.testing.assert_close(sums, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sums.sum(dim=1), torch.full_like(sums[:, 0], heads), atol=1e-4, rtol=1e-5)
