"""The router's kernel against its plain twin; equal shares, of which the smaller expert is taken."""

import pytest
import torch

from openkeye.kernels import reference
from openkeye.kernels.router import route
from tests.kernels.test_dispatch import draw


@pytest.mark.parametrize("is_normalised", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_picked"), [(1, 128, 8), (37, 128, 8), (5, 6, 6), (9, 5, 1), (3, 600, 2)]
)
def test_agrees_with_the_plain_twin(num_tokens, num_experts, num_picked, is_normalised, device):
    logits = draw(num_tokens, num_experts + 3, device=device)[:, :num_experts]
    weights, ids = route(logits, num_picked, is_normalised)
    expected_weights, expected_ids = reference.route(logits, num_picked, is_normalised)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, atol=1e-6, rtol=1e-5)


def test_of_equal_shares_the_smaller_expert_comes_first(device):
    logits = torch.zeros(2, 6, device=device)
    logits[1, 4] = 1.0
    assert route(logits, 3, True)[1].tolist() == [[0, 1, 2], [4, 0, 1]]


def test_half_precision_gives_half_precision_and_large_logits_stay_finite(device):
    logits = torch.tensor([[300.0, -300.0, 299.0, 0.0]], device=device).to(torch.bfloat16)
    weights, ids = route(logits, 2, True)
    assert weights.dtype == torch.bfloat16 and ids.tolist() == [[0, 2]]
    torch.testing.assert_close(weights, reference.route(logits, 2, True)[0])


def test_no_token_is_served(device):
    weights, ids = route(torch.empty(0, 8, device=device), 2, True)
    assert weights.shape == ids.shape == (0, 2)


@pytest.mark.parametrize(("shape", "num_picked"), [((2, 2000), 2), ((2, 4), 5), ((2, 4), 0)])
def test_what_is_not_served_is_refused_in_one_sentence(shape, num_picked, device):
    with pytest.raises(ValueError, match="route serves bfloat16, float16 and float32 rows of at most 1024 experts, got"):
        route(torch.zeros(shape, device=device), num_picked, True)
