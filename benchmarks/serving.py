"""The engine at full size: what a token costs by its position, dense and sparse, in prefill and in decoding.

    python -m benchmarks.serving [--experts e4m3] [--kv-cache e4m3] [--out FILE] [--json FILE] [--tiny]

The 30B shape with random weights and prompts that select as a trained model does (`benchmarks.random_model`), through the same
runner, pages and graphs that serve requests. Dense is the same engine with attention to all keys: cuDNN's or FlashAttention's
for prompts, and for decoding the paged kernel over all positions, whose rate is printed beside FlashAttention's.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import Ceilings, figure
from benchmarks.random_model import Unions, random_model, shape_30b, shape_tiny, text_prompt, topical_ids
from benchmarks.rehearsal import header
from openkeye.engine.batch import Batch, Segment
from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.decode import DecodeRows
from openkeye.engine.graphs import DecodeGraphs
from openkeye.engine.pages import with_cache_tokens
from openkeye.engine.request import Request
from openkeye.engine.runner import Runner
from openkeye.engine.sampler import sample_batch
from openkeye.engine.scheduler import Scheduler
from openkeye.kernels.dispatch import attend_in_pages
from openkeye.model.config import KeyeConfig

NOISE = 0.0
# Of embeddings. Tokens of a topic differ by their places alone then, and 16 neighbours choose about 8K keys at 128K.
DECODE_STEPS = 24
GREEDY = SamplingParameters(max_new_tokens=1)
# nobody ends these requests


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    chunk: int = 8192
    prompt_positions: tuple[int, ...] = (2048, 8192, 16384, 32768, 65536, 98304, 131072, 196608, 262144)
    # ends of chunks
    decode_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536, 98304, 131072, 262144)
    batches: tuple[int, ...] = (1, 8, 32)
    batch_length: int = 8192
    marks: tuple[int, ...] = (131072, 262144)


TINY_PLAN = Plan(32, (32, 64, 128), (32, 64, 128), (1, 2), 64, (64, 128))


@dataclass
class Results:
    """Everything that was measured, in milliseconds, tokens and bytes."""

    machine: str
    formats: str
    prefill_ms: dict[str, dict[int, float]] = field(default_factory=lambda: {"sparse": {}, "dense": {}})
    # a token, by the end of its chunk
    decode_ms: dict[str, dict[int, float]] = field(default_factory=lambda: {"sparse": {}, "dense": {}})
    # a token, by its position, at the batch that fills the memory
    decode_batch: dict[int, int] = field(default_factory=dict)
    shared_ms: dict[str, dict[int, float]] = field(default_factory=lambda: {"sparse": {}, "dense": {}})
    # the same where as many requests as may run ask about one prompt
    dense_tbps: dict[str, float] = field(default_factory=dict)
    # read by attention of one token a request to all keys at the first mark, by kernel
    worst_prefill_ms: float = 0.0
    worst_union: float = 0.0
    # of sparse prefill at the first mark where neighbours share nothing
    decode_floor: dict[int, float] = field(default_factory=dict)
    # sparse / dense by the bytes that a step must read, at the marks
    batch_ms: dict[int, float] = field(default_factory=dict)
    # a step, by the number of requests
    batch_bound_ms: dict[int, float] = field(default_factory=dict)
    fixed_ms: dict[int, float] = field(default_factory=dict)
    # a step of the batch-invariant mode
    unions: dict[int, float] = field(default_factory=dict)
    first_token_seconds: float = 0.0
    first_token_floor_seconds: float = 0.0
    longest: int = 0
    # tokens of the longest prompt
    extra_bytes: int = 0
    # peak of the longest prompt's prefill above weights and caches
    cache_tokens: int = 0
    memory_tbps: float = 0.0


class Bench:
    """The engine without a server: requests are made by hand."""

    def __init__(self, config: KeyeConfig, engine: EngineConfig, plan: Plan, device: str, noise: float) -> None:
        self.plan, self.model_config, self.device = plan, config, torch.device(device)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model = random_model(config, device, dtype, engine.experts == "e4m3", noise)
        self.engine = with_cache_tokens(engine, config, self.device, dtype, "sparse")
        self.runner = Runner(model, self.engine, "sparse")
        assert self.engine.cache_tokens is not None
        room = (self.engine.cache_tokens - self.engine.page_size) // plan.chunk * plan.chunk
        self.longest = min(max(plan.prompt_positions), room)
        self._graphs = {"sparse": self.runner.graphs}
        self.no_slots = torch.empty(0, dtype=torch.int64, device=self.device)

    def use(self, attention: str) -> None:
        """The same weights and pages with sparse or dense attention, or "fixed": sparse as the batch-invariant mode decodes."""
        is_fixed, kind = attention == "fixed", "sparse" if attention == "fixed" else attention
        if attention not in self._graphs:
            pages = (self.runner.caches, kind, self.engine.max_batch_requests, self.longest, is_fixed)
            self._graphs[attention] = DecodeGraphs(self.runner.model, *pages) if self.runner.graphs is not None else None
        self.runner.attention, self.runner.graphs = kind, self._graphs[attention]

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def request(self, ids_T: Tensor) -> Request:
        return Request(text_prompt(ids_T), GREEDY, frozenset())

    def prompt(self, num_tokens: int) -> "Prompt":
        return Prompt(self, num_tokens)

    def decoding(self, num_requests: int, length: int, is_shared: bool = False) -> list[Request]:
        """Requests whose sequences of `length` tokens lie in pages of their own; shared: in common but for the last two."""
        page_size = self.engine.page_size
        num_pages = -(-(length + DECODE_STEPS) // page_size)
        order = torch.randperm(self.runner.caches.num_slots // page_size, generator=torch.Generator().manual_seed(1)).tolist()
        num_own = 2 if is_shared else num_pages
        assert num_requests * num_own + (num_pages - num_own) <= len(order)
        common, order = order[: num_pages - num_own], order[num_pages - num_own :]
        made = []
        for number in range(num_requests):
            request = self.request(topical_ids(length - 1, self.model_config.vocab_size, seed=number))
            request.pages = common + order[number * num_own : (number + 1) * num_own]
            request.num_computed = length - 1
            request.output_ids = [number]
            made.append(request)
        return made

    def step(self, requests: Sequence[Request]) -> None:
        """One token of each, as `Engine.run_batch` takes them."""
        segments = [Segment(request, request.num_computed, 1, self.slots(request)) for request in requests]
        logits = self.runner.run(Batch(segments))
        tokens = sample_batch(logits, [r.sampling for r in requests], [r.generator for r in requests])
        for request, token in zip(requests, tokens, strict=True):
            request.num_computed += 1
            request.output_ids.append(token)

    def slots(self, request: Request) -> Tensor:
        """Of its tokens; a captured step asks for none."""
        if self.runner.graphs is not None:
            return self.no_slots
        page_size = self.engine.page_size
        places = torch.tensor(request.pages)[:, None] * page_size + torch.arange(page_size)
        return places.flatten()[: request.num_computed + 1].to(self.device)

    def decode_ms(self, num_requests: int, length: int, is_shared: bool = False) -> float:
        """Median milliseconds of a step."""
        requests = self.decoding(num_requests, length, is_shared)
        times = [self.seconds(lambda: self.step(requests)) for _ in range(DECODE_STEPS)]
        return 1e3 * sorted(times[4:])[len(times[4:]) // 2]


class Prompt:
    """One prompt, chunk by chunk."""

    def __init__(self, bench: Bench, num_tokens: int) -> None:
        self.bench = bench
        self.request = bench.request(topical_ids(num_tokens, bench.model_config.vocab_size))
        self.scheduler = Scheduler(bench.engine, bench.device)
        self.scheduler.add(self.request)

    def run_chunk(self) -> tuple[int, float]:
        """The end of the chunk, and seconds."""
        batch = self.scheduler.next_batch()
        seconds = self.bench.seconds(lambda: self.bench.runner.run(batch))
        self.request.num_computed += batch.num_tokens
        return self.request.num_computed, seconds

    def close(self) -> None:
        self.scheduler.clear()


def measure_prefill(bench: Bench, results: Results) -> None:
    """Sparse from the first token to the last, with its memory; dense at the plan's positions of the same prompt."""
    bench.use("sparse")
    warm = bench.prompt(min(2 * bench.plan.chunk, bench.longest))
    while warm.request.num_missing:
        warm.run_chunk()
    warm.close()
    prompt = bench.prompt(bench.longest)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    total = 0.0
    while prompt.request.num_missing:
        end, seconds = prompt.run_chunk()
        total += seconds
        if end in bench.plan.prompt_positions:
            results.prefill_ms["sparse"][end] = 1e3 * seconds / bench.plan.chunk
    results.first_token_seconds, results.longest = total, bench.longest
    results.first_token_floor_seconds = prompt_floor_seconds(bench)
    if bench.device.type == "cuda":
        results.extra_bytes = torch.cuda.max_memory_allocated() - before
    for position in bench.plan.marks:
        if position <= bench.longest:
            unions = Unions()
            bench.use("sparse")
            prompt.request.num_computed = position - bench.plan.chunk
            with unions.counted():
                prompt.run_chunk()
            results.unions[position] = unions.mean()
    bench.use("dense")
    for position in bench.plan.prompt_positions:
        if position <= bench.longest:
            times = []
            # cuDNN plans each new shape.
            for _ in range(2):
                prompt.request.num_computed = max(0, position - bench.plan.chunk)
                tokens = position - prompt.request.num_computed
                batch = Batch([prompt.scheduler._segment(prompt.request, tokens)])
                times.append(bench.seconds(lambda batch=batch: bench.runner.run(batch)))
            results.prefill_ms["dense"][position] = 1e3 * min(times) / tokens
    prompt.close()


