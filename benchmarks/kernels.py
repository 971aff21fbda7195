"""Times every kernel at the 30B shape beside torch's own best, and says what share of the hardware's floor it reaches.

    python -m benchmarks.kernels [--contexts 32768 131072 262144] [--queries 8192] [--check-only]

One layer: 32 query and 4 KV heads of 128, indexer of 16 heads of 64, k 2,048; the queries are the last of the context. Nothing
is timed before its result has been compared with the plain twin on sampled rows. The floors take 3.0 TB/s of device memory,
6.5 TB/s of L2 and 716 TFLOP/s in bf16, as measured on an H100 80 GB HBM3: on another GPU give --tflops, --memory-tbps and
--l2-tbps.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from openkeye.kernels import reference
from openkeye.kernels.index_scores import index_scores
from openkeye.kernels.sparse_attention import sparse_attention
from openkeye.kernels.top_k import top_k_positions
from openkeye.kernels.unions import TILE, build_unions

HEADS, GROUPS, WIDTH = 32, 4, 128
INDEX_HEADS, INDEX_WIDTH = 16, 64
NUM_CHECKED = 16
# sampled rows, from the first to the last


@dataclass(frozen=True)
class Shape:
    """One context: how many keys, how many queries at its end, how many keys each picks."""

    num_keys: int
    num_queries: int
    top_k: int

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.num_keys - self.num_queries, self.num_keys)


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    operation: str
    milliseconds: float
    floor_milliseconds: float
    peer: str
    peer_milliseconds: float


def pooled_lists(shape: Shape, device: str, seed: int = 0) -> Tensor:
    """Ascending lists [T, K] of which 16 neighbours share about four times k distinct keys, as trained indexers choose.

    Every tile draws from a pool of 4.05 k keys; three quarters of a pool are those of the tile before.
    """
    generator = torch.Generator(device).manual_seed(seed)
    size = min(int(4.05 * shape.top_k), shape.num_keys - shape.num_queries)
    pool = torch.randperm(shape.num_keys - shape.num_queries, generator=generator, device=device)[:size]
    lists = []
    for first in range(0, shape.num_queries, TILE):
        fresh = torch.randint(shape.num_keys - shape.num_queries, (size // 4,), generator=generator, device=device)
        kept = torch.rand(size, generator=generator, device=device).argsort()[: size - size // 4]
        pool = torch.cat([pool[kept], fresh]).unique()
        count = min(TILE, shape.num_queries - first)
        chosen = torch.rand(count, pool.shape[0], generator=generator, device=device).argsort(dim=1)[:, : shape.top_k]
        lists.append(pool[chosen].sort(dim=1).values)
        pool = torch.cat([pool, pool[: size - pool.shape[0]]]) if pool.shape[0] < size else pool
    width = min(part.shape[1] for part in lists)
    return torch.cat([part[:, :width] for part in lists]).int()


def compare(operation: str, result: Tensor, expected: Tensor, tolerance: float) -> None:
    """Leaves with one line where the result is not its twin's: a wrong kernel has no speed."""
    error = float((result.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
    if not error <= tolerance:
        sys.exit(
            f"{operation}: relative error {error:.2e} against the plain twin, at most {tolerance:.0e} is allowed; not timed"
        )


class Bench:
    """Inputs of one shape, checks and timings of every operation on them."""

    def __init__(self, shape: Shape, arguments: argparse.Namespace, device: str) -> None:
        self.shape, self.arguments, self.device = shape, arguments, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(1)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device).to(self.dtype)

        self.query = draw(shape.num_queries, HEADS, WIDTH)
        self.key, self.value = draw(shape.num_keys, GROUPS, WIDTH), draw(shape.num_keys, GROUPS, WIDTH)
        self.index_query = draw(shape.num_queries, INDEX_HEADS, INDEX_WIDTH)
        self.gates = draw(shape.num_queries, INDEX_HEADS).float() * INDEX_WIDTH**-0.5
        self.index_key = draw(shape.num_keys, INDEX_WIDTH)
        self.positions = shape.positions.to(device)
        self.lists = pooled_lists(shape, device)
        self.sample = torch.linspace(0, shape.num_queries - 1, NUM_CHECKED, device=device).long()
        # Scores of all queries would fill gigabytes: as many rows as 256 MiB hold, timed and multiplied.
        self.slab = min(shape.num_queries, max(16, (256 << 20) // (4 * shape.num_keys)))

    def time(self, work: Callable[[], object]) -> float:
        """Median milliseconds."""
        from triton.testing import do_bench

        return float(do_bench(work, warmup=20, rep=self.arguments.rep_ms, return_mode="median"))

    def check(self) -> None:
        """Every operation against its twin, on the sampled rows."""
        rows = self.sample[self.sample < self.slab]
        scores = self.score_slab()
        expected = reference.index_scores(self.index_query[rows], self.gates[rows], self.index_key)
        for number, row in enumerate(rows.tolist()):
            last = int(self.positions[row]) + 1
            compare("index_scores", scores[row, :last], expected[number, :last], 1e-3)
        num_valid = self.positions[rows] + 1
        picked = top_k_positions(scores[rows].contiguous(), self.shape.top_k, num_valid)
        if not torch.equal(picked, reference.top_k_positions(scores[rows], self.shape.top_k, num_valid)):
            sys.exit("top_k: other positions than the plain twin; not timed")
        output = sparse_attention(self.query, self.key, self.value, self.lists, WIDTH**-0.5)
        twin = reference.sparse_attention(self.query[self.sample], self.key, self.value, self.lists[self.sample], WIDTH**-0.5)
        compare("sparse_attention", output[self.sample], twin, 1e-2 if self.dtype == torch.bfloat16 else 1e-4)

    def score_slab(self) -> Tensor:
        part = slice(0, self.slab)
        return index_scores(self.index_query[part], self.gates[part], self.index_key, self.positions[part])

    def results(self) -> list[Result]:
        """Timings of all operations, for all queries of the shape."""
        shape, arguments = self.shape, self.arguments
        times = shape.num_queries / self.slab
        pairs = float((self.positions + 1).sum())
        terabyte, teraflop = 1e12 / 1e3, 1e12 / 1e3
        # per millisecond
        memory, l2, flops = arguments.memory_tbps * terabyte, arguments.l2_tbps * terabyte, arguments.tflops * teraflop
        scores = self.score_slab()
        num_valid = self.positions[: self.slab] + 1
        unions = build_unions(self.lists, shape.num_keys)
        num_union_keys = float(unions.counts_N.sum())
        matmul_ms = times * self.time(lambda: self.index_query[: self.slab].flatten(0, 1) @ self.index_key.t())
        dense_ms = self.time_dense()
        return [
            Result(
                "index_scores",
                times * self.time(self.score_slab),
                max(2 * INDEX_HEADS * INDEX_WIDTH * pairs / flops, 4 * pairs / memory),
                "torch.mm of the same products",
                matmul_ms,
            ),
            Result(
                "top_k",
                times * self.time(lambda: top_k_positions(scores, shape.top_k, num_valid)),
                4 * pairs / memory,
                "torch.topk",
                times * self.time(lambda: scores.topk(min(shape.top_k, scores.shape[1]), dim=-1)),
            ),
            Result(
                "build_unions",
                self.time(lambda: build_unions(self.lists, shape.num_keys)),
                4 * self.lists.numel() / memory,
                "none",
                float("nan"),
            ),
            Result(
                "sparse_attention",
                self.time(lambda: sparse_attention(self.query, self.key, self.value, self.lists, WIDTH**-0.5, unions)),
                max(
                    4 * WIDTH * HEADS * TILE * num_union_keys / flops,
                    2 * 2 * WIDTH * GROUPS * num_union_keys / l2,
                ),
                "SDPA, all keys",
                dense_ms,
            ),
        ]

    def time_dense(self) -> float:
        """Full causal attention of the same queries by torch: the last rows of a square, whose share of the pairs is taken."""
        query = self.query.transpose(0, 1)[None]
        key, value = (x.transpose(0, 1)[None].repeat_interleave(HEADS // GROUPS, dim=1) for x in (self.key, self.value))
        before = self.shape.num_keys - self.shape.num_queries
        # All earlier keys in full and the own ones causally: two calls that together are the causal rows.
        full = (
            self.time(lambda: F.scaled_dot_product_attention(query, key[:, :, :before], value[:, :, :before])) if before else 0
        )
        return full + self.time(
            lambda: F.scaled_dot_product_attention(query, key[:, :, before:], value[:, :, before:], is_causal=True)
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="Check and time the kernels.")
    parser.add_argument("--contexts", type=int, nargs="+", default=[32768, 131072, 262144])
    parser.add_argument("--queries", type=int, default=8192)
    parser.add_argument("--top-k", type=int, default=2048)
    parser.add_argument("--check-only", action="store_true", help="compare with the twins and time nothing; works on a CPU")
    parser.add_argument("--rep-ms", type=int, default=100, help="milliseconds of repetitions of each timing")
    parser.add_argument("--tflops", type=float, default=716.0)
    parser.add_argument("--memory-tbps", type=float, default=3.0)
    parser.add_argument("--l2-tbps", type=float, default=6.5)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.check_only:
        sys.exit("timing needs a CUDA GPU; --check-only compares the kernels with their twins on a CPU")
    if device == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
        print("| context | operation | ms | floor ms | share of floor | beside | its ms | ratio |")
        print("|---|---|---|---|---|---|---|---|")
    for context in arguments.contexts:
        bench = Bench(Shape(context, min(arguments.queries, context // 2), arguments.top_k), arguments, device)
        bench.check()
        if arguments.check_only:
            print(f"{context}: every operation agrees with its twin")
            continue
        for result in bench.results():
            row = [str(context), result.operation, f"{result.milliseconds:.2f}", f"{result.floor_milliseconds:.2f}"]
            row += [f"{result.floor_milliseconds / result.milliseconds:.0%}", result.peer, f"{result.peer_milliseconds:.2f}"]
            print("| " + " | ".join([*row, f"{result.peer_milliseconds / result.milliseconds:.1f}"]) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
