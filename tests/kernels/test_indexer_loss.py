"""The indexer's losses and their gradients against autograd through the plain twins."""

import pytest
import torch
from torch import Tensor

from openkeye.kernels import reference, reference_learning
from openkeye.kernels.attention_lse import attention_lse
from openkeye.kernels.indexer_loss import TeachingAttention, dense_indexer_loss, selected_probabilities, sparse_indexer_loss
from openkeye.kernels.unions import build_unions
from tests.kernels.test_sparse_attention import draw, draw_lists

LENGTHS = (1, 37, 20, 75)
# of packed documents
SCALE = 0.1


def packed(device: str) -> tuple[Tensor, Tensor]:
    """Position of each query among the keys, and its document's first key."""
    first = torch.cat([torch.full((length,), sum(LENGTHS[:number])) for number, length in enumerate(LENGTHS)])
    return torch.arange(sum(LENGTHS), device=device), first.to(device)


def kind(device: str) -> torch.dtype:
    """bfloat16 on a GPU, where that is what matters, float32 in the interpreter."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def assert_close(mine: Tensor, expected: Tensor, atol: float = 2e-6) -> None:
    """Both against a twin in double precision."""
    if mine.is_cuda:
        assert float((mine.double() - expected.double()).norm()) <= 1.2e-2 * float(expected.double().norm())
    else:
        torch.testing.assert_close(mine, expected.float(), atol=atol, rtol=1e-4)


def indexer(num_queries: int, num_keys: int, heads: int, width: int, device: str) -> list[Tensor]:
    """Queries, gates (some below zero) and keys."""
    return [
        draw((num_queries, heads, width), device, kind(device), 5),
        draw((num_queries, heads), device, torch.float32, 6) * width**-0.5,
        draw((num_keys, width), device, kind(device), 7),
    ]


def trunk(num_queries: int, num_keys: int, heads: int, groups: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    return draw((num_queries, heads, width), device, torch.float32, 1), draw(
        (num_keys, groups, width), device, torch.float32, 2
    )


def leaves(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors]


def assert_same(ours: tuple[Tensor, Tensor], mine: list[Tensor], theirs: tuple[Tensor, Tensor], other: list[Tensor]) -> None:
    """Loss, divergences and all gradients, the twin's in double precision."""
    assert_close(ours[1], theirs[1])
    assert_close(ours[0].detach(), theirs[0].detach())
    (ours[0] * 3).backward()
    (theirs[0] * 3).backward()
    for leaf, its in zip(mine, other, strict=True):
        assert_close(leaf.grad, its.grad, max(2e-5 * float(its.grad.abs().max()), 1e-9))


@pytest.mark.parametrize(("heads", "groups", "width"), [(8, 1, 64), (9, 3, 64), (2, 2, 128)])
@pytest.mark.parametrize("is_packed", [False, True])
def test_the_log_sum_exp_equals_its_twin(device, heads, groups, width, is_packed):
    positions, first = packed(device)
    query, key = trunk(positions.shape[0], positions.shape[0], heads, groups, width, device)
    first = first if is_packed else None
    expected = reference.attention_lse(query, key, positions, SCALE, first)
    assert_close(attention_lse(query, key, positions, SCALE, first), expected)


@pytest.mark.parametrize(("index_heads", "index_width"), [(16, 64), (4, 16), (1, 32)])
@pytest.mark.parametrize("slab_bytes", [1 << 30, 8 * 133 * 50])
def test_the_dense_loss_equals_its_twin_over_packed_documents(device, index_heads, index_width, slab_bytes):
    positions, first = packed(device)
    length = positions.shape[0]
    query, key = trunk(length, length, 4, 2, 64, device)
    tensors = indexer(length, length, index_heads, index_width, device)
    weights = draw((length,), device, torch.float32, 8).abs()
    mine, other = leaves(tensors), leaves(tensors, torch.float64)
    ours = dense_indexer_loss(query, key, *mine, positions, SCALE, first, weights, slab_bytes=slab_bytes)
    theirs = reference_learning.dense_indexer_loss(
        query.double(), key.double(), *other, positions, SCALE, first, weights.double()
    )
    assert_same(ours, mine, theirs, other)