def measure_decode(bench: Bench, results: Results) -> None:
    """By position at the batch that fills the memory there, and by batch at one length."""
    assert bench.engine.cache_tokens is not None
    for length in bench.plan.decode_lengths:
        room = bench.engine.cache_tokens // (length + bench.engine.page_size)
        num_requests = min(room, bench.engine.max_batch_requests)
        if num_requests < 1 or length > bench.longest:
            continue
        results.decode_batch[length] = num_requests
        if length in bench.plan.marks:
            results.decode_floor[length] = bytes_ratio(bench, num_requests, length)
        for attention in ("sparse", "dense"):
            bench.use(attention)
            results.decode_ms[attention][length] = bench.decode_ms(num_requests, length - DECODE_STEPS) / num_requests
    for length in bench.plan.marks:
        if length <= bench.longest:
            for attention in ("sparse", "dense"):
                bench.use(attention)
                room = (bench.engine.cache_tokens - length) // (2 * bench.engine.page_size)
                count = max(1, min(bench.engine.max_batch_requests, room))
                results.shared_ms[attention][length] = bench.decode_ms(count, length - DECODE_STEPS, is_shared=True) / count
    bench.use("sparse")
    for num_requests in bench.plan.batches:
        results.batch_ms[num_requests] = bench.decode_ms(num_requests, bench.plan.batch_length)
        results.batch_bound_ms[num_requests] = 1e3 * weight_bytes(bench, num_requests) / (results.memory_tbps * 1e12)
    bench.use("fixed")
    for num_requests in bench.plan.batches:
        results.fixed_ms[num_requests] = bench.decode_ms(num_requests, bench.plan.batch_length)


