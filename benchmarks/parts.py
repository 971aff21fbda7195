"""What stands around attention: experts, and norms with rotary turns and cache writes."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inputs import Sizes, draw
from benchmarks.measure import Case, Peer, Report, Work, compare, compare_all
from openkeye.kernels import norm_rotary as fused
from openkeye.kernels import reference
from openkeye.kernels.experts import experts, quantize_expert_weights

ROTATED_SETS = 8
# of tokens, whose experts differ: the L2 holds none of the next one's weights
MANY_TOKENS = 1024
# from here on a call is timed alone and not inside a graph
EPS = 1e-6


def grouped_experts(x_TD: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """See `reference.experts`: by torch's grouped product of rows sorted by expert."""
    flat = expert_ids_TK.flatten()
    order = flat.argsort(stable=True)
    ends = (flat[:, None] <= torch.arange(gate_up_EDF.shape[0], device=flat.device)).sum(dim=0).int()
    gate, up = torch._grouped_mm(x_TD[order // expert_ids_TK.shape[1]], gate_up_EDF, offs=ends).chunk(2, dim=-1)
    out = torch._grouped_mm(F.silu(gate) * up, down_EFD, offs=ends)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    picked = out[back].unflatten(0, expert_ids_TK.shape)
    return (picked.float() * weights_TK[..., None].float()).sum(dim=1).to(x_TD.dtype)


class Experts:
    """The mixture of experts, beside torch's grouped products."""

    def __init__(self, report: Report, sizes: Sizes) -> None:
        self.report, self.sizes, self.device = report, sizes, report.device
        self.dtype = torch.bfloat16 if report.device == "cuda" else torch.float32
        depth, width = sizes.model_width, sizes.expert_width
        gate_up = draw(self.device, self.dtype, sizes.num_experts, depth, 2 * width, seed=1) * depth**-0.5
        down = draw(self.device, self.dtype, sizes.num_experts, width, depth, seed=2) * width**-0.5
        self.weights = (gate_up, down)
        quantized = [quantize_expert_weights(weight) for weight in self.weights]
        self.codes, self.scales = tuple(pair[0] for pair in quantized), tuple(pair[1] for pair in quantized)
        self.expert_size = 3 * depth * width

    def tokens(self, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, their experts' weights, and which experts."""
        scores = draw(self.device, torch.float32, count, self.sizes.num_experts, seed=seed)
        picked = scores.topk(self.sizes.num_picked, dim=1)
        x = draw(self.device, self.dtype, count, self.sizes.model_width, seed=seed + 1)
        return x, picked.values.softmax(dim=1).to(self.dtype), picked.indices

    def answer(self, is_fp8: bool, tokens: tuple[Tensor, Tensor, Tensor], operation: Callable[..., Tensor] = experts) -> Tensor:
        x, weights, ids = tokens
        with torch.no_grad():
            if is_fp8:
                return operation(x, *self.codes, weights, ids, *self.scales)
            return operation(x, *self.weights, weights, ids)

    def forward_cases(self, count: int) -> None:
        """In bf16 and with fp8 weights."""
        is_captured = count < MANY_TOKENS and self.device == "cuda"
        sets = [self.tokens(count, 100 * number) for number in range(ROTATED_SETS if is_captured else 1)]
        plain = partial(self.answer, False)
        peer = self.report.peer(
            "torch._grouped_mm in bf16",
            *(partial(plain, tokens, grouped_experts) for tokens in sets),
            is_captured=is_captured,
        )
        num_used = sum(tokens[2].unique().numel() for tokens in sets) / len(sets)
        for is_fp8 in (False, True):

            def check(is_fp8: bool = is_fp8) -> None:
                x, weights, ids = sets[0]
                expected = self.answer(is_fp8, (x.float(), weights.float(), ids), reference.experts)
                compare("experts", self.answer(is_fp8, sets[0]), expected, 8e-3 if self.device == "cuda" else 1e-4)

            work = Work(
                # Products are in bf16 whatever the weights are.
                flops=2 * count * self.sizes.num_picked * self.expert_size,
                memory_bytes=num_used * self.expert_size * (1 if is_fp8 else self.weights[0].element_size()),
            )
            # Few tokens are bound by the weights that they read.
            floor = work.floor(self.report.ceilings)
            by_bytes = Work(memory_bytes=work.memory_bytes)
            shown = by_bytes if by_bytes.floor(self.report.ceilings) == floor else work
            case = Case(
                f"experts, forward, {'fp8 weights' if is_fp8 else 'bf16'}",
                f"{count} tokens",
                tuple(partial(self.answer, is_fp8, tokens) for tokens in sets),
                check,
                shown,
                floor,
                peer,
                is_captured=is_captured,
            )
            self.report.case(case)

    def learn(self, tokens: tuple[Tensor, Tensor, Tensor], gradient: Tensor, operation: Callable[..., Tensor]) -> list[Tensor]:
        """Forward, then gradients of the tokens, both projections and the experts' weights."""
        x, weights, ids = tokens
        leaves = [leaf.detach().requires_grad_() for leaf in (x, *self.weights, weights)]
        return list(torch.autograd.grad(operation(*leaves, ids), leaves, gradient))

    def learning_case(self) -> None:
        """Forward and backward of all tokens."""
        count = self.sizes.num_tokens
        tokens = self.tokens(count, 7)
        gradient = draw(self.device, self.dtype, count, self.sizes.model_width, seed=9)

        def check() -> None:
            mine = self.learn(tokens, gradient, experts)
            x, weights, ids = tokens
            leaves = [leaf.detach().float().requires_grad_() for leaf in (x, *self.weights, weights)]
            expected = torch.autograd.grad(reference.experts(*leaves, ids), leaves, gradient.float())
            names = ("d tokens", "d gate_up", "d down", "d weights")
            tolerance = 2e-2 if self.device == "cuda" else 1e-4
            compare_all("experts", list(zip(names, mine, expected, strict=True)), tolerance)

        case = Case(
            "experts, forward + backward",
            f"{count} tokens",
            (partial(self.learn, tokens, gradient, experts),),
            check,
            Work(flops=6 * count * self.sizes.num_picked * self.expert_size),
            peer=self.report.peer("torch._grouped_mm", partial(self.learn, tokens, gradient, grouped_experts)),
        )
        self.report.case(case)


class Norms:
    """Norms, rotary turns and cache writes in one pass, beside the same in plain steps."""

    def __init__(self, report: Report, sizes: Sizes, count: int) -> None:
        self.report, self.count, self.device = report, count, report.device
        self.dtype = torch.bfloat16 if report.device == "cuda" else torch.float32
        dtype, device = self.dtype, self.device
        heads, groups, width = sizes.heads, sizes.groups, sizes.width
        joint = draw(device, dtype, count, (heads + 2 * groups) * width, seed=1)
        weights = [1 + 0.2 * draw(device, dtype, width, seed=seed) for seed in (2, 3)]
        self.attention = (*joint.split([heads * width, groups * width, groups * width], dim=1), *weights, *self.tables(width))
        index_width = sizes.index_width
        sizes_of_index = [sizes.index_heads * (index_width + 1), index_width]
        index = draw(device, dtype, count, sum(sizes_of_index), seed=4).split(sizes_of_index, dim=1)
        index_weights = [draw(device, dtype, index_width, seed=seed) for seed in (5, 6, 7)]
        self.index = (*index, *index_weights, *self.tables(index_width))
        num_slots = max(count, 4096 if device == "cuda" else 64) + 64
        self.slots = torch.randperm(num_slots, generator=torch.Generator(device).manual_seed(8), device=device)[:count]
        self.caches = [torch.zeros(num_slots, groups, width, dtype=dtype, device=device) for _ in range(2)]
        self.index_cache = torch.zeros(num_slots, index_width, dtype=dtype, device=device)
        self.codes = torch.zeros(num_slots, index_width, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        self.scales = torch.ones(num_slots, device=device)

    def tables(self, width: int) -> tuple[Tensor, Tensor]:
        angles = torch.arange(self.count, device=self.device)[:, None] * 10000.0 ** (
            -torch.arange(width // 2, device=self.device) / (width // 2)
        )
        both = torch.cat([angles, angles], dim=1)
        return both.cos(), both.sin()

    def write(self) -> Tensor:
        return fused.norm_rotary_write(*self.attention, EPS, self.slots, *self.caches)

    def plain_write(self) -> Tensor:
        query, key, value, *rest = self.attention
        normed, keys = reference.norm_rotary(query, key, *rest, EPS)
        for cache, x in zip(self.caches, (keys, value.unflatten(1, keys.shape[1:])), strict=True):
            cache.index_copy_(0, self.slots, x)
        return normed

    def index_write(self, is_fp8: bool) -> tuple[Tensor, ...]:
        caches = (self.codes, self.scales) if is_fp8 else (self.index_cache,)
        return fused.index_norm_rotary_write(*self.index, EPS, self.slots, *caches)

    def plain_index_write(self, is_fp8: bool) -> tuple[Tensor, ...]:
        query, gates, key = reference.index_norm_rotary(*self.index, EPS)
        if not is_fp8:
            self.index_cache.index_copy_(0, self.slots, key)
            return query, gates
        (codes, query_scales), (key_codes, key_scales) = (reference.quantize_vectors(x) for x in (query, key))
        self.codes.view(torch.uint8).index_copy_(0, self.slots, key_codes.view(torch.uint8))
        self.scales.index_copy_(0, self.slots, key_scales)
        return codes, gates * query_scales

    def check(self) -> None:
        results = []
        for work in (self.write, self.plain_write):
            for cache in self.caches:
                cache.zero_()
            results.append((work(), torch.stack(self.caches)))
        pairs = [(name, *both) for name, *both in zip(("query", "caches"), *results, strict=True)]
        compare_all("norm_rotary_write", pairs, 5e-3)

    def check_index(self, is_fp8: bool) -> None:
        """Codes are compared as the numbers that they and their scales stand for."""
        results = []
        for work in (self.index_write, self.plain_index_write):
            for cache in (self.index_cache, self.codes.view(torch.uint8), self.scales):
                cache.zero_()
            query, gates = work(is_fp8)
            keys = self.codes.float() * self.scales[:, None] if is_fp8 else self.index_cache.clone()
            results.append((query.float() * gates[..., None], keys))
        pairs = [(name, *both) for name, *both in zip(("query", "cache"), *results, strict=True)]
        compare_all("index_norm_rotary_write", pairs, 5e-3)

    def cases(self) -> None:
        is_captured = self.count < MANY_TOKENS and self.device == "cuda"
        query, key = self.attention[0], self.attention[1]
        size = query.element_size()
        moved = 2 * size * (query.numel() + 2 * key.numel()) + 8 * self.attention[-1].numel()
        index_elements, index_tables = self.index[0].numel() + self.index[1].numel(), 8 * self.index[-1].numel()
        rows: list[tuple[str, Callable[[], object], Callable[[], None], float, Callable[[], object]]] = [
            ("norm_rotary_write", self.write, self.check, moved, self.plain_write),
        ]
        for is_fp8 in (False, True):
            written = index_elements if is_fp8 else size * index_elements
            work, check, plain = (
                partial(method, is_fp8) for method in (self.index_write, self.check_index, self.plain_index_write)
            )
            name = f"index_norm_rotary_write, {'fp8' if is_fp8 else 'bf16'}"
            rows.append((name, work, check, size * index_elements + written + index_tables, plain))
        for name, work, check, num_bytes, plain in rows:
            peer: Peer = self.report.peer("plain steps in torch", plain, is_captured=is_captured)
            work_of = Work(memory_bytes=num_bytes)
            shape = f"{self.count} token{'s' if self.count > 1 else ''}"
            self.report.case(Case(name, shape, (work,), check, work_of, peer=peer, is_captured=is_captured))


def run(report: Report, sizes: Sizes, device: str) -> None:
    """Two tables."""
    report.begin("Experts", is_microseconds=True)
    part = Experts(report, sizes)
    for count in (*sizes.few_tokens, sizes.num_tokens):
        part.forward_cases(count)
    part.learning_case()
    del part
    report.begin("Norms, rotary turns and cache writes", is_microseconds=True)
    for count in (1, sizes.num_tokens):
        Norms(report, sizes, count).cases()
    if device == "cuda":
        torch.cuda.empty_cache()
