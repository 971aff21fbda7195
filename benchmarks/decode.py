"""Decoding one token a request over paged caches, inside a CUDA graph, with requests whose caches the L2 does not hold."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import Sizes
from benchmarks.measure import Case, Disagreement, Peer, Report, Work, compare, must_equal
from openkeye.kernels import reference
from openkeye.kernels.indexer_decode import indexer_decode
from openkeye.kernels.layer_caches import LayerCaches
from openkeye.kernels.quantize import quantize_vectors
from openkeye.kernels.sparse_decode import DecodeScratch, sparse_decode, sparse_select_decode
from openkeye.kernels.top_k import top_k_positions

PAGE = 64
GOALS = {(131072, 1): 0.030, (131072, 8): 0.070, (131072, 32): 0.200}
L2_BYTES = 50e6
MIN_OVERLAP = 0.995
# of a list with the twin's, whose scores are summed in another order


@dataclass(frozen=True)
class Requests:
    """Some requests' step: their pages, lengths and projections."""

    first: int
    table: Tensor
    lengths: Tensor
    query: Tensor
    index_query: Tensor
    gates: Tensor
    lists: Tensor
    # picked at random, as an indexer may
    scores: Tensor


class Pool:
    """Caches of the most requests of one context, in bf16 and e4m3, and shuffled pages of them."""

    def __init__(self, sizes: Sizes, context: int, device: str) -> None:
        self.sizes, self.context, self.device = sizes, context, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.generator = torch.Generator(device).manual_seed(0)
        num_slots = context * max(sizes.batches)
        kv_shape = (num_slots, sizes.groups, sizes.width)
        key, value, index = (self.draw(*shape) for shape in (kv_shape, kv_shape, (num_slots, sizes.index_width)))
        key_codes, key_scales = quantize_vectors(key)
        value_codes, value_scales = quantize_vectors(value)
        codes, scales = quantize_vectors(index)
        self.caches = {
            "fp8 index, bf16 KV": LayerCaches(key, value, codes, index_scales_S=scales),
            "all bf16": LayerCaches(key, value, index),
            "all fp8": LayerCaches(key_codes, value_codes, codes, key_scales, value_scales, scales),
        }
        pages = torch.randperm(num_slots // PAGE, device=device, generator=self.generator).int()
        self.tables = pages.view(max(sizes.batches), -1)

    def draw(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=self.dtype).normal_(generator=self.generator)

    def requests(self, batch: int) -> list[Requests]:
        """Enough requests that the L2 forgets the first ones' caches before they come again."""
        sizes, device = self.sizes, self.device
        num_picked = min(sizes.top_k, self.context)
        num_bytes = batch * (self.context * (sizes.index_width + 8) + 4 * num_picked * sizes.groups * sizes.width)
        count = min(max(sizes.batches) // batch, int(3 * L2_BYTES / num_bytes) + 1)
        lengths = torch.full((batch,), self.context, dtype=torch.int32, device=device)
        made = []
        for first in range(0, count * batch, batch):
            order = torch.rand(batch, self.context, device=device, generator=self.generator)
            lists = order.topk(num_picked, dim=1).indices.sort(dim=1).values.int()
            query = self.draw(batch, sizes.heads, sizes.width)
            index_query = self.draw(batch, sizes.index_heads, sizes.index_width)
            gates = self.draw(batch, sizes.index_heads).float() * sizes.index_width**-0.5
            scores = torch.randn(batch, self.context, device=device, generator=self.generator)
            table = self.tables[first : first + batch]
            made.append(Requests(first, table, lengths, query, index_query, gates, lists, scores))
        return made


class Decode:
    """All cases of one context and batch."""

    def __init__(self, report: Report, pool: Pool, batch: int) -> None:
        self.report, self.pool, self.sizes, self.batch = report, pool, pool.sizes, batch
        self.requests = pool.requests(batch)
        self.name = f"{batch} x {pool.context}"
        self.scale = self.sizes.width**-0.5
        self.tolerance = 1e-2 if pool.device == "cuda" else 1e-4
        key = pool.caches["all bf16"].key_SGD
        self.scratch = DecodeScratch.empty(batch, pool.context, self.sizes.heads, key, self.sizes.top_k)
        self.kv_bytes = 2.0 * batch * self.sizes.top_k * self.sizes.groups * self.sizes.width

    def run(self) -> None:
        dense = self.dense()
        self.index_scores()
        self.top_k()
        self.attention()
        self.whole(dense)

    def case(self, name: str, work: Callable[[Requests], object], check: Callable[[], None], num_bytes: float) -> None:
        """A part of the step."""
        runs = tuple(partial(work, requests) for requests in self.requests)
        self.report.case(Case(name, self.name, runs, check, Work(memory_bytes=num_bytes), is_captured=True))

    def index_scores(self) -> None:
        """Scores of every key, from e4m3 and bf16."""
        context = self.pool.context
        for name, kind in (("fp8", "fp8 index, bf16 KV"), ("bf16", "all bf16")):
            caches = self.pool.caches[kind]
            keys, scales = caches.index_key_SI, caches.index_scales_S

            def work(
                operation: Callable[..., Tensor],
                requests: Requests,
                out: Tensor,
                keys: Tensor = keys,
                scales: Tensor | None = scales,
            ) -> Tensor:
                tensors = (requests.index_query, requests.gates, keys, requests.table, requests.lengths)
                return operation(*tensors, context, scales, PAGE, out)

            def check(work: Callable[..., Tensor] = work) -> None:
                requests = self.requests[0]
                made, expected = (torch.full_like(requests.scores, torch.nan) for _ in range(2))
                work(indexer_decode, requests, made)
                compare("indexer_decode", made, work(reference.indexer_decode, requests, expected), 1e-3)

            row_bytes = self.sizes.index_width * keys.element_size() + (0 if scales is None else 4)
            self.case(
                f"indexer_decode, {name}",
                partial(work, indexer_decode, out=self.scratch.scores_BL),
                check,
                self.batch * context * (row_bytes + 4),
            )

    def top_k(self) -> None:
        """Of scores that the L2 may hold, as it does after `indexer_decode`."""
        top_k, out = self.sizes.top_k, self.scratch.picked_BK

        def check() -> None:
            requests = self.requests[0]
            expected = reference.top_k_positions(requests.scores, top_k, requests.lengths)
            must_equal("top_k", top_k_positions(requests.scores, top_k, requests.lengths, out), expected)

        self.case(
            "top_k",
            lambda requests: top_k_positions(requests.scores, top_k, requests.lengths, out),
            check,
            4.0 * self.batch * self.pool.context,
        )

    def attention(self) -> None:
        """Of lists picked at random."""
        for name, kind in (("bf16 KV", "all bf16"), ("fp8 KV", "all fp8")):
            caches = self.pool.caches[kind]

            def work(operation: Callable[..., Tensor], requests: Requests, caches: LayerCaches = caches) -> Tensor:
                extra = () if operation is reference.sparse_decode else (self.scratch,)
                return operation(*self.attention_arguments(requests, requests.lists, caches), *extra)

            def check(work: Callable[..., Tensor] = work) -> None:
                requests = self.requests[0]
                made = work(sparse_decode, requests).clone()
                compare("sparse_decode", made, work(reference.sparse_decode, requests), self.tolerance)

            size = caches.key_SGD.element_size() + (0.0 if caches.key_scales_SG is None else 4 / self.sizes.width)
            self.case(f"sparse_decode, {name}", partial(work, sparse_decode), check, self.kv_bytes * size)

    def attention_arguments(self, requests: Requests, lists: Tensor, caches: LayerCaches) -> tuple[Any, ...]:
        tensors = (requests.query, caches.key_SGD, caches.value_SGD, lists, self.scale, requests.table, PAGE)
        return (*tensors, caches.key_scales_SG, caches.value_scales_SG)

    def whole(self, dense: Peer) -> None:
        """The step of all three operations."""
        for kind, caches in self.pool.caches.items():
            index = caches.index_key_SI
            index_bytes = self.sizes.index_width * index.element_size() + (0 if caches.index_scales_S is None else 4)
            size = caches.key_SGD.element_size() + (0.0 if caches.key_scales_SG is None else 4 / self.sizes.width)
            case = Case(
                f"whole step, {kind}",
                self.name,
                tuple(partial(self.step, caches, requests) for requests in self.requests),
                partial(self.check_step, caches),
                # Scores are written and read again, out of the L2 where it holds them.
                Work(memory_bytes=self.batch * self.pool.context * (index_bytes + 4) + self.kv_bytes * size),
                peer=dense,
                goal=GOALS.get((self.pool.context, self.batch)) if kind == "fp8 index, bf16 KV" else None,
                is_captured=True,
            )
            self.report.case(case)

    def step(self, caches: LayerCaches, requests: Requests) -> Tensor:
        tensors = (requests.query, requests.index_query, requests.gates, caches, requests.table, requests.lengths)
        return sparse_select_decode(*tensors, self.scale, self.scratch)

    def check_step(self, caches: LayerCaches) -> None:
        """Attention to what was picked, and that the twin picks the same but for rounding."""
        requests, top_k, context = self.requests[0], self.sizes.top_k, self.pool.context
        output, picked = self.step(caches, requests), self.scratch.picked_BK
        expected = reference.sparse_decode(*self.attention_arguments(requests, picked, caches))
        compare("whole step", output, expected, self.tolerance)
        index = (requests.index_query, requests.gates, caches.index_key_SI, requests.table, requests.lengths)
        scores = reference.indexer_decode(*index, context, caches.index_scales_S, PAGE)
        best = reference.top_k_positions(scores, top_k, requests.lengths)
        for row, others in zip(picked, best, strict=True):
            share = float(torch.isin(row, others).float().mean())
            if share < MIN_OVERLAP:
                raise Disagreement(f"whole step: {share:.4f} of the picked keys are the twin's, {MIN_OVERLAP} are due")

    def dense(self) -> Peer:
        """Attention to all keys by torch's FlashAttention, which splits them over the GPU; its caches are not paged."""
        shape = (max(self.sizes.batches), self.pool.context, self.sizes.groups, self.sizes.width)
        key, value = (getattr(self.pool.caches["all bf16"], name).view(shape) for name in ("key_SGD", "value_SGD"))

        def attend(requests: Requests) -> Tensor:
            rows = slice(requests.first, requests.first + self.batch)
            lengths = (1, self.pool.context)
            arguments = (requests.query[:, None], key[rows], value[rows], None, None, *lengths, 0.0, False, False)
            return torch.ops.aten._flash_attention_forward(*arguments, scale=self.scale)[0]

        runs = [partial(attend, requests) for requests in self.requests]
        return self.report.peer("all keys by torch's flash", *runs, is_captured=True)


def run(report: Report, sizes: Sizes, device: str) -> None:
    """All contexts and batches."""
    for context in sizes.decode_contexts:
        pool = Pool(sizes, context, device)
        report.begin(f"Decode of {context} keys in a CUDA graph", is_microseconds=True)
        for batch in sizes.batches:
            Decode(report, pool, batch).run()
        del pool
        if device == "cuda":
            torch.cuda.empty_cache()
