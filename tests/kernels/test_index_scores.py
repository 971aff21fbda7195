"""The Triton scores of the indexer against their plain twin."""

import pytest
import torch

from openkeye.kernels import reference
from openkeye.kernels.index_scores import index_scores


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("heads", "width"), [(16, 64), (4, 32), (1, 16), (64, 128)])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (7, 300), (33, 129)])
def test_scores_equal_their_twin_up_to_the_diagonal(device, heads, width, num_queries, num_keys):
    query, gates, key = draw(num_queries, heads, width), draw(num_queries, heads, seed=1), draw(num_keys, width, seed=2)
    positions = torch.linspace(0, num_keys - 1, num_queries).long()
    out = torch.full((num_queries, num_keys), float("nan"))
    result = index_scores(*(x.to(device) for x in (query, gates, key, positions)), out_TS=out.to(device)).cpu()
    expected = reference.index_scores(query, gates, key)
    is_visible = torch.arange(num_keys) <= positions[:, None]
    torch.testing.assert_close(result[is_visible], expected[is_visible], atol=1e-4, rtol=1e-4)
    assert result[~is_visible].isnan().all(), "columns beyond the diagonal are left alone"


def test_unsupported_shapes_are_refused_in_one_sentence(device):
    positions = torch.zeros(2, dtype=torch.long, device=device)
    with pytest.raises(ValueError, match="a power of two of heads up to 128, got 3 heads of 64"):
        index_scores(torch.zeros(2, 3, 64, device=device), torch.zeros(2, 3, device=device), torch.zeros(5, 64), positions)
