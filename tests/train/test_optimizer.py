"""The optimizer against PyTorch's own, against the rule that worked, and on a gradient that is no number."""

import copy

import pytest
import torch
from torch import nn

from openkeye.model.keye import KeyeModel
from openkeye.train.groups import part_of, trained_parameters
from openkeye.train.initialise import initialise
from openkeye.train.optimizer import BETAS, MUON_MOMENTUM, Optimizer, gradient_norm, orthogonalise
from openkeye.train.slots.optimizer import Optimizer as SlotOptimizer
from openkeye.train.slots.optimizer import ParameterGroup
from tests.train.toy_runs import TOY

PARTS = ("vision", "projector", "decoder", "indexer")
CPU = torch.device("cpu")


@pytest.fixture
def model() -> KeyeModel:
    model = KeyeModel(TOY)
    initialise(model, seed=3)
    return model


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) if parameter.requires_grad else None


def optimizer_of(
    model: KeyeModel, rule: str = "adamw", clip: float = 1.0, trains: tuple[str, ...] = PARTS, indexer_rule: str = "adamw"
) -> Optimizer:
    optimizer = Optimizer(CPU, clip, weight_decay=0.1)
    optimizer.train(trained_parameters(model, trains, rule, indexer_rule))
    return optimizer


def test_adamw_is_that_of_pytorch(model: KeyeModel):
    twin = copy.deepcopy(model)
    optimizer = optimizer_of(model, clip=0.5)
    decaying = [one.name for one in optimizer.parameters if one.decays]
    groups = [
        {"params": [p for name, p in twin.named_parameters() if (name in decaying) == decays], "weight_decay": 0.1 * decays}
        for decays in (True, False)
    ]
    expected = torch.optim.AdamW(groups, lr=1e-2, betas=BETAS)
    for step in range(3):
        for one in (model, twin):
            set_gradients(one, step)
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        assert float(optimizer.step(dict.fromkeys(PARTS, 1e-2))) == pytest.approx(float(norm), rel=1e-5)
        expected.step()
    for (name, own), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(own, other, atol=2e-6), name
        assert own.grad is None


def test_muon_is_the_rule_that_trained_the_tiny_model(model: KeyeModel):
    # Without clipping, which the two round differently before they go to bf16.
    twin = copy.deepcopy(model)
    optimizer = optimizer_of(model, "muon", clip=1e9)
    by_name = dict(twin.named_parameters())
    rules = {rule: [by_name[one.name] for one in optimizer.parameters if one.rule == rule] for rule in ("muon", "adamw")}
    groups = [ParameterGroup(rule, rule, ps, 1e-2, 0.1 * (rule == "muon")) for rule, ps in rules.items()]
    expected = SlotOptimizer(groups, clip=1e9)
    for step in range(2):
        for one in (model, twin):
            set_gradients(one, step)
        optimizer.step(dict.fromkeys(PARTS, 1e-2))
        expected.step(torch.tensor(1.0))
    for name, own in model.named_parameters():
        assert torch.allclose(own, by_name[name], atol=1e-6), name


def test_what_goes_where(model: KeyeModel):
    by_name = {one.name: one for one in trained_parameters(model, PARTS, "muon")}
    assert {part_of(name) for name in by_name} == set(PARTS)
    muon = {name for name, one in by_name.items() if one.rule == "muon"}
    layer = "model.layers.0."
    assert {f"{layer}mlp.experts.gate_up_proj", f"{layer}self_attn.q_proj.weight", "mlp_AR.linear_1.weight"} <= muon
    for name in ("mlp.gate.weight", "input_layernorm.weight", "self_attn.sa_indexer.q_proj.weight"):
        assert by_name[layer + name].rule == "adamw" and not by_name[layer + name].decays, name
    for name in ("model.embed_tokens.weight", "lm_head.weight", "visual.vision_model.embeddings.patch_embedding.weight"):
        assert by_name[name].rule == "adamw" and not by_name[name].decays, name
    assert all(one.decays == (one.name in muon) for one in by_name.values())
    assert not any(one.decays for one in by_name.values() if one.name.endswith("bias"))


