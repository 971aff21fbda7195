"""Losses of experts, and figures that add up over packs, steps and ranks."""

import pytest
import torch

from openkeye.train.loss import Figures, balance_loss, expert_load, merge
from openkeye.train.slots.loss import balance_loss as slot_balance_loss


def test_with_its_own_shares_it_is_the_loss_of_one_batch():
    logits = [torch.randn(12, 4, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    load = expert_load(logits, 2)
    own = balance_loss(load.num_picks_LE / (12 * 2), load.probability_LE, 12)
    assert float(own) == pytest.approx(float(slot_balance_loss(logits, 2)), rel=1e-6)


def test_packs_add_up_to_the_batch():
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    shares = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    whole = balance_loss(shares, expert_load([logits], 2).probability_LE, 20)
    parts = [balance_loss(shares, expert_load([part], 2).probability_LE, 20) for part in logits.split([3, 17])]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)
    even = torch.full((1, 4), 0.25)
    assert float(balance_loss(even, expert_load([logits], 2).probability_LE, 20)) == pytest.approx(1.0, rel=1e-6)


def test_it_pushes_away_from_the_busy_expert():
    logits = torch.zeros(5, 3, requires_grad=True)
    balance_loss(torch.tensor([[0.8, 0.1, 0.1]]), expert_load([logits], 1).probability_LE, 5).backward()
    assert bool((logits.grad[:, 0] > 0).all()) and bool((logits.grad[:, 1:] < 0).all())


def test_figures_are_ratios_of_sums():
    ranks = [Figures(), Figures()]
    ranks[0].add("loss", torch.tensor(6.0), 2)
    ranks[0].add("loss", torch.tensor(1.0), 5)
    ranks[1].add("loss", torch.tensor(9.0), 1)
    # A measurement that a pack has nothing for counts for nothing.
    ranks[0].add("recall", torch.tensor(torch.nan), 1)
    ranks[1].add("recall", torch.tensor(0.5), 1)
    ranks[1].add("mass", torch.tensor(torch.nan), 1)
    fetched = [rank.fetch() for rank in ranks]
    assert merge(fetched) == pytest.approx({"loss": 2.0, "recall": 0.5})
    assert ranks[0].fetch() == {}