def test_the_dense_loss_of_a_chunk_at_the_end_of_its_context(device):
    query, key = trunk(19, 90, 4, 2, 64, device)
    tensors = indexer(19, 90, 8, 16, device)
    positions = torch.arange(71, 90, device=device)
    mine, other = leaves(tensors), leaves(tensors, torch.float64)
    ours = dense_indexer_loss(query, key, *mine, positions, SCALE)
    theirs = reference_learning.dense_indexer_loss(query.double(), key.double(), *other, positions, SCALE)
    assert_same(ours, mine, theirs, other)


def test_a_packed_document_learns_as_it_does_alone(device):
    positions, first = packed(device)
    length = positions.shape[0]
    query, key = trunk(length, length, 4, 2, 64, device)
    tensors = indexer(length, length, 4, 16, device)
    start = sum(LENGTHS[:3])
    for tensor in (query, key, *tensors):
        tensor[:start] *= 5
    weights = torch.ones(length, device=device)
    together = leaves(tensors)
    loss, divergence = dense_indexer_loss(query, key, *together, positions, SCALE, first, weights)
    loss.backward()
    alone = leaves([tensor[start:] for tensor in tensors])
    its_positions = positions[: length - start]
    its_loss, its_divergence = dense_indexer_loss(
        query[start:], key[start:], *alone, its_positions, SCALE, None, weights[start:]
    )
    its_loss.backward()
    assert_close(divergence[start:], its_divergence)
    for mine, other in zip(together, alone, strict=True):
        assert_close(mine.grad[start:], other.grad)


def selected(device: str, num_queries: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    """Attention's queries and keys, and lists in ascending order: short rows, an empty one, an empty tile."""
    query, key = trunk(num_queries, 70, 8, 2, 64, device)
    indices = draw_lists(num_queries, 70, 20, 0.5, device)
    indices[3] = -1
    indices[16:32] = -1
    return query, key, indices


@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (4, 4), (9, 3)])
def test_both_targets_equal_their_twins(device, is_dense, heads, groups):
    _, _, indices = selected(device)
    query, key = trunk(37, 70, heads, groups, 64, device)
    dense = None
    if is_dense:
        dense = reference.attention_lse(query, key, torch.full((37,), 69, device=device), SCALE)
    ours = selected_probabilities(query, key, indices, SCALE, dense)
    expected = reference_learning.selected_probabilities(query, key, indices, SCALE, dense)
    assert_close(ours, expected, 1e-5)
    if is_dense:
        # With one query head a KV head the order of sums and normalisation makes no difference, with more it does.
        sparse = reference_learning.selected_probabilities(query, key, indices, SCALE) / (heads // groups)
        assert torch.allclose(sparse, expected, atol=1e-5) == (heads == groups)


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize(("index_heads", "index_width"), [(16, 64), (4, 16), (1, 32), (32, 16)])
def test_the_sparse_loss_equals_its_twin(device, index_heads, index_width, is_deterministic):
    query, key, indices = selected(device)
    target = selected_probabilities(query, key, indices, SCALE)
    tensors = indexer(37, 70, index_heads, index_width, device)
    weights = draw((37,), device, torch.float32, 8).abs()
    mine, other = leaves(tensors), leaves(tensors, torch.float64)
    ours = sparse_indexer_loss(target, *mine, indices, weights, is_deterministic=is_deterministic)
    theirs = reference_learning.sparse_indexer_loss(target.double(), *other, indices, weights.double())
    assert_same(ours, mine, theirs, other)
    assert float(ours[1][3]) == 0.0 and not mine[0].grad[3].any() and not mine[1].grad[16:32].any()


def test_what_no_list_names_and_nobody_wrote_is_never_read(device):
    query, key, _ = selected(device)
    indices = draw_lists(37, 40, 12, 0.5, device)
    tensors = indexer(37, 70, 4, 16, device)
    tensors[2][40:] = float("nan")
    unions = build_unions(indices, 70)
    place = torch.arange(unions.keys_NU.shape[1], device=device)
    unions.keys_NU[place >= unions.counts_N[:, None]] = 1 << 30
    target = selected_probabilities(query, key, indices, SCALE, unions=unions)
    target[indices < 0] = float("nan")
    mine = leaves(tensors)
    loss, _ = sparse_indexer_loss(target, *mine, indices, unions=unions, is_deterministic=True)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(leaf.grad).all() for leaf in mine)
    assert not mine[2].grad[40:].any()


