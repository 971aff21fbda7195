"""Dense attention: torch's back ends where there is a GPU, the twin elsewhere; splitting and merging everywhere."""

import pytest
import torch
from torch import Tensor

from openkeye.kernels import reference
from openkeye.kernels.dense_attention import (
    _check_last,
    _SplitAttention,
    choose_back_end,
    dense_attention,
    dense_attention_with_lse,
    merge_parts,
    packed_attention,
    packed_attention_with_lse,
)

SCALE = 0.3
# A GPU's float32 kernel takes each product in three parts.
TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def draw(shape: tuple[int, ...], seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def case(num_queries: int, num_keys: int, heads: int, groups: int, width: int = 16, **options) -> tuple[Tensor, ...]:
    return (
        draw((num_queries, heads, width), 0, **options),
        draw((num_keys, groups, width), 1, **options),
        draw((num_keys, groups, width), 2, **options),
    )


def exact(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Output and lse in double precision, with a mask of all pairs."""
    group = query.shape[1] // key.shape[1]
    query, key, value = query.double(), key.double().repeat_interleave(group, 1), value.double().repeat_interleave(group, 1)
    scores = torch.einsum("thd,shd->ths", query, key) * SCALE
    if is_causal:
        position = torch.arange(key.shape[0] - query.shape[0], key.shape[0], device=key.device)
        scores = scores.masked_fill((torch.arange(key.shape[0], device=key.device) > position[:, None])[:, None], -torch.inf)
    return torch.einsum("ths,shd->thd", scores.softmax(-1), value), scores.logsumexp(-1)


def positions(query: Tensor, key: Tensor) -> Tensor:
    return torch.arange(key.shape[0] - query.shape[0], key.shape[0], device=key.device)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 37), (5, 37), (37, 37)])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (8, 2), (6, 1)])
def test_output_and_lse_are_those_of_the_definition(device, heads, groups, num_queries, num_keys, is_causal):
    query, key, value = case(num_queries, num_keys, heads, groups, device=device)
    where = positions(query, key) if is_causal else None
    output, lse = dense_attention_with_lse(query, key, value, where, SCALE)
    expected, expected_lse = exact(query, key, value, is_causal)
    torch.testing.assert_close(output.double(), expected, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(lse.double(), expected_lse, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(dense_attention(query, key, value, where, SCALE), output, atol=TOLERANCE, rtol=TOLERANCE)


def test_the_lse_is_the_same_in_slabs():
    query, key, _ = case(9, 20, 4, 2)
    whole = reference.attention_lse(query, key, positions(query, key), SCALE)
    slabs = reference.attention_lse(query, key, positions(query, key), SCALE, max_scratch_bytes=1)
    torch.testing.assert_close(slabs, whole)


def test_chunks_give_what_one_call_gives(device):
    query, key, value = case(40, 40, 8, 2, device=device)
    whole = dense_attention(query, key, value, positions(query, key), SCALE)
    chunks = [
        dense_attention(query[first:last], key[:last], value[:last], torch.arange(first, last, device=device), SCALE)
        for first, last in ((0, 7), (7, 8), (8, 40))
    ]
    torch.testing.assert_close(torch.cat(chunks), whole, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("is_causal", [False, True])
def test_documents_see_themselves_only(device, is_causal):
    num_queries, num_keys = [3, 0, 1, 8], [7, 4, 1, 8]
    query, key, value = case(sum(num_queries), sum(num_keys), 6, 2, width=24, device=device)
    offsets = [torch.tensor([0, *counts], device=device).cumsum(0).int() for counts in (num_queries, num_keys)]
    arguments = (*offsets, max(num_queries), max(num_keys), SCALE, is_causal)
    output, lse = packed_attention_with_lse(query, key, value, *arguments)
    parts = [
        exact(
            *(tensor[ends[i] : ends[i + 1]] for tensor, ends in zip((query, key, value), (*offsets, offsets[1]), strict=True)),
            is_causal,
        )
        for i in range(4)
        if num_queries[i]
    ]
    torch.testing.assert_close(output.double(), torch.cat([part[0] for part in parts]), atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(lse.double(), torch.cat([part[1] for part in parts]), atol=TOLERANCE, rtol=TOLERANCE)
    assert torch.equal(packed_attention(query, key, value, *arguments), output)


@pytest.mark.parametrize("width", [16, 72])
def test_parts_merge_to_the_whole(device, width):
    query, key, value = case(11, 30, 6, 2, width=width, device=device)
    parts = [dense_attention_with_lse(query, key[keys], value[keys], None, SCALE) for keys in (slice(0, 13), slice(13, None))]
    output, lse = merge_parts(parts[0][0], parts[0][1].t(), parts[1][0], parts[1][1].t())
    expected, expected_lse = dense_attention_with_lse(query, key, value, None, SCALE)
    torch.testing.assert_close(output, expected, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(lse.t(), expected_lse, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_part_far_below_the_other_adds_nothing(device):
    query, key, value = case(2, 6, 2, 1, device=device)
    output, lse = dense_attention_with_lse(query, key, value, None, SCALE)
    merged, merged_lse = merge_parts(output, lse.t(), torch.full_like(output, 7.0), lse.t() - 1e4)
    torch.testing.assert_close(merged, output)
    torch.testing.assert_close(merged_lse, lse.t())


def plain_part(
    query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """A back end that knows causal squares only, as cuDNN does."""
    assert not is_causal or query.shape[0] == key.shape[0]
    output, lse = dense_attention_with_lse(query, key, value, positions(query, key) if is_causal else None, scale)
    return output, lse.t(), (lse,)


def plain_part_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse_HT: Tensor,
    extra: tuple[Tensor, ...],
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients as a fused backward pass takes them: probabilities from the lse, the rest from the output."""
    group = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = torch.einsum("thd,shd->hts", query, keys) * scale
    if is_causal:
        scores = scores.masked_fill(~torch.ones_like(scores[0], dtype=torch.bool).tril(), -torch.inf)
    weights = (scores - lse_HT[..., None]).exp()
    delta = (gradient * output).sum(-1).t()
    score_gradient = weights * (torch.einsum("thd,shd->hts", gradient, values) - delta[..., None]) * scale
    return (
        torch.einsum("hts,shd->thd", score_gradient, keys),
        torch.einsum("hts,thd->shd", score_gradient, query).unflatten(1, (-1, group)).sum(2),
        torch.einsum("hts,thd->shd", weights, gradient).unflatten(1, (-1, group)).sum(2),
    )  # fmt: skip


def test_gradients_of_the_split_are_those_of_the_whole(device):
    tensors = [x.requires_grad_() for x in case(9, 25, 6, 2, device=device)]
    output, lse = _SplitAttention.apply(*tensors, SCALE, plain_part, plain_part_backward)
    expected, expected_lse = exact(*tensors, True)
    torch.testing.assert_close(output.double(), expected, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(lse.t().double(), expected_lse, atol=TOLERANCE, rtol=TOLERANCE)
    gradient = draw((9, 6, 16), 5, device)
    mine = torch.autograd.grad(output, tensors, gradient)
    theirs = torch.autograd.grad(expected, tensors, gradient.double())
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=1e-4)


def test_other_positions_than_the_last_are_refused():
    query, key, _ = case(3, 8, 2, 2)
    _check_last(query, key, torch.tensor([5, 6, 7]))
    with pytest.raises(RuntimeError, match="positions of the last keys only"):
        _check_last(query, key, torch.tensor([4, 5, 6]))
    with pytest.raises(ValueError, match="got 8 of 3"):
        _check_last(key, query, torch.arange(8))


def test_an_unknown_back_end_is_refused():
    with pytest.raises(ValueError, match="got 'quick'"):
        dense_attention(*case(3, 8, 2, 2), None, SCALE, back_end="quick")


def test_a_cpu_takes_the_twin():
    query, key, _ = case(3, 8, 2, 2)
    assert choose_back_end(query, key, True) == "reference"


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("width", [16, 72, 128])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 700), (333, 700), (700, 700)])
@pytest.mark.parametrize("back_end", ["flash", "cudnn", "efficient"])
def test_every_back_end_gives_the_definitions_outputs_and_gradients(back_end, num_queries, num_keys, width):
    dtype = torch.float32 if back_end == "efficient" else torch.bfloat16
    tensors = [x.requires_grad_() for x in case(num_queries, num_keys, 8, 2, width, device="cuda", dtype=dtype)]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    where = positions(tensors[0], tensors[1])
    expected, expected_lse = exact(*wide, True)
    output = dense_attention(*tensors, where, SCALE, back_end=back_end)
    lse = dense_attention_with_lse(*tensors, where, SCALE, back_end=back_end)[1]
    gradient = draw(tuple(output.shape), 5, "cuda", dtype)
    pairs = [(output, expected), (lse, expected_lse)]
    pairs += zip(
        torch.autograd.grad(output, tensors, gradient), torch.autograd.grad(expected, wide, gradient.double()), strict=True
    )
    for mine, theirs in pairs:
        error = (mine.double() - theirs).norm() / theirs.norm()
        assert error <= (2e-5 if dtype == torch.float32 else 1.5e-2)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_documents_in_one_launch(is_causal):
    counts = [5, 300, 64, 1]
    offsets = torch.tensor([0, *counts], device="cuda").cumsum(0).int()
    tensors = case(sum(counts), sum(counts), 16, 16, 72, device="cuda", dtype=torch.bfloat16)
    arguments = (offsets, offsets, max(counts), max(counts), SCALE, is_causal)
    result = packed_attention_with_lse(*tensors, *arguments)
    expected = reference.packed_attention_with_lse(*(x.float() for x in tensors), *arguments)
    for mine, theirs in zip(result, expected, strict=True):
        assert (mine.float() - theirs).norm() <= 1e-2 * theirs.norm()
