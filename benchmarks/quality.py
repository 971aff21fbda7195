"""How well selection in fp8 and bf16 picks what float32 scores pick, and that selection is exact given the scores."""

import torch
from torch import Tensor

from benchmarks.inputs import Shape, Sizes, draw
from benchmarks.measure import FAILURES, Report, must_equal
from openkeye.kernels import reference
from openkeye.kernels.indexer_select import indexer_select
from openkeye.kernels.quantize import quantize_vectors

GOAL = 0.98
ROWS = 32
# queries whose float32 scores stand in memory at a time
NUM_TOPICS = 12


def gaussian(shape: Shape, sizes: Sizes, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, gates and keys without any structure."""
    query = draw(device, torch.float32, shape.num_queries, sizes.index_heads, sizes.index_width, seed=1)
    gates = draw(device, torch.float32, shape.num_queries, sizes.index_heads, seed=2) * sizes.index_width**-0.5
    return query, gates, draw(device, torch.float32, shape.num_keys, sizes.index_width, seed=3)


def structured(shape: Shape, sizes: Sizes, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of a dozen topics and of unlike lengths, two loud dimensions, a needle among a thousand; few loud gates.

    Scores have outliers far above the rest. Queries and keys are turned by `hadamard`, as the model does before it rounds.
    """
    query, gates, key = gaussian(shape, sizes, device)
    topics = draw(device, torch.float32, NUM_TOPICS, sizes.index_width, seed=4)
    generator = torch.Generator(device).manual_seed(5)
    lengths = draw(device, torch.float32, shape.num_keys, 1, seed=6).mul(0.5).exp()
    key = 0.5 * key + topics[torch.randint(NUM_TOPICS, (shape.num_keys,), generator=generator, device=device)]
    key *= torch.where(torch.rand(shape.num_keys, 1, generator=generator, device=device) < 1e-3, 6.0, 1.0) * lengths
    its_topics = torch.randint(NUM_TOPICS, query.shape[:2], generator=generator, device=device)
    query = query + topics[its_topics]
    loud = torch.ones(sizes.index_width, device=device)
    loud[[3, 17]] = 8.0
    return reference.hadamard(query * loud), gates * gates.abs().mul(4).exp(), reference.hadamard(key * loud)


def whole_numbers(shape: Shape, sizes: Sizes, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Small whole numbers: every product and sum is exact in whatever order, and many scores are equal."""
    query, gates, key = gaussian(shape, sizes, device)
    return query.round().clamp(-3, 3), gates.mul(8).round().clamp(-4, 4) / 4, key.round().clamp(-3, 3)


def select(tensors: tuple[Tensor, Tensor, Tensor], positions_T: Tensor, top_k: int, is_fp8: bool) -> Tensor:
    """Of the tensors in bf16, or in e4m3 where the keys are."""
    query, gates, key = tensors
    half = torch.bfloat16 if query.is_cuda else torch.float32
    if not is_fp8:
        return indexer_select(query.to(half), gates, key.to(half), top_k, positions_T)
    codes, scales = quantize_vectors(key.to(half))
    return indexer_select(query.to(half), gates, codes, top_k, positions_T, key_scales_S=scales)


def best(tensors: tuple[Tensor, Tensor, Tensor], positions_T: Tensor, top_k: int) -> Tensor:
    """By scores in float32."""
    query, gates, key = tensors
    picked = []
    for start in range(0, query.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        scores = reference.index_scores(query[rows], gates[rows], key)
        picked.append(reference.top_k_positions(scores, top_k, positions_T[rows] + 1))
    return torch.cat(picked)


def shares(picked_TK: Tensor, best_TK: Tensor, num_keys: int) -> Tensor:
    """[T]: how much of each row's best was picked."""
    is_picked = torch.zeros(picked_TK.shape[0], num_keys, dtype=torch.bool, device=picked_TK.device)
    is_picked.scatter_(1, picked_TK.clamp_min(0).long(), True)
    return is_picked.gather(1, best_TK.clamp_min(0).long()).float().mean(dim=1)


def exactness(report: Report, shape: Shape, sizes: Sizes) -> None:
    """Equal to the twin in every position, ties too, where rounding changes no score."""
    positions = shape.positions.to(report.device)
    tensors = whole_numbers(shape, sizes, report.device)
    for is_fp8 in (True, False):
        name = f"indexer_select, {'fp8' if is_fp8 else 'bf16'}, exact given the scores"
        try:
            picked = select(tensors, positions, shape.top_k, is_fp8)
            must_equal(name, picked, best(tensors, positions, shape.top_k))
        except FAILURES as error:
            report.fail(name, error)
            continue
        report.say(f"- {name}: {shape.num_queries} of {shape.num_queries} rows equal the twin's in every position, ties too")


def run(report: Report, sizes: Sizes, device: str) -> None:
    """One table of shares, then exactness."""
    if report.mode == "rehearse":
        return
    shape = Shape(sizes.quality_context, sizes.quality_rows, sizes.top_k)
    positions = shape.positions.to(device)
    report.say(
        f"\n### Quality of selection, {shape.num_queries} queries at the end of {shape.num_keys} keys, k {shape.top_k}\n"
    )
    report.say("Share of the k best by float32 scores of the same bf16 queries and keys that is picked:\n")
    report.say("| inputs | dtype | mean | worst row | goal of the mean |\n|---|---|---|---|---|")
    for name, make in (("normal numbers", gaussian), ("topics and outliers", structured)):
        tensors = make(shape, sizes, device)
        # The model's queries and keys are bf16: what that rounds is not the selection's loss.
        query, gates, key = tensors
        rounded = (query.bfloat16().float(), gates, key.bfloat16().float())
        expected = best(rounded, positions, shape.top_k)
        for is_fp8 in (True, False):
            try:
                found = shares(select(rounded, positions, shape.top_k, is_fp8), expected, shape.num_keys)
            except FAILURES as error:
                report.fail(f"quality, {name}", error)
                continue
            mean, worst = float(found.mean()), float(found.min())
            word = "met" if mean >= GOAL else "MISSED"
            dtype = "fp8" if is_fp8 else "bf16"
            report.say(f"| {name} | {dtype} | {mean:.2%} | {worst:.2%} | at least {GOAL:.0%}: {word} |")
    report.say("")
    exactness(report, shape, sizes)
    if device == "cuda":
        torch.cuda.empty_cache()
