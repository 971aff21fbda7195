"""The experts' kernels against the plain twin: outputs, every gradient, fp8 weights, routes."""

import pytest
import torch
from torch import Tensor

from openkeye.kernels import reference
from openkeye.kernels.expert_products import Tiles, add_picks, choose_block_rows, project_and_activate, project_rows
from openkeye.kernels.expert_routes import MAX_ALONE, MAX_UNSORTED, build_routes, route_few
from openkeye.kernels.experts import experts, quantize_expert_weights

# Triton's interpreter multiplies bfloat16 as if it were integers.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
NUM_EXPERTS, DEPTH, WIDTH, PICKED = 5, 72, 40, 3


def picks(num_tokens: int, kind: str, device: str) -> Tensor:
    """[T, K] experts, none twice for a token: drawn at random, all alike, or leaving experts out."""
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(dim=1)[:, :PICKED]
    if kind == "alike":
        ids = torch.tensor([4, 0, 2]).expand(num_tokens, PICKED)
    elif kind == "few":
        ids = torch.where(ids < 3, ids, ids - 2)
        ids = torch.stack([torch.arange(3).roll(int(shift)) for shift in ids[:, 0]]) if num_tokens else ids
    return ids.to(device)


def case(num_tokens: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Tokens, both projections and the picks' weights."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    weights = torch.rand(num_tokens, PICKED, generator=generator).to(device, dtype)
    projections = draw(NUM_EXPERTS, DEPTH, 2 * WIDTH, scale=0.2), draw(NUM_EXPERTS, WIDTH, DEPTH, scale=0.2)
    return [draw(num_tokens, DEPTH), *projections, weights]


def error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.detach().double() - truth.detach().double()).norm() / truth.detach().double().norm().clamp_min(1e-30))


@pytest.mark.parametrize(("num_tokens", "kind"), [(1, "random"), (63, "random"), (20, "alike"), (30, "few")])
def test_outputs_and_gradients_equal_those_of_the_twin(device, num_tokens, kind):
    tensors, ids = case(num_tokens, device), picks(num_tokens, kind, device)
    gradient = torch.randn(num_tokens, DEPTH, generator=torch.Generator().manual_seed(9)).to(device)
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in tensors] for _ in range(2))
    mine, other = experts(*ours, ids), reference.experts(*theirs, ids)
    torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    mine.backward(gradient)
    other.backward(gradient)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, two.grad, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(experts(*tensors, ids.int()), other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_tokens", [3, 180])
def test_half_precision_stays_near_the_twin(device, num_tokens):
    tensors, ids = case(num_tokens, device, HALF), picks(num_tokens, "random", device)
    ours = [tensor.clone().requires_grad_() for tensor in tensors]
    theirs = [tensor.float().requires_grad_() for tensor in tensors]
    mine, other = experts(*ours, ids), reference.experts(*theirs, ids)
    gradient = torch.randn(num_tokens, DEPTH, generator=torch.Generator().manual_seed(9)).to(device, HALF)
    mine.backward(gradient)
    other.backward(gradient.float())
    assert error(mine, other) < 1e-2
    for one, two in zip(ours, theirs, strict=True):
        assert error(one.grad, two.grad) < 2e-2


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 70])
def test_fp8_weights_equal_their_widened_twin(device, num_tokens, dtype):
    (x, gate_up, down, weights), ids = case(num_tokens, device, dtype), picks(num_tokens, "random", device)
    gate_up, gate_up_scale = quantize_expert_weights(gate_up)
    down, down_scale = quantize_expert_weights(down)
    assert gate_up.shape == (NUM_EXPERTS, DEPTH, 2 * WIDTH) and gate_up.stride(1) == 1
    mine = experts(x, gate_up, down, weights, ids, gate_up_scale, down_scale)
    assert error(mine, reference.experts(x, gate_up, down, weights, ids, gate_up_scale, down_scale)) < 1e-2
    wide = gate_up.float() * gate_up_scale[:, None], down.float() * down_scale[:, None]
    assert error(mine, reference.experts(x.float(), *wide, weights.float(), ids)) < (1e-2 if dtype == HALF else 1e-5)


def test_quantised_weights_equal_those_of_the_twin(device):
    weight = torch.randn(3, 50, 20, generator=torch.Generator().manual_seed(1)).to(device)
    weight[1, :, 4] = 0.0
    weight[2, :, 5] = 1e-42
    values, scales = quantize_expert_weights(weight)
    other_values, other_scales = reference.quantize_expert_weights(weight)
    assert torch.equal(values.float(), other_values.float()) and torch.equal(scales, other_scales)
    assert scales[1, 4] == 1.0 and torch.isfinite(values.float()).all()
    assert ((values.float() * scales[:, None] - weight).abs() <= weight.abs().amax(dim=1, keepdim=True) / 16 + 1e-40).all()


