"""Muon and AdamW on master weights."""

import torch
from torch import nn

from openkeye.train.slots.optimizer import Optimizer, ParameterGroup, orthogonalise


def test_orthogonalise_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 16, 48), (3, 48, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)).float())
        assert values.min() > 0.3 and values.max() < 1.4


def test_adamw_equals_torch_adamw():
    torch.manual_seed(0)
    start = torch.randn(5, 7)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = Optimizer([ParameterGroup("all", "adamw", [ours], 1e-2, 0.1)], clip=1e9)
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
    for _ in range(5):
        gradient = torch.randn(5, 7)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step(torch.ones(()))
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_muon_lowers_a_quadratic():
    torch.manual_seed(0)
    weight, target = nn.Parameter(torch.zeros(8, 4)), torch.randn(8, 4)
    optimizer = Optimizer([ParameterGroup("trunk", "muon", [weight], 0.2)], clip=1e9)
    for step in range(200):
        ((weight - target) ** 2).sum().backward()
        optimizer.step(torch.tensor(1 - step / 200))
    assert ((weight - target) ** 2).mean() < 0.01


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = Optimizer([ParameterGroup("trunk", "muon", [weight], 0.1)])
    weight.grad = torch.full((4, 4), float("nan"))
    optimizer.step(torch.ones(()))
    assert torch.equal(weight.data, torch.ones(4, 4)) and float(optimizer.num_skipped) == 1


def test_state_goes_out_and_in():
    torch.manual_seed(0)

    def fresh() -> tuple[nn.Parameter, nn.Parameter, Optimizer]:
        a, b = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
        return a, b, Optimizer([ParameterGroup("trunk", "muon", [a], 0.1), ParameterGroup("rest", "adamw", [b], 0.1)])

    gradients = [(torch.randn(4, 4), torch.randn(4)) for _ in range(4)]
    a1, b1, whole = fresh()
    for a_gradient, b_gradient in gradients:
        a1.grad, b1.grad = a_gradient.clone(), b_gradient.clone()
        whole.step(torch.ones(()))
    a2, b2, first = fresh()
    for a_gradient, b_gradient in gradients[:2]:
        a2.grad, b2.grad = a_gradient.clone(), b_gradient.clone()
        first.step(torch.ones(()))
    a3, b3, second = fresh()
    second.load_state_tensors({name: tensor.clone() for name, tensor in first.state_tensors().items()})
    for a_gradient, b_gradient in gradients[2:]:
        a3.grad, b3.grad = a_gradient.clone(), b_gradient.clone()
        second.step(torch.ones(()))
    assert torch.equal(a1, a3) and torch.equal(b1, b3)


def test_other_groups_rest_when_only_one_learns():
    a, b = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    optimizer = Optimizer([ParameterGroup("trunk", "muon", [a], 0.1), ParameterGroup("indexer", "adamw", [b], 0.1)])
    a.grad, b.grad = torch.ones(4, 4), torch.ones(4)
    optimizer.step(torch.ones(()), only="indexer")
    assert torch.equal(a.data, torch.ones(4, 4)) and not torch.equal(b.data, torch.ones(4))
