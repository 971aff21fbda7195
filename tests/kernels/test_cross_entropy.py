"""Cross entropy in chunks against the plain twin, through plain products and through the tiles' kernels."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openkeye.kernels import cross_entropy_tiles, reference_learning
from openkeye.kernels.cross_entropy import LogProbabilities, choose_chunks, cross_entropy
from openkeye.kernels.expert_products import Tiles

WIDTH = 40


def case(num_tokens: int, vocabulary: int, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, the head and labels, about a quarter of them left out."""
    generator = torch.Generator().manual_seed(seed + num_tokens)
    hidden = torch.randn(num_tokens, WIDTH, generator=generator).to(device)
    weight = (torch.randn(vocabulary, WIDTH, generator=generator) * 0.5).to(device)
    labels = torch.randint(vocabulary, (num_tokens,), generator=generator)
    labels[torch.rand(num_tokens, generator=generator) < 0.25] = -100
    return hidden, weight, labels.to(device)


def draw_gradients(num_tokens: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    first, second = torch.randn(2, num_tokens, generator=generator).to(device)
    return first, second


def both(num_tokens: int, vocabulary: int, device: str, scratch: int, is_tiled: bool) -> list[tuple[Tensor, Tensor]]:
    """Pairs of ours and the twin's: outputs, then gradients of the tokens and the head through two of them."""
    hidden, weight, labels = case(num_tokens, vocabulary, device)
    gradients = draw_gradients(num_tokens, device)
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in (hidden, weight)] for _ in range(2))
    mine = LogProbabilities.apply(*ours, labels, scratch, is_tiled)
    other = reference_learning.cross_entropy(*theirs, labels)[1:]
    torch.autograd.backward(mine[:2], gradients)
    torch.autograd.backward(other[:2], gradients)
    pairs = [*zip(mine, other, strict=True), *((one.grad, two.grad) for one, two in zip(ours, theirs, strict=True))]
    return [(one.detach(), two.detach()) for one, two in pairs]


@pytest.mark.parametrize("is_tiled", [False, True])
@pytest.mark.parametrize(("num_tokens", "vocabulary"), [(1, 300), (37, 530), (150, 257), (3, 31)])
def test_outputs_and_gradients_equal_those_of_the_twin(device, is_tiled, num_tokens, vocabulary):
    for ours, theirs in both(num_tokens, vocabulary, device, 1 << 20, is_tiled):
        torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("is_tiled", [False, True])
def test_chunks_of_entries_and_blocks_of_tokens_change_nothing(device, is_tiled):
    num_tokens, vocabulary, scratch = 140, 600, 1024
    block, chunk = choose_chunks(num_tokens, vocabulary, 4, scratch)
    assert block < num_tokens and chunk < vocabulary
    for ours, theirs in both(num_tokens, vocabulary, device, scratch, is_tiled):
        torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=1e-4)


def test_chunks_stay_within_their_bytes():
    for num_tokens in (1, 100, 8192, 300_000):
        for scratch in (64 << 20, 512 << 20):
            block, chunk = choose_chunks(num_tokens, 151_936, 2, scratch)
            assert block * chunk * 2 <= scratch and block >= min(num_tokens, 128) and chunk >= 256
    assert choose_chunks(8192, 151_936, 2, 512 << 20) == (8192, 32768)


def test_losses_are_those_of_torch(device):
    hidden, weight, labels = case(50, 90, device)
    weights = torch.rand(50, generator=torch.Generator().manual_seed(1)).to(device)
    found = cross_entropy(hidden, weight, labels, weights)
    logits = hidden @ weight.t()
    expected = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100) * weights
    torch.testing.assert_close(found.loss_T, expected, atol=1e-5, rtol=1e-4)
    learnt = labels >= 0
    distribution = torch.distributions.Categorical(logits=logits[learnt])
    torch.testing.assert_close(found.entropy_T[learnt], distribution.entropy(), atol=1e-5, rtol=1e-4)
    assert torch.equal(found.best_T[learnt], logits[learnt].argmax(dim=-1)) and (found.best_T[~learnt] == -1).all()
    assert all((column[~learnt] == 0).all() for column in found[:4])


@pytest.mark.parametrize("is_tiled", [False, True])
def test_tokens_without_labels_count_for_nothing(device, is_tiled):
    hidden, weight, labels = case(70, 100, device)
    labels[:40] = -1
    hidden[labels < 0] = 1e30
    hidden = hidden.requires_grad_()
    log_probability, lse, entropy, _ = LogProbabilities.apply(hidden, weight, labels, 1 << 20, is_tiled)
    assert all(torch.isfinite(column).all() for column in (log_probability, lse, entropy))
    (log_probability.sum() + lse.sum()).backward()
    assert (hidden.grad[labels < 0] == 0).all() and torch.isfinite(hidden.grad[labels >= 0]).all()


@pytest.mark.parametrize("is_tiled", [False, True])
def test_no_tokens_have_no_losses(device, is_tiled):
    hidden, weight, labels = case(0, 40, device)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    log_probability = LogProbabilities.apply(hidden, weight, labels, 1 << 20, is_tiled)[0]
    assert log_probability.shape == (0,)
    log_probability.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_equal_logits_name_the_smaller_entry(device):
    hidden, weight, labels = case(4, 80, device)
    weight[:] = weight[:1]
    for is_tiled in (False, True):
        found = LogProbabilities.apply(hidden, weight, labels.clamp_min(0), 1 << 20, is_tiled)
        assert found[3].tolist() == [0] * 4


def test_a_label_beyond_the_vocabulary_is_not_taken_for_one(device):
    hidden, weight, labels = case(5, 70, device)
    labels[2] = 70
    log_probability = LogProbabilities.apply(hidden, weight, labels, 1 << 20, True)[0]
    assert torch.isnan(log_probability).tolist() == [False, False, True, False, False]


def test_runs_have_equal_bits(device, monkeypatch):
    monkeypatch.setattr(cross_entropy_tiles, "FLOAT32_TILES", (Tiles(16, 32, 16, 4, 2),))
    runs = [both(60, 150, device, 1 << 20, True) for _ in range(2)]
    assert all(torch.equal(first[0], other[0]) for first, other in zip(*runs, strict=True))


def test_what_is_not_served_is_said(device):
    hidden, weight, labels = case(5, 70, device)
    with pytest.raises(ValueError, match="a label for each token"):
        cross_entropy(hidden, weight, labels[:4])
    with pytest.raises(ValueError, match="of one type"):
        cross_entropy(hidden.half(), weight, labels)