@pytest.mark.parametrize("num_rows", [1, 65, MAX_ALONE, MAX_ALONE + 1, 1500])
@pytest.mark.parametrize("num_experts", [2, 6, 20])
def test_routes_are_a_stable_sort(device, num_rows, num_experts):
    generator = torch.Generator().manual_seed(num_rows)
    ids = torch.randint(num_experts, (num_rows, 1), generator=generator).to(device)
    ids[ids == 1] = 0
    routes = build_routes(ids, num_experts, 16)
    assert torch.equal(routes.order_R.long(), ids.flatten().argsort(stable=True))
    counts = torch.bincount(ids.flatten(), minlength=num_experts)
    assert torch.equal(routes.ends_E.long(), counts.cumsum(0))
    tiles = [
        (expert, int(end) - int(count) + row)
        for expert, (end, count) in enumerate(zip(routes.ends_E, counts, strict=True))
        for row in range(0, int(count), 16)
    ]
    used = routes.tile_experts_N >= 0
    assert list(zip(routes.tile_experts_N[used].tolist(), routes.tile_rows_N[used].tolist(), strict=True)) == tiles
    assert used[: len(tiles)].all()


def test_picks_that_are_not_sorted_give_the_same_bits(device):
    """Two of them may have chosen one expert."""
    (x, gate_up, down, weights), ids = case(3, device), picks(3, "random", device)
    ids[1] = ids[0]
    assert ids.numel() <= MAX_UNSORTED
    results = []
    for routes in (route_few(ids, 16), build_routes(ids, NUM_EXPERTS, 16)):
        activated = project_and_activate(x, gate_up, None, routes, PICKED)[0]
        results.append(add_picks(project_rows(activated, down, None, routes), PICKED, weights))
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], reference.experts(x, gate_up, down, weights, ids), atol=1e-4, rtol=1e-4)
    assert torch.equal(experts(x, gate_up, down, weights, ids), results[0])


def test_runs_have_equal_bits(device):
    tensors, ids = case(20, device), picks(20, "random", device)
    runs = []
    for _ in range(3):
        ours = [tensor.clone().requires_grad_() for tensor in tensors]
        output = experts(*ours, ids)
        output.square().sum().backward()
        runs.append([output.detach(), *(tensor.grad for tensor in ours)])
    for run in runs[1:]:
        assert all(torch.equal(first, other) for first, other in zip(runs[0], run, strict=True))


def test_no_tokens_give_no_rows_and_zero_gradients(device):
    ours = [tensor.requires_grad_() for tensor in case(0, device)]
    output = experts(*ours, picks(0, "random", device))
    assert output.shape == (0, DEPTH)
    output.sum().backward()
    assert all(torch.equal(tensor.grad, torch.zeros_like(tensor)) for tensor in ours)


def test_a_split_product_equals_a_whole_one(device, monkeypatch):
    """What one token does, in parts of the depth."""
    (x, gate_up, _, _), ids = case(1, device), picks(1, "random", device)
    routes = build_routes(ids, NUM_EXPERTS, 16)
    whole = project_and_activate(x, gate_up, None, routes, PICKED, keeps_projections=True)[0]
    monkeypatch.setattr("openkeye.kernels.expert_products.FLOAT32_TILES", (Tiles(16, 32, 16, 4, 2),))
    torch.testing.assert_close(project_and_activate(x, gate_up, None, routes, PICKED)[0], whole, atol=1e-5, rtol=1e-5)


def test_picks_are_added_in_their_order(device):
    rows = torch.tensor([[1e8], [1.0], [-1e8], [1e8], [-1e8], [1.0]], device=device)
    assert add_picks(rows, 3, None).flatten().tolist() == [0.0, 1.0]


def test_tiles_grow_with_an_experts_share():
    shares = {1: 16, 256: 16, 512: 32, 1024: 64, 8192: 128}
    assert {tokens: choose_block_rows(tokens * 8, 128, torch.bfloat16) for tokens in shares} == shares


def test_what_is_not_served_is_said(device):
    (x, gate_up, down, weights), ids = case(2, device), picks(2, "random", device)
    with pytest.raises(ValueError, match="projections"):
        experts(x, gate_up, down[:, :-1], weights, ids)
    with pytest.raises(ValueError, match="a weight and an expert"):
        experts(x, gate_up, down, weights[:1], ids)
    with pytest.raises(ValueError, match="all three alike"):
        experts(x.half(), gate_up, down, weights, ids)
    with pytest.raises(ValueError, match="scales"):
        experts(x, *(quantize_expert_weights(weight)[0] for weight in (gate_up, down)), weights, ids)
    quantised = [quantize_expert_weights(weight) for weight in (gate_up, down)]
    scales = [scale for _, scale in quantised]
    with pytest.raises(ValueError, match="no gradients"):
        experts(x.requires_grad_(), *(values for values, _ in quantised), weights, ids, *scales)
