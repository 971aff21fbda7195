"""Prefill: the last queries of a context select their keys and attend to them, beside dense attention."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.inputs import Sizes, pooled_lists, uniform_lists
from benchmarks.measure import Case, Peer, Report, Work, compare, compare_all, must_equal
from benchmarks.selection import make_inputs, scratch_lines, select, select_cases, select_work, top_k_cases
from openkeye.kernels import reference
from openkeye.kernels.dense_attention import dense_attention
from openkeye.kernels.sparse_attention import Call, attend_alone, sparse_attention, sparse_attention_with_lse
from openkeye.kernels.unions import TILE, Unions, build_unions

SELECT_AND_ATTEND_GOALS = {32768: 3.3, 131072: 6.0, 262144: 10.0}
UNIFORM_CONTEXT = 131072


class Prefill:
    """All cases of one context."""

    def __init__(self, report: Report, sizes: Sizes, num_keys: int, device: str) -> None:
        self.report, self.inputs = report, make_inputs(sizes, num_keys, device)
        self.shape = self.inputs.shape
        self.name = self.shape.name

    def run(self) -> None:
        """One table."""
        report, shape = self.report, self.shape
        report.begin(f"Prefill, the last {shape.num_queries} queries of {shape.num_keys} keys, k {shape.top_k}")
        dense = self.dense()
        select_cases(report, self.inputs)
        top_k_cases(report, self.inputs)
        lists = pooled_lists(shape, report.device)
        unions = build_unions(lists, shape.num_keys)
        keys = float(unions.counts_N.sum())
        self.unions(lists, unions, keys)
        self.attention(lists, unions, keys, dense)
        self.together(lists, keys, dense)
        if shape.num_keys == UNIFORM_CONTEXT or report.mode == "rehearse":
            self.uniform()
        scratch_lines(report, self.inputs)

    def dense(self) -> dict[str, Peer]:
        """Dense attention of the same queries, by back end: what the others are compared with."""
        inputs, rows = self.inputs, self.inputs.rows[:4]
        flops = 4 * inputs.query[0].numel() * self.shape.causal_pairs
        size = self.shape.num_keys - self.shape.num_queries
        batch = [x.transpose(0, 1)[None] for x in (inputs.query, inputs.key, inputs.value)]

        def by_torch() -> None:
            query, key, value = batch
            attend = torch.nn.functional.scaled_dot_product_attention
            attend(query, key[:, :, :size], value[:, :, :size], enable_gqa=True)
            attend(query, key[:, :, size:], value[:, :, size:], is_causal=True, enable_gqa=True)

        own = self.report.peer("SDPA's own choice, two calls, not merged", by_torch)
        peers = {name: Peer(f"dense by {name}") for name in ("cudnn", "flash")}
        for name in ("cudnn", "flash") if self.report.device == "cuda" else ("reference",):

            def attend(name: str = name) -> Tensor:
                return dense_attention(
                    inputs.query, inputs.key, inputs.value, inputs.positions, inputs.scale, None, back_end=name
                )

            def check(attend: Callable[[], Tensor] = attend) -> None:
                arguments = (inputs.query[rows], inputs.key, inputs.value, inputs.positions[rows], inputs.scale)
                compare("dense_attention", attend()[rows], reference.dense_attention(*arguments), inputs.tolerance)

            case = Case(f"dense_attention, {name}", self.name, (attend,), check, Work(flops=flops), peer=own)
            milliseconds = self.report.case(case)
            if milliseconds is not None:
                peers[name] = Peer(f"dense by {name}", milliseconds)
        return peers

    def unions(self, lists: Tensor, unions: Unions, keys: float) -> None:
        """Unions of the pooled lists."""

        def check() -> None:
            made = build_unions(lists, self.shape.num_keys)
            for tile in range(0, made.counts_N.shape[0], max(1, made.counts_N.shape[0] // 16)):
                rows = lists[tile * TILE : (tile + 1) * TILE]
                distinct = rows.unique()
                count = int(made.counts_N[tile])
                bits = sum((torch.isin(distinct, row).int() << bit for bit, row in enumerate(rows)), torch.zeros_like(distinct))
                must_equal("build_unions", made.counts_N[tile], torch.tensor(len(distinct), device=lists.device).int())
                must_equal("build_unions", made.keys_NU[tile, :count], distinct)
                must_equal("build_unions", made.masks_NU[tile, :count], bits)

        for is_triton in (False, True):
            case = Case(
                "build_unions" + (", Triton" if is_triton else ""),
                f"{self.name}, {keys / unions.counts_N.shape[0]:.0f} keys a union",
                (lambda: build_unions(lists, self.shape.num_keys),),
                check,
                Work(memory_bytes=4 * lists.numel() + 8 * keys),
                is_triton=is_triton,
            )
            self.report.case(case)

    def attention_work(self, keys: float) -> Work:
        """Products for all 16 queries of a tile with every key of its union, which are read once a tile and KV head."""
        heads, width = self.inputs.query.shape[1:]
        return Work(
            flops=4 * width * heads * TILE * keys,
            l2_bytes=2 * self.inputs.key[0].numel() * self.inputs.key.element_size() * keys,
        )

    def attention(self, lists: Tensor, unions: Unions, keys: float, dense: dict[str, Peer]) -> None:
        """Attention to the pooled lists, their unions at hand."""
        inputs = self.inputs
        arguments = (inputs.query, inputs.key, inputs.value, lists, inputs.scale, unions)
        for is_triton in (False, True):
            case = Case(
                "sparse_attention" + (", Triton" if is_triton else ""),
                f"{self.name}, {keys / unions.counts_N.shape[0]:.0f} keys a union",
                (lambda: sparse_attention(*arguments),),
                lambda: self.check_attention(sparse_attention_with_lse(*arguments), lists),
                self.attention_work(keys),
                peer=dense["flash" if is_triton else "cudnn"],
                is_triton=is_triton,
            )
            self.report.case(case)

    def check_attention(self, made: tuple[Tensor, Tensor], lists: Tensor) -> None:
        """Sampled rows, and their log-sum-exps."""
        inputs, rows = self.inputs, self.inputs.rows
        twin = reference.sparse_attention(inputs.query[rows], inputs.key, inputs.value, lists[rows], inputs.scale)
        keys = inputs.key.float()[lists[rows].long()]
        grouped = inputs.query[rows].float().unflatten(1, (keys.shape[2], -1))
        lse = (torch.einsum("tgrd,tkgd->tgrk", grouped, keys) * inputs.scale).logsumexp(dim=3).flatten(1)
        compare_all("sparse_attention", [("output", made[0][rows], twin), ("lse", made[1][rows], lse)], inputs.tolerance)

    def together(self, lists: Tensor, keys: float, dense: dict[str, Peer]) -> None:
        """Selection, unions and attention one after the other: what the goals are set for."""
        inputs, attention = self.inputs, self.attention_work(keys)

        def select_and_attend(is_fp8: bool) -> Tensor:
            select(inputs, is_fp8)
            # Random indexers choose alike for no two neighbours: attention takes lists as trained ones choose them.
            return sparse_attention(inputs.query, inputs.key, inputs.value, lists, inputs.scale)

        def check(is_fp8: bool) -> None:
            lse = sparse_attention_with_lse(inputs.query, inputs.key, inputs.value, lists, inputs.scale)[1]
            self.check_attention((select_and_attend(is_fp8), lse), lists)

        for is_fp8, is_triton in ((True, False), (True, True), (False, True)):
            index = select_work(inputs, is_fp8)
            case = Case(
                f"select + attend, {'fp8' if is_fp8 else 'bf16'}{', Triton' if is_triton else ''}",
                self.name,
                (partial(select_and_attend, is_fp8),),
                partial(check, is_fp8),
                Work(flops=attention.flops + index.flops, fp8_flops=index.fp8_flops),
                # One after the other: the floors add up.
                index.floor(self.report.ceilings) + attention.floor(self.report.ceilings),
                dense["flash" if is_triton else "cudnn"],
                None if is_triton else SELECT_AND_ATTEND_GOALS.get(self.shape.num_keys),
                is_triton=is_triton,
            )
            self.report.case(case)

    def uniform(self) -> None:
        """Lists that have nothing in common, beside the kernel that gathers query by query."""
        inputs, lists = self.inputs, uniform_lists(self.shape, self.report.device)
        unions = build_unions(lists, self.shape.num_keys)
        arguments = (inputs.query, inputs.key, inputs.value, lists, inputs.scale, unions)
        output, lse = sparse_attention_with_lse(*arguments)
        call = Call(*arguments[:4], unions, None, 64, None, inputs.scale * math.log2(math.e), output, lse)
        alone = self.report.peer("query by query, Triton", lambda: attend_alone(call, 0.0))
        gathered = 2 * inputs.key[0].numel() * inputs.key.element_size() * lists.numel()
        for is_triton in (False, True):
            case = Case(
                "sparse_attention" + (", Triton" if is_triton else ""),
                f"{self.name}, nothing shared, {float(unions.counts_N.float().mean()):.0f} keys a union",
                (lambda: sparse_attention(*arguments),),
                lambda: self.check_attention(sparse_attention_with_lse(*arguments), lists),
                Work(l2_bytes=gathered),
                # What is read again and again may come from closer than the L2.
                0.0,
                peer=alone,
                is_triton=is_triton,
            )
            self.report.case(case)


def run(report: Report, sizes: Sizes, device: str) -> None:
    """All contexts."""
    for num_keys in sizes.contexts:
        Prefill(report, sizes, num_keys, device).run()
        if device == "cuda":
            torch.cuda.empty_cache()
