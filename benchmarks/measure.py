"""What all benchmarks share: comparison with plain twins, clocks and tables. Nothing is timed before it has been compared."""

import functools
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from triton.errors import TritonError

GRAPH_REPLAYS = 30
GRAPH_CALLS = 8
# of the work in one graph at least, so that the time of a launch is not the launch of the graph


class Disagreement(Exception):
    """A result that is not its twin's."""


FAILURES = (Disagreement, RuntimeError, ValueError, TritonError)
# What one line of a table may fail with while the others go on: besides, torch's and CUDA's errors, shapes that are not served
# and kernels that do not compile.


def compare(operation: str, result: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raises Disagreement where the relative error (of the whole tensor's norm) is above the tolerance, or no number."""
    wide = expected.detach().double()
    error = float((result.detach().double() - wide).norm() / wide.norm().clamp_min(1e-30))
    if not error <= tolerance:
        raise Disagreement(
            f"{operation}: relative error {error:.2e} against the plain twin, at most {tolerance:.0e} is allowed"
        )


def compare_all(operation: str, pairs: Sequence[tuple[str, Tensor, Tensor]], tolerance: float) -> None:
    """`compare` for several named tensors."""
    for name, result, expected in pairs:
        compare(f"{operation}, {name}", result, expected, tolerance)


def must_equal(operation: str, result: Tensor, expected: Tensor) -> None:
    """Raises Disagreement where a single number differs."""
    if not torch.equal(result, expected):
        raise Disagreement(f"{operation}: {int((result != expected).sum())} numbers differ from the plain twin's")


@dataclass(frozen=True)
class Ceilings:
    """What the hardware reaches: measured on an H100 80 GB HBM3 with copies, reads, products of 8192 cubed, and added rows."""

    bf16_tflops: float = 716.0
    fp8_tflops: float = 1295.0
    memory_tbps: float = 3.0
    l2_tbps: float = 6.5
    adds_tbps: float = 3.2


@dataclass(frozen=True)
class Work:
    """What an operation issues; all of it overlaps, so that the slowest is the floor."""

    flops: float = 0.0
    fp8_flops: float = 0.0
    memory_bytes: float = 0.0
    l2_bytes: float = 0.0
    added_bytes: float = 0.0

    def floor(self, ceilings: Ceilings) -> float:
        """Milliseconds."""
        terms = [
            self.flops / ceilings.bf16_tflops,
            self.fp8_flops / ceilings.fp8_tflops,
            self.memory_bytes / ceilings.memory_tbps,
            self.l2_bytes / ceilings.l2_tbps,
            self.added_bytes / ceilings.adds_tbps,
        ]
        return max(terms) * 1e-9

    def rate(self, milliseconds: float) -> str:
        """TFLOP/s where there are products, else GB/s."""
        flops = self.flops + self.fp8_flops
        if flops:
            return f"{flops / milliseconds * 1e-9:.0f} TFLOP/s"
        moved = max(self.memory_bytes, self.l2_bytes, self.added_bytes)
        return f"{moved / milliseconds * 1e-6:.0f} GB/s" if moved else ""


@dataclass(frozen=True)
class Peer:
    """What else does the job, and its milliseconds in this run; not a number where it did not run."""

    name: str
    milliseconds: float = float("nan")


@dataclass(frozen=True)
class Case:
    """One line of a table before it is measured."""

    operation: str
    shape: str
    runs: tuple[Callable[[], object], ...]
    # The same work on other inputs; those after the first serve where it is timed inside a CUDA graph.
    check: Callable[[], None]
    # raises Disagreement
    work: Work = Work()
    floor: float | None = None
    # milliseconds, where it is not that of what is issued; 0 where none is known
    peer: Peer | None = None
    goal: float | None = None
    # milliseconds
    goal_tflops: float | None = None
    is_captured: bool = False
    is_triton: bool = False
    # without the kernels in CUDA C++: what any other GPU runs


@contextmanager
def only_triton() -> Iterator[None]:
    """The kernels in CUDA C++ are left out meanwhile."""
    before = os.environ.get("OPENKEYE_CUDA")
    os.environ["OPENKEYE_CUDA"] = "0"
    forget_libraries()
    try:
        yield
    finally:
        if before is None:
            del os.environ["OPENKEYE_CUDA"]
        else:
            os.environ["OPENKEYE_CUDA"] = before
        forget_libraries()


def forget_libraries() -> None:
    """Clears what the kernels remember: which libraries there are, among it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("openkeye.kernels"):
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()


class Report:
    """Measures cases and prints their tables.

    Modes: "time"; "check" compares with the twins and times nothing; "rehearse" runs every share-th case once and prints
    nothing, so that its kernels lie compiled on the disk.
    """

    def __init__(
        self, mode: str, device: str, rep_ms: int = 60, ceilings: Ceilings | None = None, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.mode, self.device, self.rep_ms, self.share = mode, device, rep_ms, share
        self.ceilings = ceilings or Ceilings()
        self.lines: list[str] = []
        self.failures: list[str] = []
        self.num_cases = 0
        self.is_microseconds = False

    def say(self, text: str) -> None:
        if self.mode != "rehearse":
            self.lines.append(text)
            print(text, flush=True)

    def begin(self, title: str, is_microseconds: bool = False) -> None:
        """Starts a table of cases."""
        self.is_microseconds = is_microseconds
        unit = "us" if is_microseconds else "ms"
        self.say(f"\n### {title}\n")
        if self.mode == "time":
            columns = ["operation", "shape", unit, "issued", f"floor {unit}", "share", "beside", f"its {unit}", "ratio", "goal"]
            self.say("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))

    def case(self, case: Case) -> float | None:
        """Checks, times and prints one case; its milliseconds, None where it was not timed."""
        milliseconds = self.measure(case)
        if milliseconds is not None:
            self.say(self._row(case, milliseconds))
        return milliseconds

    def measure(self, case: Case) -> float | None:
        """`case` without its line, for tables of other columns."""
        self.num_cases += 1
        # In Triton's interpreter nothing is in CUDA C++ anyway.
        if (case.is_triton and self.device == "cpu") or (self.mode == "rehearse" and not self._is_mine()):
            return None
        name = f"{case.operation}, {case.shape}"
        try:
            with only_triton() if case.is_triton else nullcontext():
                if self.mode == "rehearse":
                    case.runs[0]()
                    return None
                case.check()
                if self.mode == "check":
                    self.say(f"{name}: agrees with its twin")
                    return None
                return self.time_graph(case.runs) if case.is_captured else self.time(case.runs[0])
        except FAILURES as error:
            self.fail(name, error)
            return None

    def fail(self, name: str, error: Exception) -> None:
        """A line that is not printed; the reason stands below all tables."""
        if self.mode == "rehearse":
            return
        lines = str(error).strip().splitlines() or [""]
        self.failures.append(f"- {name}: {type(error).__name__}: {lines[0][:300]}")
        print(self.failures[-1], file=sys.stderr, flush=True)

    def peer(self, name: str, *runs: Callable[[], object], scale: float = 1.0, is_captured: bool = False) -> Peer:
        """Times what else does the job; times scale where it does a part of it. Runs as a case's."""
        if self.mode != "time":
            return Peer(name)
        try:
            return Peer(name, scale * (self.time_graph(runs) if is_captured else self.time(runs[0])))
        except FAILURES as error:
            print(f"{name} did not run: {str(error)[:300]}", file=sys.stderr, flush=True)
            return Peer(f"{name} (did not run)")

    def time(self, run: Callable[[], object]) -> float:
        """Median milliseconds with an L2 that holds none of the inputs."""
        from triton.testing import do_bench

        return float(do_bench(run, warmup=20, rep=self.rep_ms, return_mode="median"))

    def time_graph(self, runs: Sequence[Callable[[], object]]) -> float:
        """Median milliseconds of one of the runs, which follow each other inside a CUDA graph."""
        for run in runs:
            run()
        torch.cuda.synchronize()
        rounds = max(1, GRAPH_CALLS // len(runs))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for run in runs:
                    run()
        times = []
        for _ in range(GRAPH_REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times[3:]) / (rounds * len(runs))

    def finish(self, out: Path | None) -> int:
        """Says what was not printed, writes the file, and gives the exit status."""
        if self.failures:
            self.say("\nNot printed:\n\n" + "\n".join(self.failures))
        if out is not None:
            out.write_text("\n".join(self.lines) + "\n")
        return int(bool(self.failures))

    def _is_mine(self) -> bool:
        number, count = self.share
        return self.num_cases % count == number

    def _row(self, case: Case, milliseconds: float) -> str:
        scale, floor = (1e3 if self.is_microseconds else 1.0), case.floor
        floor = case.work.floor(self.ceilings) if floor is None else floor
        cells = [case.operation, case.shape, figure(scale * milliseconds), case.work.rate(milliseconds)]
        cells += [figure(scale * floor), f"{floor / milliseconds:.0%}"] if floor else ["", ""]
        cells += ["", "", ""] if case.peer is None else _peer_cells(case.peer, scale, milliseconds)
        goals = []
        if case.goal is not None:
            word = "met" if milliseconds <= case.goal else "MISSED"
            goals.append(f"at most {figure(scale * case.goal)}: {word}")
        if case.goal_tflops is not None:
            rate = (case.work.flops + case.work.fp8_flops) / milliseconds * 1e-9
            goals.append(f"at least {case.goal_tflops:.0f} TFLOP/s: {'met' if rate >= case.goal_tflops else 'MISSED'}")
        return "| " + " | ".join([*cells, "; ".join(goals)]) + " |"


def _peer_cells(peer: Peer, scale: float, milliseconds: float) -> list[str]:
    if peer.milliseconds != peer.milliseconds:
        return [peer.name, "", ""]
    return [peer.name, figure(scale * peer.milliseconds), f"{peer.milliseconds / milliseconds:.2f}"]


def figure(value: float) -> str:
    """Three digits at least."""
    return (
        f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
    )