def measure_dense_rate(bench: Bench, results: Results) -> None:
    """That the peer is no straw man: bytes a second of paged attention to all keys, beside FlashAttention without pages."""
    length = min(bench.plan.marks[0], bench.longest) - DECODE_STEPS
    # Few enough for FlashAttention's copy to fit what is kept for work.
    count = min(2, results.decode_batch.get(bench.plan.marks[0], 1))
    bench.use("dense")
    if bench.device.type != "cuda":
        return
    from triton.testing import do_bench

    config, page_size = bench.model_config, bench.engine.page_size
    caches = bench.runner.caches.layer(0)
    table = torch.tensor([request.pages for request in bench.decoding(count, length)], dtype=torch.int32, device="cuda")
    lengths = torch.full((count,), length, dtype=torch.int32, device="cuda")
    rows = DecodeRows(lengths.long(), table, lengths)
    query = torch.randn(count, config.num_attention_heads, config.head_dim, device="cuda", dtype=bench.runner.dtype)
    everything = rows.positions(page_size)
    scale = config.head_dim**-0.5
    numbers = 2 * count * length * config.num_key_value_heads * config.head_dim
    paged = do_bench(lambda: attend_in_pages(query, caches, everything, table, scale), return_mode="median")
    results.dense_tbps["paged"] = 1e-9 * numbers * caches.key_SGD.element_size() / paged
    shape = (count, length, config.num_key_value_heads, config.head_dim)
    key, value = (torch.randn(shape, device="cuda", dtype=bench.runner.dtype) for _ in range(2))
    flash = do_bench(
        lambda: torch.ops.aten._flash_attention_forward(
            query[:, None], key, value, None, None, 1, length, 0.0, False, False, scale=scale
        ),
        return_mode="median",
    )
    results.dense_tbps["FlashAttention, bf16, not paged"] = 1e-9 * numbers * key.element_size() / flash


