"""Gradients of selected attention against autograd through the plain twin."""

import pytest
import torch
from torch import Tensor

from openkeye.kernels import reference
from openkeye.kernels.sparse_attention import sparse_attention_with_lse
from openkeye.kernels.sparse_attention_backward import (
    SCHEDULES,
    Gradients,
    SparseAttention,
    sparse_attention_backward,
    summed_probabilities,
)
from openkeye.kernels.unions import Unions, build_unions
from tests.kernels.test_sparse_attention import draw, draw_lists


def case(heads: int, groups: int, width: int, num_queries: int, device: str) -> tuple[Tensor, ...]:
    """In bfloat16 on a GPU, where that is what matters, and in float32 in the interpreter."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    query = draw((num_queries, heads, width), device, dtype, 1)
    key, value = (draw((70, groups, width), device, dtype, seed) for seed in (2, 3))
    indices = draw_lists(num_queries, 70, 20, 0.5, device)
    return query, key, value, indices, draw((num_queries, heads, width), device, dtype, 4)


def assert_close(mine: Tensor, expected: Tensor) -> None:
    """Both against a twin in double precision."""
    if mine.is_cuda:
        assert float((mine.double() - expected.double()).norm()) <= 1.2e-2 * float(expected.double().norm())
    else:
        torch.testing.assert_close(mine, expected.float(), atol=5e-6, rtol=1e-4)


def run(tensors: tuple[Tensor, ...], scale: float, unions: Unions | None = None, **options) -> Gradients:
    query, key, value, indices, gradient = tensors
    unions = unions or build_unions(indices, key.shape[0])
    output, lse = sparse_attention_with_lse(query, key, value, indices, scale, unions)
    return sparse_attention_backward(query, key, value, unions, output, lse, gradient, scale, **options)


def expected_gradients(tensors: tuple[Tensor, ...], scale: float) -> list[Tensor]:
    *leaves, indices, gradient = tensors
    leaves = [tensor.double().requires_grad_() for tensor in leaves]
    reference.sparse_attention(*leaves, indices, scale).backward(gradient.double())
    return [leaf.grad for leaf in leaves]


def expected_probabilities(tensors: tuple[Tensor, ...], scale: float) -> Tensor:
    query, key, indices = tensors[0].double(), tensors[1].double(), tensors[3]
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)[indices.clamp_min(0).long()]
    scores = torch.einsum("thd,tkhd->thk", query, keys) * scale
    return scores.masked_fill((indices < 0)[:, None], -torch.inf).softmax(dim=-1).sum(dim=1)


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize(
    ("heads", "groups", "width"),
    [(8, 1, 64), (9, 3, 64), (16, 1, 64), (4, 4, 64), (8, 2, 128), (8, 2, 32), (9, 3, 32), (4, 1, 16)],
)
@pytest.mark.parametrize("num_queries", [1, 33])
def test_gradients_equal_those_of_the_twin(device, heads, groups, width, num_queries, is_deterministic):
    tensors = case(heads, groups, width, num_queries, device)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors[:3]]
    SparseAttention.apply(*leaves, tensors[3], width**-0.5, is_deterministic).backward(tensors[4])
    for leaf, other in zip(leaves, expected_gradients(tensors, width**-0.5), strict=True):
        assert_close(leaf.grad, other)


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_makes_the_same_gradients_and_probabilities(device, schedule, is_deterministic):
    tensors = case(16, 2, 64, 37, device)
    made = run(tensors, 0.1, schedule=schedule, is_deterministic=is_deterministic, top_k=tensors[3].shape[1])
    for mine, other in zip(made[:3], expected_gradients(tensors, 0.1), strict=True):
        assert_close(mine, other)
    assert_close(made.probabilities_TK, expected_probabilities(tensors, 0.1))


def test_the_deterministic_mode_does_not_depend_on_its_slabs(device):
    tensors = case(8, 1, 64, 20, device)
    runs = [run(tensors, 0.1, is_deterministic=True, slab_bytes=size) for size in (1, 60_000, 1 << 20, 1)]
    for other in runs[1:]:
        assert all(torch.equal(mine, its) for mine, its in zip(runs[0][:3], other[:3], strict=True))


def test_twenty_five_runs_give_the_same_bits(device):
    tensors = case(8, 1, 64, 20, device)
    first = run(tensors, 0.1, is_deterministic=True, top_k=20)
    for _ in range(24 if device == "cuda" else 4):
        other = run(tensors, 0.1, is_deterministic=True, top_k=20)
        assert all(torch.equal(mine, its) for mine, its in zip(first, other, strict=True))


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_a_query_that_selected_nothing_has_no_gradient(device, is_deterministic):
    query, key, value, indices, gradient = case(8, 1, 64, 34, device)
    indices[3] = -1
    indices[16:32] = -1
    made = run((query, key, value, indices, gradient), 0.1, is_deterministic=is_deterministic, top_k=20)
    assert torch.equal(made.query_THD[3], torch.zeros_like(query[3])) and not made.query_THD[16:32].any()
    assert not made.probabilities_TK[3].any() and all(torch.isfinite(tensor).all() for tensor in made)


def test_what_no_list_names_is_never_touched(device):
    query, key, value, _, gradient = case(8, 1, 64, 20, device)
    indices = draw_lists(20, 40, 12, 0.5, device)
    key[40:], value[40:] = float("nan"), float("nan")
    unions = build_unions(indices, 70)
    # Beyond a union's end nothing was written: whatever stands there must not be read.
    place = torch.arange(unions.keys_NU.shape[1], device=device)
    unions.keys_NU[place >= unions.counts_N[:, None]] = 1 << 30
    made = run((query, key, value, indices, gradient), 0.1, unions, is_deterministic=True, top_k=12)
    assert all(torch.isfinite(tensor).all() for tensor in made)
    assert not made.key_SGD[40:].any() and not made.value_SGD[40:].any()


@pytest.mark.parametrize(("heads", "groups"), [(8, 1), (9, 3), (16, 1), (8, 2)])
def test_probabilities_are_summed_over_heads_in_the_lists_order(device, heads, groups):
    tensors = case(heads, groups, 64, 21, device)
    query, key, value, indices, _ = tensors
    unions = build_unions(indices, key.shape[0])
    _, lse = sparse_attention_with_lse(query, key, value, indices, 0.1, unions)
    expected = expected_probabilities(tensors, 0.1)
    apart = summed_probabilities(query, key, unions, lse, indices.shape[1], 0.1)
    assert_close(apart, expected)
    on_the_way = run(tensors, 0.1, unions, top_k=indices.shape[1]).probabilities_TK
    assert_close(on_the_way, expected)
    torch.testing.assert_close(apart.sum(dim=1), torch.full_like(apart[:, 0], heads), atol=1e-4, rtol=5e-3)


def test_what_is_not_served_is_refused_in_one_sentence(device):
    tensors = case(8, 1, 64, 3, device)
    with pytest.raises(ValueError, match="schedules rows 16, rows 32, rows 32 deep, rows 64"):
        run(tensors, 0.1, schedule="rows 48")
    with pytest.raises(ValueError, match="adds in float32 where it is deterministic"):
        run(tensors, 0.1, is_deterministic=True, key_gradient_dtype=torch.bfloat16)
