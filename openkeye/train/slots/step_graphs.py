"""Whole training steps recorded as CUDA graphs and replayed.

A small network's step is thousands of small kernels, and the host needs longer to launch them than the device to run them. A
recorded step is launched at once, so that the host draws the next clips meanwhile.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

NUM_ORDINARY_RUNS = 2
# of each kind of step before it is recorded: they compile, choose algorithms and fill caches, which a recording must not

Figures = dict[str, Tensor]
Plan = TypeVar("Plan", bound=Hashable)
Inputs = TypeVar("Inputs")


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: Any
    # the tensors that the graph reads
    figures: Figures
    # the tensors that it writes


class StepGraphs(Generic[Plan, Inputs]):
    """Runs `compute(plan, inputs)`; on a GPU from the third run of a plan on by replaying a recording of it.

    Everything that decides which operations run must stand in the plan, everything that changes between runs in tensors of the
    inputs (a dataclass, nested as it likes), and `compute` must never wait for the device.
    """

    def __init__(self, compute: Callable[[Plan, Inputs], Figures], device: torch.device) -> None:
        self.compute = compute
        self.num_runs: Counter[Plan] = Counter()
        self.recordings: dict[Plan, _Recording] = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # One pool for all: recordings run one after another, so each may reuse what the others used.
        self.pool = torch.cuda.graph_pool_handle() if self.stream is not None else None

    def on_stream(self) -> AbstractContextManager[Any]:
        """Everything that feeds or reads the steps must run inside this: recording needs a stream of its own."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        return torch.cuda.stream(self.stream)

    def run(self, plan: Plan, inputs: Inputs, is_repeated: bool = True) -> Figures:
        """The figures of one run; use them before the next one, which may write over them.

        With `is_repeated` False the plan is too rare to be worth a recording.
        """
        if self.stream is None or not is_repeated:
            return self.compute(plan, inputs)
        self.num_runs[plan] += 1
        if self.num_runs[plan] <= NUM_ORDINARY_RUNS:
            return self.compute(plan, inputs)
        if plan not in self.recordings:
            self.recordings[plan] = self._record(plan, clone_tensors(inputs))
        recording = self.recordings[plan]
        copy_tensors(recording.inputs, inputs)
        recording.graph.replay()
        return recording.figures

    def _record(self, plan: Plan, inputs: Inputs) -> _Recording:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            figures = self.compute(plan, inputs)
        return _Recording(graph, inputs, figures)


def tensors_of(record: Any) -> Iterator[Tensor]:
    """Every tensor of a dataclass and of the dataclasses in it, in order of the fields."""
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from tensors_of(value)


def clone_tensors(record: Any) -> Any:
    """The same record with tensors of its own."""
    changes = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = value.clone()
        elif is_dataclass(value):
            changes[field.name] = clone_tensors(value)
    return replace(record, **changes)


def copy_tensors(target: Any, source: Any) -> None:
    """Write the tensors of one record into those of another of the same shapes."""
    for old, new in zip(tensors_of(target), tensors_of(source), strict=True):
        assert old.shape == new.shape and old.dtype == new.dtype, f"{tuple(old.shape)} is not {tuple(new.shape)}"
        old.copy_(new, non_blocking=True)