def measure_worst(bench: Bench, results: Results) -> None:
    """Sparse prefill where neighbours share nothing: embeddings that are all noise."""
    position = min(bench.plan.marks[0], bench.longest)
    weight = bench.runner.model.model.embed_tokens.weight
    weight.normal_()
    bench.use("sparse")
    prompt, unions = bench.prompt(position), Unions()
    while prompt.request.num_missing > bench.plan.chunk:
        prompt.run_chunk()
    with unions.counted():
        prompt.run_chunk()
    prompt.request.num_computed = position - bench.plan.chunk
    results.worst_prefill_ms, results.worst_union = 1e3 * prompt.run_chunk()[1] / bench.plan.chunk, unions.mean()
    prompt.close()


def weight_bytes(bench: Bench, num_tokens: int) -> float:
    """What one step must read of the weights: all but the experts, and of these what so many tokens pick, if at random."""
    config, model = bench.model_config, bench.runner.model
    share = 1.0 - (1.0 - config.num_experts_per_tok / config.num_experts) ** num_tokens
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    others = sum(p.nbytes for name, p in model.model.named_parameters() if ".experts." not in name and "embed" not in name)
    return share * experts + others + model.lm_head.weight.nbytes


def prompt_floor_seconds(bench: Bench) -> float:
    """Of a sparse prefill: products with weights, index scores, and attention to the picked keys, at the measured rates."""
    config, tokens, rates = bench.model_config, bench.longest, Ceilings()
    layers = bench.runner.model.model.layers
    others = sum(p.numel() for name, p in layers.named_parameters() if ".experts." not in name and p.dim() > 1)
    picked = 3 * config.hidden_size * config.moe_intermediate_size * config.num_experts_per_tok * config.num_hidden_layers
    scores = config.num_hidden_layers * config.indexer.num_heads * config.indexer.head_dim * tokens**2
    pairs = sum(min(position + 1, config.indexer.top_k) for position in range(tokens))
    attended = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    products = 2 * tokens * (others + picked) + attended
    return 1e-12 * (products / rates.bf16_tflops + scores / rates.fp8_tflops)


def bytes_ratio(bench: Bench, num_requests: int, length: int) -> float:
    """Sparse / dense of a step in which nothing took time but reading weights, keys and values, and index keys."""
    caches, top_k = bench.runner.caches, bench.model_config.indexer.top_k
    kinds = {"kv": (caches.keys, caches.values, caches.key_scales, caches.value_scales)}
    kinds["index"] = (caches.index_keys, caches.index_scales)
    token = {name: sum(x.nbytes for x in kind if x is not None) / caches.num_slots for name, kind in kinds.items()}
    weights = weight_bytes(bench, num_requests)
    sparse = num_requests * (length * token["index"] + min(length, top_k) * token["kv"])
    return (weights + sparse) / (weights + num_requests * length * token["kv"])


