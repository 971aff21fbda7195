"""Answer loss and load balance."""

from dataclasses import astuple

import torch
import torch.nn.functional as F

from openkeye.data.slots.slot_batch import NO_LABEL
from openkeye.train.slots.loss import answer_loss, balance_loss


def test_answer_loss_is_a_weighted_mean_of_task_means():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 9), torch.randint(9, (6,))
    slots, tasks = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 1, 0])
    result = answer_loss(logits, targets, slots, tasks, torch.tensor([1.0, 3.0, 5.0]))
    token = F.cross_entropy(logits, targets, reduction="none")
    first, second = token[[0, 1, 5]].mean(), token[[2, 3, 4]].mean()
    torch.testing.assert_close(result.loss, (first + 3 * second) / 4)


def test_a_slot_is_exact_only_when_every_token_is():
    logits = F.one_hot(torch.tensor([3, 4, 5, 6]), 9).float()
    result = answer_loss(logits, torch.tensor([3, 4, 5, 7]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0]), torch.ones(1))
    assert result.num_exact_by_task.tolist() == [1.0] and result.num_slots_by_task.tolist() == [2.0]


def test_padding_of_the_labels_counts_for_nothing():
    torch.manual_seed(0)
    logits, targets, slots = torch.randn(5, 9), torch.tensor([1, 2, 3, NO_LABEL, NO_LABEL]), torch.tensor([0, 0, 1, 0, 0])
    tasks, weights = torch.tensor([0, 1]), torch.ones(2)
    padded = answer_loss(logits, targets, slots, tasks, weights)
    plain = answer_loss(logits[:3], targets[:3], slots[:3], tasks, weights)
    for one, other in zip(astuple(padded), astuple(plain), strict=True):
        torch.testing.assert_close(one, other)


def test_balance_is_one_when_even_and_larger_when_not():
    even = torch.zeros(64, 8)
    even[torch.arange(64), torch.arange(64) % 8] = 1e-3
    even[torch.arange(64), (torch.arange(64) + 1) % 8] = 1e-3
    uneven = torch.zeros(64, 8)
    uneven[:, :2] = 5.0
    assert abs(float(balance_loss([even], 2)) - 1.0) < 0.05
    assert float(balance_loss([uneven], 2)) > 2.0
