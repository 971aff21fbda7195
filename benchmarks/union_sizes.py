"""What attention costs by the size of unions: from which size on every query had better gather its own keys."""

import math
from functools import partial

import torch

from benchmarks.inputs import Sizes, pooled_lists
from benchmarks.measure import Case, Report, Work, compare_all
from benchmarks.selection import Inputs, make_inputs
from openkeye.kernels.build import cuda_library
from openkeye.kernels.sparse_attention import (
    Call,
    attend_alone,
    attend_unions,
    attend_unions_in_cuda,
    can_serve_in_cuda,
    sparse_attention_with_lse,
)
from openkeye.kernels.unions import TILE, build_unions

SHARES = (1 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
# of 16 k, the size of a union whose queries share nothing


def make_call(inputs: Inputs, share: float, device: str) -> Call:
    """Lists whose unions have about that share of 16 k keys."""
    lists = pooled_lists(inputs.shape, device, union_keys=max(inputs.shape.top_k, int(share * TILE * inputs.shape.top_k)))
    unions = build_unions(lists, inputs.shape.num_keys)
    output, lse = sparse_attention_with_lse(inputs.query, inputs.key, inputs.value, lists, inputs.scale, unions)
    scale_log2 = inputs.scale * math.log2(math.e)
    return Call(inputs.query, inputs.key, inputs.value, lists, unions, None, 64, None, scale_log2, output, lse)


def attend(call: Call, way: str) -> None:
    """By unions or query by query, whatever the unions' sizes."""
    if way == "query by query, Triton":
        attend_alone(call, 0.0)
    elif way == "by unions, Triton":
        attend_unions(call, 1.0)
    else:
        library = cuda_library("sparse_attention")
        assert library is not None
        attend_unions_in_cuda(library, call, 1.0)


def check(call: Call, way: str) -> None:
    """Equal to what `sparse_attention` chooses, which other tables compare with the twin."""
    served = call.output_THD.clone(), call.lse_TH.clone()
    call.output_THD.fill_(float("nan"))
    attend(call, way)
    compare_all(way, [("output", call.output_THD, served[0]), ("lse", call.lse_TH, served[1])], 1e-2)


def run(report: Report, sizes: Sizes, device: str) -> None:
    """One table at the second context."""
    inputs = make_inputs(sizes, sizes.contexts[min(1, len(sizes.contexts) - 1)], device)
    shape = inputs.shape
    report.begin(f"Attention by the size of unions, the last {shape.num_queries} queries of {shape.num_keys} keys")
    heads, width = inputs.query.shape[1:]
    for share in SHARES:
        call = make_call(inputs, share, device)
        keys = float(call.unions.counts_N.sum())
        name = f"{keys / call.unions.counts_N.shape[0]:.0f} keys a union"
        ways = ["by unions, Triton", "query by query, Triton"]
        if can_serve_in_cuda(call) and cuda_library("sparse_attention") is not None:
            ways.insert(0, "by unions, CUDA C++")
        for way in ways:
            pairs = keys * TILE if way.startswith("by unions") else float(call.indices_TK.numel())
            case = Case(
                way, name, (partial(attend, call, way),), partial(check, call, way), Work(flops=4 * width * heads * pairs)
            )
            report.case(case)
    if device == "cuda":
        torch.cuda.empty_cache()
