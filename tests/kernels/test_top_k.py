"""The Triton selection against its plain twin: ties, plateaus, ragged rows, extreme scores."""

import pytest
import torch

from openkeye.kernels import reference
from openkeye.kernels.top_k import top_k_positions


def check(scores: torch.Tensor, k: int, num_valid: torch.Tensor) -> None:
    result = top_k_positions(scores, k, num_valid)
    assert torch.equal(result, reference.top_k_positions(scores, k, num_valid))


@pytest.mark.parametrize("num_columns", [1, 63, 1025, 5000])
@pytest.mark.parametrize("k", [1, 64, 1024])
def test_random_rows_of_all_lengths(device, num_columns, k):
    scores = torch.randn(4, num_columns, generator=torch.Generator().manual_seed(num_columns)).to(device)
    check(scores, k, torch.tensor([0, num_columns, num_columns // 2, min(num_columns, k + 1)], device=device))


def test_ties_and_plateaus_of_zeros_go_to_the_smaller_position(device):
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randint(0, 4, (3, 3000), generator=generator).float()
    zeros = torch.randn(3, 3000, generator=generator).clamp_min(0) * (torch.rand(3, 3000, generator=generator) < 0.1)
    signs = torch.where(torch.rand(3, 3000, generator=generator) < 0.5, -0.0, 0.0)
    for scores in (coarse, zeros, signs, torch.zeros(3, 3000)):
        check(scores.to(device), 512, torch.full((3,), 3000, device=device))


def test_scores_beyond_half_precision_and_in_one_bin(device):
    generator = torch.Generator().manual_seed(2)
    large = torch.randn(2, 2000, generator=generator) * 1e30
    close = 1.0 + torch.rand(2, 2000, generator=generator) * 1e-6
    tiny = torch.randn(2, 2000, generator=generator) * 1e-38
    for scores in (large, close, -large, tiny):
        check(scores.to(device), 300, torch.tensor([2000, 1999], device=device))


def test_columns_past_the_valid_ones_are_never_looked_at(device):
    scores = torch.randn(2, 600, generator=torch.Generator().manual_seed(3)).to(device)
    expected = top_k_positions(scores, 50, torch.tensor([500, 60], device=device))
    scores[0, 500:], scores[1, 60:] = float("nan"), float("inf")
    assert torch.equal(top_k_positions(scores, 50, torch.tensor([500, 60], device=device)), expected)


def test_the_same_rows_give_the_same_positions_every_time(device):
    scores = torch.randn(2, 3000, generator=torch.Generator().manual_seed(4)).round(decimals=1).to(device)
    num_valid = torch.full((2,), 3000, device=device)
    first = top_k_positions(scores, 256, num_valid)
    assert all(torch.equal(first, top_k_positions(scores, 256, num_valid)) for _ in range(5))


def test_unsupported_requests_are_refused_in_one_sentence(device):
    with pytest.raises(ValueError, match="k from 1 to 4096, got 5000"):
        top_k_positions(torch.zeros(1, 9000, device=device), 5000, torch.tensor([9000], device=device))
    with pytest.raises(ValueError, match="serves float32"):
        top_k_positions(torch.zeros(1, 9, dtype=torch.bfloat16, device=device), 5, torch.tensor([9], device=device))