def memory_bandwidth(device: str) -> float:
    """TB/s of reading and writing a large tensor."""
    if device != "cuda":
        return 0.01
    source = torch.empty(2 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    from triton.testing import do_bench

    return 2 * source.nbytes / (do_bench(lambda: target.copy_(source), return_mode="median") * 1e-3) * 1e-12


def say(results: Results, plan: Plan) -> list[str]:
    """The tables."""
    ratio = {mode: {} for mode in ("prefill", "decode")}
    lines = [results.machine, "", results.formats, ""]
    for mode, costs in (("prefill", results.prefill_ms), ("decode", results.decode_ms)):
        lines += [f"### {mode}: milliseconds a token by position", ""]
        batch = ["batch"] if mode == "decode" else []
        lines.append("| position | " + " | ".join([*batch, "sparse", "dense", "sparse / dense"]) + " |")
        lines.append("|---|" + "---|" * (3 + len(batch)))
        for position, sparse in sorted(costs["sparse"].items()):
            if position not in costs["dense"]:
                continue
            dense = costs["dense"][position]
            ratio[mode][position] = sparse / dense
            cells = [f"{results.decode_batch[position]}"] if batch else []
            cells += [f"{sparse:.4f}", f"{dense:.4f}", f"{sparse / dense:.3f}"]
            lines.append(f"| {position} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        "### decode at 8K by batch",
        "",
        "| requests | ms a step | tokens/s | weights alone ms | share | batch-invariant ms |",
        "|---|---|---|---|---|---|",
    ]
    for count, milliseconds in results.batch_ms.items():
        bound = results.batch_bound_ms[count]
        rate = f"{1e3 * count / milliseconds:.0f}"
        cells = [
            str(count),
            figure(milliseconds),
            rate,
            figure(bound),
            f"{bound / milliseconds:.0%}",
            figure(results.fixed_ms[count]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "many questions about one prompt, sparse / dense: "
        + ", ".join(f"{ms / results.shared_ms['dense'][at]:.3f} at {at}" for at, ms in results.shared_ms["sparse"].items()),
        "bytes alone allow, contexts of their own: "
        + ", ".join(f"{share:.3f} at {at}" for at, share in results.decode_floor.items()),
        "attention to all keys in decoding: "
        + ", ".join(f"{name} {rate:.2f} TB/s" for name, rate in results.dense_tbps.items()),
        f"neighbours that share nothing: {results.worst_union:.0f} distinct keys, {results.worst_prefill_ms:.4f} ms a token",
        "distinct keys of 16 neighbours: " + ", ".join(f"{size:.0f} at {at}" for at, size in results.unions.items()),
        f"prompt of {results.longest} tokens: first token after {results.first_token_seconds:.2f} s "
        f"({results.first_token_floor_seconds / max(results.first_token_seconds, 1e-9):.0%} of the floor of "
        f"{results.first_token_floor_seconds:.2f} s), peak {results.extra_bytes / 2**30:.2f} GiB above weights and caches",
        f"{results.cache_tokens} tokens of cache; memory {results.memory_tbps:.2f} TB/s",
    ]
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", choices=("auto", "e4m3"), default="auto")
    parser.add_argument("--kv-cache", choices=("auto", "e4m3"), default="auto")
    parser.add_argument("--noise", type=float, default=NOISE, help="of the embeddings; large: neighbours share nothing")
    parser.add_argument("--tiny", action="store_true", help="a small shape on whatever device there is, to see that all runs")
    parser.add_argument("--out", type=Path, default=None, help="where the tables go too")
    parser.add_argument("--json", type=Path, default=None, help="where the numbers go, for the curves")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        print("the 30B shape needs a GPU; --tiny runs on a CPU", file=sys.stderr)
        return 2
    plan, config = (TINY_PLAN, shape_tiny()) if options.tiny else (Plan(), shape_30b())
    engine = EngineConfig(
        prefill_chunk_tokens=plan.chunk,
        experts=options.experts,
        kv_cache=options.kv_cache,
        cache_tokens=1024 if options.tiny else None,
    )
    results = Results(
        header() if device == "cuda" else "CPU",
        f"experts {options.experts}, keys and values {options.kv_cache}, index keys {engine.index_cache}; "
        f"noise {options.noise}",
        memory_tbps=memory_bandwidth(device),
    )
    bench = Bench(config, engine, plan, device, options.noise)
    results.cache_tokens = bench.engine.cache_tokens or 0
    measure_prefill(bench, results)
    measure_decode(bench, results)
    measure_dense_rate(bench, results)
    measure_worst(bench, results)
    lines = say(results, plan)
    print("\n".join(lines))
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n")
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(results), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
