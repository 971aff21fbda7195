"""Recorded steps do what ordinary steps do."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from openkeye.train.slots.step_graphs import NUM_ORDINARY_RUNS, StepGraphs, clone_tensors, copy_tensors, tensors_of


@dataclass(frozen=True)
class Inner:
    weight: Tensor


@dataclass(frozen=True)
class Outer:
    name: str
    values: Tensor
    inner: Inner


def record(scale: float) -> Outer:
    return Outer("a record", torch.full((2, 3), scale), Inner(torch.full((3,), 2 * scale)))


def test_tensors_are_found_cloned_and_copied_through_nested_records():
    first, second = record(1.0), record(5.0)
    assert [tuple(tensor.shape) for tensor in tensors_of(first)] == [(2, 3), (3,)]
    own = clone_tensors(first)
    copy_tensors(own, second)
    assert own.name == "a record" and torch.equal(own.inner.weight, second.inner.weight)
    assert torch.equal(first.values, torch.ones(2, 3)), "a clone's tensors are its own"
    with pytest.raises(AssertionError, match="is not"):
        copy_tensors(own, Outer("a record", torch.zeros(2, 4), Inner(torch.zeros(3))))


def train(device: str, is_repeated: bool) -> tuple[Tensor, list[float]]:
    """Six steps of two plans on a small network, as the trainer runs its own."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 4).to(device)
    targets = torch.randn(6, 16, 4).to(device)
    inputs = torch.randn(6, 16, 8).to(device)

    def compute(power: int, pair: Outer) -> dict[str, Tensor]:
        loss = (layer(pair.values) - pair.inner.weight).abs().pow(power).mean()
        loss.backward()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        return {"loss": loss.detach()}

    graphs = StepGraphs(compute, torch.device(device))
    losses = []
    with graphs.on_stream():
        for _ in range(NUM_ORDINARY_RUNS + 2):
            for step in range(6):
                pair = Outer("pair", inputs[step], Inner(targets[step]))
                losses.append(graphs.run(2 + step % 2, pair, is_repeated)["loss"].clone())
    return layer.weight.detach().cpu(), torch.stack(losses).tolist()


def test_on_a_cpu_every_run_is_an_ordinary_one():
    weight, losses = train("cpu", True)
    assert losses[-1] < losses[0] and torch.equal(weight, train("cpu", False)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_replays_equal_ordinary_runs():
    recorded, ordinary = train("cuda", True), train("cuda", False)
    torch.testing.assert_close(recorded[0], ordinary[0])
    torch.testing.assert_close(recorded[1], ordinary[1])