def test_an_indexer_learns_by_muon_and_its_gates_by_adamw(model: KeyeModel):
    name = "model.layers.0.self_attn.sa_indexer."
    query, key = (model.get_parameter(f"{name}{matrix}_proj.weight") for matrix in "qk")
    num_gates = TOY.indexer.num_heads
    gates = nn.Parameter(query.detach()[-num_gates:].clone())
    expected = torch.optim.AdamW([gates], lr=1e-3, betas=(MUON_MOMENTUM, BETAS[1]), weight_decay=0.0)
    optimizer = optimizer_of(model, clip=1e9, indexer_rule="muon")
    assert {one.name for one in optimizer.parameters if one.rule == "muon"} == {
        f"model.layers.{layer}.self_attn.sa_indexer.{matrix}_proj.weight"
        for layer in range(len(model.model.layers))
        for matrix in "qk"
    }
    for step in range(3):
        before = [x.detach().clone() for x in (query, key)]
        set_gradients(model, step)
        gates.grad = query.grad[-num_gates:].clone()
        optimizer.step(dict.fromkeys(PARTS, 1e-2))
        expected.step()
        assert torch.allclose(query[-num_gates:], gates, atol=1e-6)
        for now, then in zip((query[:-num_gates], key), (before[0][:-num_gates], before[1]), strict=True):
            moved = (now.detach() - then) / (1e-2 * 0.2 * max(now.shape) ** 0.5)
            # An orthogonalised update moves every direction about equally far, but for one that the gradient hardly has.
            sizes = torch.linalg.svdvals(moved)
            assert float(sizes[-2]) > 0.6 and float(sizes[0]) < 1.3


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_a_gradient_that_is_no_number_changes_nothing(model: KeyeModel, rule: str):
    optimizer = optimizer_of(model, rule, indexer_rule=rule)
    set_gradients(model, 0)
    optimizer.step(dict.fromkeys(PARTS, 1e-2))
    before = [tensor.clone() for tensor in (*model.parameters(), *optimizer.state_tensors().values())]
    set_gradients(model, 1)
    next(model.parameters()).grad[0, 0] = torch.nan
    assert optimizer.step(dict.fromkeys(PARTS, 1e-2)).isnan()
    after = (*model.parameters(), *optimizer.state_tensors().values())
    assert float(optimizer.num_skipped) == 1
    assert sum(not torch.equal(old, new) for old, new in zip(before, after, strict=True)) == 1
    set_gradients(model, 1)
    optimizer.step(dict.fromkeys(PARTS, 1e-2))
    assert float(optimizer.num_skipped) == 1 and not torch.equal(before[0], next(model.parameters()))


def test_parts_that_go_on_keep_their_moments_and_frozen_ones_lose_them(model: KeyeModel):
    optimizer = optimizer_of(model, trains=("projector", "decoder"))
    set_gradients(model, 0)
    assert all(p.grad is None for name, p in model.named_parameters() if part_of(name) in ("vision", "indexer"))
    optimizer.step(dict.fromkeys(PARTS, 1e-2))
    kept = optimizer.moments["lm_head.weight"]
    optimizer.train(trained_parameters(model, ("vision", "decoder"), "adamw"))
    assert optimizer.moments["lm_head.weight"] is kept and float(kept.num_steps) == 1
    assert {part_of(name) for name in optimizer.moments} == {"vision", "decoder"}
    optimizer.train(trained_parameters(model, ("projector",), "adamw"))
    assert all(float(one.num_steps) == 0 for one in optimizer.moments.values())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == list(optimizer.moments)


def test_the_norm_is_of_all_gradients(model: KeyeModel):
    set_gradients(model, 5)
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert float(gradient_norm(list(model.parameters()))) == pytest.approx(float(expected), rel=1e-5)


def test_orthogonalised_matrices_have_singular_values_near_one():
    matrices = torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices).float())
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