def test_repeated_runs_give_the_same_bits(device):
    query, key, indices = selected(device)
    target = selected_probabilities(query, key, indices, SCALE)
    tensors = indexer(37, 70, 4, 16, device)
    positions = torch.arange(33, 70, device=device)
    runs = []
    for _ in range(25 if device == "cuda" else 5):
        mine = leaves(tensors)
        loss = sparse_indexer_loss(target, *mine, indices, is_deterministic=True)[0]
        loss = loss + dense_indexer_loss(query, key, *mine, positions, SCALE)[0]
        loss.backward()
        runs.append([loss.detach(), *(leaf.grad for leaf in mine)])
    for run in runs[1:]:
        assert all(torch.equal(first, other) for first, other in zip(runs[0], run, strict=True))


def test_attention_teaches_on_its_way_back(device):
    query, key, _ = selected(device)
    indices = draw_lists(37, 70, 20, 0.5, device)
    value = draw((70, 2, 64), device, query.dtype, 3)
    gradient = draw((37, 8, 64), device, query.dtype, 4)
    tensors = indexer(37, 70, 4, 16, device)
    weights, divergence = draw((37,), device, torch.float32, 8).abs(), torch.empty(37, device=device)
    mine = leaves([query, key, value, *tensors])
    output, placeholder = TeachingAttention.apply(*mine, indices, weights, divergence, SCALE, True)
    assert placeholder == 0.0
    ((output * gradient).sum() + 3 * placeholder).backward()
    other = leaves([query, key, value, *tensors], torch.float64)
    expected = reference.sparse_attention(*other[:3], indices, SCALE)
    target = reference_learning.selected_probabilities(other[0], other[1], indices, SCALE)
    loss, its_divergence = reference_learning.sparse_indexer_loss(target, *other[3:], indices, weights.double())
    ((expected * gradient).sum() + 3 * loss).backward()
    assert_close(output.detach(), expected.detach())
    assert_close(divergence, its_divergence)
    for leaf, its in zip(mine, other, strict=True):
        assert_close(leaf.grad, its.grad, 2e-5 * float(its.grad.abs().max()))


def test_nothing_reaches_the_trunk(device):
    query, key, indices = selected(device)
    query, key = (tensor.requires_grad_() for tensor in (query, key))
    mine = leaves(indexer(37, 70, 4, 16, device))
    target = selected_probabilities(query, key, indices, SCALE)
    loss = sparse_indexer_loss(target, *mine, indices)[0]
    loss = loss + dense_indexer_loss(query, key, *mine, torch.arange(33, 70, device=device), SCALE)[0]
    loss.backward()
    assert query.grad is None and key.grad is None and all(leaf.grad is not None for leaf in mine)


def test_without_gradients_wanted_only_the_loss_is_made(device):
    query, key, indices = selected(device)
    tensors = indexer(37, 70, 4, 16, device)
    loss, divergence = sparse_indexer_loss(selected_probabilities(query, key, indices, SCALE), *tensors, indices)
    assert not loss.requires_grad and torch.isclose(loss, divergence.mean())
    with torch.no_grad():
        loss = dense_indexer_loss(query, key, *leaves(tensors), torch.arange(33, 70, device=device), SCALE)[0]
    assert not loss.requires_grad


def test_what_is_not_served_is_refused_in_one_sentence(device):
    query, key, indices = selected(device)
    target = torch.zeros(37, 20, device=device)
    with pytest.raises(ValueError, match="widths of 16, 32, 64 or 128"):
        sparse_indexer_loss(target, *indexer(37, 70, 4, 48, device), indices)
    with pytest.raises(ValueError, match="bfloat16 and float32"):
        sparse_indexer_loss(target, *(tensor.half() for tensor in indexer(37, 70, 4, 16, device)), indices)
    with pytest.raises(ValueError, match="got queries"):
        tensors = indexer(37, 70, 4, 16, device)
        dense_indexer_loss(query, key, tensors[0], tensors[1][:5], tensors[2], torch.arange(37, device=device), SCALE)
