"""Sizes and inputs of the benchmarks: the 30B layer, and lists as trained indexers choose them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openkeye.kernels.unions import TILE

UNION_RATIOS = {16: 2.441, 32: 3.167, 64: 4.009, 128: 4.968}
# Distinct keys of 16 neighbours' lists in lengths of one list, by the context in the same unit: 4,999, 6,485, 8,211 and 10,174
# keys of 2,048 at 32K, 64K, 128K and 256K, as the report gives them for the trained indexer.

LIST_BLOCK = 512
# queries of `causal_lists` that share a range of keys to draw from


@dataclass(frozen=True)
class Shape:
    """One context: how many keys, how many queries at its end, how many keys each picks."""

    num_keys: int
    num_queries: int
    top_k: int

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.num_keys - self.num_queries, self.num_keys)

    @property
    def name(self) -> str:
        return f"{self.num_queries} x {self.num_keys}"

    @property
    def causal_pairs(self) -> float:
        return self.num_queries * (self.num_keys - (self.num_queries - 1) / 2)

    @property
    def union_keys(self) -> int:
        """Distinct keys that 16 neighbours pick between them."""
        ratio = self.num_keys / self.top_k
        nearest = min(UNION_RATIOS, key=lambda known: abs(known - ratio))
        # Between the reported contexts, and beyond, the size grows with the cube root of the context.
        wanted = UNION_RATIOS[nearest] * (ratio / nearest) ** (1 / 3) * self.top_k
        return int(min(max(wanted, self.top_k), 0.9 * TILE * self.top_k, 0.9 * (self.num_keys - self.num_queries)))


@dataclass(frozen=True)
class Sizes:
    """What all groups of the benchmark run at."""

    contexts: tuple[int, ...] = (32768, 131072, 262144)
    num_queries: int = 8192
    top_k: int = 2048
    heads: int = 32
    groups: int = 4
    width: int = 128
    index_heads: int = 16
    index_width: int = 64
    decode_contexts: tuple[int, ...] = (131072, 262144)
    batches: tuple[int, ...] = (1, 8, 32)
    learning_context: int = 131072
    warm_up_length: int = 32768
    num_experts: int = 128
    num_picked: int = 8
    model_width: int = 2048
    expert_width: int = 768
    num_tokens: int = 8192
    few_tokens: tuple[int, ...] = (1, 32, 256)
    vocabulary: int = 151_936
    quality_context: int = 131072
    quality_rows: int = 256
    num_checked: int = 16
    # sampled rows that are compared with a twin


FULL = Sizes()
# What compiles the same kernels as FULL in little memory: sizes that are numbers at run time are smaller.
REHEARSAL = replace(
    FULL,
    contexts=(36864,),
    num_queries=1024,
    decode_contexts=(36864,),
    learning_context=36864,
    warm_up_length=4096,
    quality_context=36864,
    quality_rows=32,
)
# What Triton's interpreter finishes in seconds.
TINY = Sizes(
    contexts=(160,),
    num_queries=20,
    top_k=16,
    heads=4,
    groups=2,
    width=64,
    index_heads=4,
    index_width=32,
    decode_contexts=(192,),
    batches=(2,),
    learning_context=160,
    warm_up_length=40,
    num_experts=8,
    num_picked=2,
    model_width=48,
    expert_width=16,
    num_tokens=20,
    few_tokens=(3,),
    vocabulary=300,
    quality_context=160,
    quality_rows=3,
    num_checked=6,
)


def draw(device: str, dtype: torch.dtype, *size: int, seed: int) -> Tensor:
    """Normal numbers, the same on every run."""
    return torch.randn(size, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def pool_size(top_k: int, union_keys: int) -> int:
    """How many keys a pool holds out of which 16 draws of top_k without order meet union_keys on average."""
    low, high = top_k, 64 * max(union_keys, top_k)
    while low < high:
        middle = (low + high) // 2
        if middle * (1 - (1 - top_k / middle) ** TILE) < union_keys:
            low = middle + 1
        else:
            high = middle
    return low


def pooled_lists(shape: Shape, device: str, seed: int = 0, union_keys: int | None = None) -> Tensor:
    """Ascending lists [T, K] of which 16 neighbours share union_keys distinct ones; None: as many as reported.

    Every tile draws from a pool of keys before the first query; three quarters of a pool are those of the tile before.
    """
    generator = torch.Generator(device).manual_seed(seed)
    num_earlier = shape.num_keys - shape.num_queries
    size = min(pool_size(shape.top_k, union_keys or shape.union_keys), num_earlier)
    pool = torch.rand(num_earlier, generator=generator, device=device).argsort()[:size]
    lists = []
    for first in range(0, shape.num_queries, TILE):
        kept = pool[torch.rand(size, generator=generator, device=device).argsort()[: size - size // 4]]
        order = torch.rand(num_earlier, generator=generator, device=device)
        # What is kept is not drawn again: every pool holds `size` different keys.
        order[kept] = -1.0
        pool = torch.cat([kept, order.topk(size // 4).indices])
        count = min(TILE, shape.num_queries - first)
        chosen = torch.rand(count, size, generator=generator, device=device).argsort(dim=1)[:, : shape.top_k]
        lists.append(pool[chosen].sort(dim=1).values)
    return torch.cat(lists).int()


def causal_lists(shape: Shape, device: str) -> Tensor:
    """Lists [T, K] of queries that may lie among the first of the keys: all they see up to K, then lists out of pools.

    Pools are drawn anew every LIST_BLOCK queries, from the keys before those.
    """
    first = shape.num_keys - shape.num_queries
    num_short = min(max(shape.top_k - first, 0), shape.num_queries)
    everything = torch.arange(shape.top_k, device=device, dtype=torch.int32).expand(num_short, -1)
    positions = torch.arange(first, first + num_short, device=device)[:, None]
    lists = [everything.masked_fill(everything > positions, -1)]
    for start in range(first + num_short, shape.num_keys, LIST_BLOCK):
        end = min(start + LIST_BLOCK, shape.num_keys)
        lists.append(pooled_lists(Shape(end, end - start, shape.top_k), device, seed=start))
    return torch.cat(lists)


def uniform_lists(shape: Shape, device: str, seed: int = 0) -> Tensor:
    """Ascending lists [T, K] of keys before the first query that have nothing to do with each other."""
    generator = torch.Generator(device).manual_seed(seed)
    num_earlier = shape.num_keys - shape.num_queries
    rows = max(1, (1 << 27) // num_earlier)
    # of random numbers at a time
    lists = []
    for first in range(0, shape.num_queries, rows):
        count = min(rows, shape.num_queries - first)
        order = torch.rand(count, num_earlier, generator=generator, device=device)
        lists.append(order.topk(shape.top_k, dim=1).indices.sort(dim=1).values)
    return torch.cat(lists).int()
