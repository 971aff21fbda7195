"""Selection for prefill: keys scored and picked in one operation, and picked from scores that lie in memory."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.inputs import Shape, Sizes, draw
from benchmarks.measure import FAILURES, Case, Disagreement, Peer, Report, Work, must_equal
from openkeye.kernels import reference
from openkeye.kernels.indexer_select import indexer_select
from openkeye.kernels.quantize import quantize_vectors
from openkeye.kernels.top_k import top_k_positions

SLAB_BYTES = 256 << 20
MATRIX_BYTES = 6 << 30
# of scores in one piece: 8,192 rows of 128K keys, and not 256K
TOP_K_GOALS = {131072: 3.0}
SCRATCH_MIB = 1024
SCORE_TOLERANCE, MAX_OTHER_KEYS = 5e-3, 0.01
# Products are summed in another order than the twin's: keys whose scores lie this close to the k-th (in standard deviations of
# the row) may be taken for each other, in at most this share of a list.


@dataclass(frozen=True)
class Inputs:
    """One context's tensors."""

    shape: Shape
    query: Tensor
    key: Tensor
    value: Tensor
    index_query: Tensor
    gates: Tensor
    index_key: Tensor
    index_codes: Tensor
    index_scales: Tensor
    positions: Tensor
    rows: Tensor
    # which queries are compared with the twins
    tolerance: float

    @property
    def scale(self) -> float:
        return self.query.shape[2] ** -0.5


