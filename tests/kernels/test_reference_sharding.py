"""Candidates of several ranks merge to the selection that one rank makes, ties and all."""

import pytest
import torch

from openkeye.kernels.reference import top_k_positions
from openkeye.kernels.reference_sharding import NONE, merge_candidates, rank_candidates


def test_numbers_are_ordered_as_scores_and_ties_as_positions():
    scores = torch.tensor([-torch.inf, -3e38, -2.0, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 2.0, 3e38, torch.inf])
    for position in (0, 5, 2**31 - 1):
        numbers = rank_candidates(scores, torch.full((12,), position))
        assert torch.equal(numbers.diff() == 0, scores[1:] == scores[:-1]) and (numbers.diff() >= 0).all()
        assert numbers.min() > NONE
    ties = rank_candidates(torch.tensor([0.0, -0.0, 0.0]), torch.tensor([7, 3, 2**31 - 1]))
    assert ties[1] > ties[0] > ties[2]
    assert rank_candidates(torch.tensor([torch.inf, torch.nan]), torch.tensor([-1, -1])).tolist() == [NONE, NONE]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("k", [1, 5, 40, 300])
def test_the_best_of_every_rank_merge_to_the_best_of_all(size, k):
    generator = torch.Generator().manual_seed(k)
    for spread in (3, 10_000):
        scores = torch.randint(-spread, spread, (6, 200), generator=generator).float() / 4
        expected = top_k_positions(scores, k, torch.full((6,), 200))
        candidates = []
        for rank in range(size):
            own = torch.arange(rank, 200, size)
            columns = top_k_positions(scores[:, own], k, torch.full((6,), len(own))).long()
            best = scores[:, own].gather(1, columns.clamp_min(0))
            candidates.append(rank_candidates(best, torch.where(columns < 0, -1, own[columns.clamp_min(0)])))
        assert torch.equal(merge_candidates(torch.cat(candidates, dim=1), k), expected)