def make_inputs(sizes: Sizes, num_keys: int, device: str, num_queries: int | None = None) -> Inputs:
    """Random tensors of the last num_queries of a context; None: as many as the sizes say, up to half of it."""
    shape = Shape(num_keys, num_queries or min(sizes.num_queries, num_keys // 2), sizes.top_k)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    index_key = draw(device, dtype, num_keys, sizes.index_width, seed=6)
    return Inputs(
        shape,
        draw(device, dtype, shape.num_queries, sizes.heads, sizes.width, seed=1),
        draw(device, dtype, num_keys, sizes.groups, sizes.width, seed=2),
        draw(device, dtype, num_keys, sizes.groups, sizes.width, seed=3),
        draw(device, dtype, shape.num_queries, sizes.index_heads, sizes.index_width, seed=4),
        draw(device, torch.float32, shape.num_queries, sizes.index_heads, seed=5) * sizes.index_width**-0.5,
        index_key,
        *quantize_vectors(index_key),
        shape.positions.to(device),
        torch.linspace(0, shape.num_queries - 1, sizes.num_checked, device=device).long(),
        1e-2 if device == "cuda" else 1e-4,
    )


def check_selection(name: str, picked_TK: Tensor, scores_TS: Tensor, positions_T: Tensor) -> None:
    """The k best of the twin's scores, but for keys whose scores are within rounding of the k-th; ascending, none twice."""
    top_k = picked_TK.shape[1]
    expected = reference.top_k_positions(scores_TS, top_k, positions_T + 1)
    for row in (picked_TK != expected).any(dim=1).nonzero().flatten().tolist():
        picked, best = picked_TK[row].long(), expected[row].long()
        if not bool(((picked[1:] > picked[:-1]).all() & (picked[0] >= 0) & (picked[-1] <= positions_T[row])).item()):
            raise Disagreement(f"{name}: row {row} is not ascending positions before its query")
        scores = scores_TS[row, : int(positions_T[row]) + 1]
        others = torch.cat([picked[~torch.isin(picked, best)], best[~torch.isin(best, picked)]])
        distance = float((scores[others] - scores[best].min()).abs().max() / scores.std())
        if distance > SCORE_TOLERANCE or others.numel() > max(2.0, 2 * MAX_OTHER_KEYS * top_k):
            raise Disagreement(
                f"{name}: row {row} picks {others.numel() // 2} of {top_k} keys otherwise than the plain twin, up to "
                f"{distance:.1e} standard deviations from the k-th score"
            )


def select(inputs: Inputs, is_fp8: bool) -> Tensor:
    """The operation as users call it: queries in bf16."""
    keys, scales = (inputs.index_codes, inputs.index_scales) if is_fp8 else (inputs.index_key, None)
    return indexer_select(inputs.index_query, inputs.gates, keys, inputs.shape.top_k, inputs.positions, key_scales_S=scales)


def select_work(inputs: Inputs, is_fp8: bool) -> Work:
    flops = 2 * inputs.index_query[0].numel() * inputs.shape.causal_pairs
    return Work(fp8_flops=flops) if is_fp8 else Work(flops=flops)


def select_cases(report: Report, inputs: Inputs) -> None:
    """In fp8 and bf16, as it is and in Triton, beside torch's products and topk."""
    rows, peer = inputs.rows, torch_selection(report, inputs)
    for is_fp8, is_triton in ((True, False), (False, False), (True, True), (False, True)):

        def check(is_fp8: bool = is_fp8) -> None:
            keys, scales = (inputs.index_codes, inputs.index_scales) if is_fp8 else (inputs.index_key, None)
            scores = reference.index_scores(inputs.index_query[rows], inputs.gates[rows], keys, scales)
            check_selection("indexer_select", select(inputs, is_fp8)[rows], scores, inputs.positions[rows])

        case = Case(
            f"indexer_select, {'fp8' if is_fp8 else 'bf16'}{', Triton' if is_triton else ''}",
            inputs.shape.name,
            (partial(select, inputs, is_fp8),),
            check,
            select_work(inputs, is_fp8),
            peer=peer,
            is_triton=is_triton,
        )
        report.case(case)


def torch_selection(report: Report, inputs: Inputs) -> Peer:
    """torch's product of the same pairs in bf16 and its topk, without ReLU, gates and sum, of a slab of queries."""
    shape = inputs.shape
    part = slice(0, min(slab_rows(shape), 256))
    scores = torch.empty(part.stop, shape.num_keys, device=report.device).normal_()
    query = inputs.index_query[part].flatten(0, 1)

    def work() -> None:
        query @ inputs.index_key.t()
        scores.topk(min(shape.top_k, scores.shape[1]), dim=-1)

    return report.peer(f"torch.mm and topk of {part.stop} rows, scaled", work, scale=shape.num_queries / part.stop)


def slab_rows(shape: Shape) -> int:
    """Queries whose scores fill 256 MiB."""
    return max(16, min(shape.num_queries, SLAB_BYTES // (4 * shape.num_keys)))


def top_k_cases(report: Report, inputs: Inputs) -> None:
    """Scores that lie in memory: a slab at a time, and all rows in one matrix where a goal is set for it."""
    shape = inputs.shape
    top_k_case(report, inputs, slab_rows(shape))
    if shape.num_keys in TOP_K_GOALS and 4 * shape.num_queries * shape.num_keys <= MATRIX_BYTES:
        top_k_case(report, inputs, shape.num_queries)


def top_k_case(report: Report, inputs: Inputs, height: int) -> None:
    """All rows of the shape, `height` of them at a time."""
    shape, valid = inputs.shape, inputs.positions + 1
    scores = draw(report.device, torch.float32, height, shape.num_keys, seed=8)
    part = min(height, 1024)
    peer = report.peer(
        f"torch.topk of {part} rows, scaled",
        lambda: scores[:part].topk(min(shape.top_k, shape.num_keys), dim=-1),
        scale=shape.num_queries / part,
    )

    def work() -> None:
        for start in range(0, shape.num_queries, height):
            counts = valid[start : start + height]
            top_k_positions(scores[: counts.shape[0]], shape.top_k, counts)

    def check() -> None:
        rows = torch.linspace(0, height - 1, inputs.rows.shape[0], device=report.device).long()
        picked = top_k_positions(scores, shape.top_k, valid[:height])
        must_equal("top_k", picked[rows], reference.top_k_positions(scores[rows], shape.top_k, valid[rows]))

    for is_triton in (False, True):
        name = "top_k, one matrix" if height == shape.num_queries else f"top_k, slabs of {height} rows"
        goal = TOP_K_GOALS.get(shape.num_keys) if height == shape.num_queries and not is_triton else None
        case = Case(
            name + (", Triton" if is_triton else ""),
            shape.name,
            (work,),
            check,
            Work(memory_bytes=4 * shape.causal_pairs),
            peer=peer,
            goal=goal,
            is_triton=is_triton,
        )
        report.case(case)


def scratch_lines(report: Report, inputs: Inputs) -> None:
    """Memory that a selection needs beside its inputs and its result."""
    if report.mode != "time":
        return
    for is_fp8 in (True, False):
        name = f"Scratch of indexer_select, {'fp8' if is_fp8 else 'bf16'}, {inputs.shape.name}"
        try:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            picked = select(inputs, is_fp8)
            torch.cuda.synchronize()
            mebibytes = (torch.cuda.max_memory_allocated() - before - 4 * picked.numel()) / 2**20
        except FAILURES as error:
            report.fail(name, error)
            continue
        word = "met" if mebibytes <= SCRATCH_MIB else "MISSED"
        report.say(f"\n{name}: {mebibytes:.0f} MiB (at most {SCRATCH_MIB}: {word})")
