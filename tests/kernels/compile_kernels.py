"""Compiles every Triton kernel for one GPU architecture, which needs no GPU: python compile_kernels.py 80

Prints one line a kernel: its name, registers spilt, bytes of shared memory. The interpreter runs what no compiler accepts, so
this is the other half of testing kernels on a machine without a GPU.
"""

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from openkeye.kernels import index_scores, sparse_attention, sparse_attention_backward, sparse_decode, top_k, unions

POINTERS = {"bf16": "*bf16", "f32": "*fp32", "i32": "*i32", "i64": "*i64"}


def variants() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Kernel, types of its arguments, values of its constants, launch options."""
    attend = {
        **dict.fromkeys(("query", "key", "value", "output"), "bf16"),
        **dict.fromkeys(("union_keys", "union_masks", "union_counts"), "i32"),
        "lse": "f32",
    }
    shapes = [(32, 8, 8, 128), (64, 16, 8, 128), (9, 3, 4, 64)]
    listed: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]] = [
        (
            sparse_attention._attend,
            attend,
            {"TILE": 16, "HEADS": h, "GROUP": g, "BLOCK_HEADS": b, "WIDTH": w, "BLOCK": 64, "PRECISION": "tf32"},
            {"num_warps": 8 if b == 8 else 4, "num_stages": 3},
        )
        for h, g, b, w in shapes
    ]
    backward = {
        **dict.fromkeys(("query", "key", "value", "output_gradient", "query_gradient"), "bf16"),
        **dict.fromkeys(("union_keys", "union_masks", "union_counts", "ranks"), "i32"),
        **dict.fromkeys(("lse", "delta", "key_gradient", "value_gradient", "parts", "sums"), "f32"),
    }
    common = {"TILE": 16, "HEADS": 32, "GROUP": 8, "BLOCK_HEADS": 8, "WIDTH": 128, "PRECISION": "tf32"}
    for keeps_parts in (False, True):
        constants = common | {"GROUPS": 4, "BLOCK": sparse_attention_backward.BLOCK, "KEEPS_PARTS": keeps_parts}
        options = {"num_warps": 8, "num_stages": 2}
        listed.append((sparse_attention_backward._attend_backward, backward, constants, options))
    constants = {"GROUPS": 4, "BLOCKS_PER_GROUP": 1, "WIDTH": 128}
    listed.append((sparse_attention_backward._add_parts, backward, constants, {"num_warps": 1}))
    constants = common | {"NUM_BLOCKS": 4, "BLOCK": 64}
    listed.append((sparse_attention_backward._sum_probabilities, backward, constants, {"num_warps": 8, "num_stages": 2}))
    decode = attend | {"indices": "i32", "page_table": "i32", "parts": "f32", "tops": "f32", "sums": "f32"}
    for page_size in (0, 64):
        constants = {"HEADS": 32, "GROUP": 8, "WIDTH": 128, "ROWS": 16, "BLOCK": 64, "NUM_SPLITS": 32, "PRECISION": "tf32"}
        options = {"num_warps": 4, "num_stages": 3}
        listed.append((sparse_decode._decode, decode, constants | {"PAGE_SIZE": page_size}, options))
    listed.append((sparse_decode._merge, decode, {"HEADS": 32, "WIDTH": 128, "NUM_SPLITS": 32}, {"num_warps": 4}))
    listed.append((unions._mark, {"indices": "i32", "marks": "i32"}, {"TILE": 16, "BLOCK": unions.MARK_BLOCK}, {}))
    listed.append(
        (unions._collect, dict.fromkeys(("marks", "keys", "masks", "counts"), "i32"), {"BLOCK": unions.SCAN_BLOCK}, {})
    )
    score = {"query": "bf16", "gates": "f32", "key": "bf16", "positions": "i64", "out": "f32"}
    constants = {"HEADS": 16, "WIDTH": 64, "BLOCK_QUERIES": 8, "KEY_BLOCK": index_scores.KEY_BLOCK, "PRECISION": "tf32"}
    listed.append((index_scores._score, score, constants, {"num_warps": 8, "num_stages": 2}))
    select = {"scores": "f32", "num_valid": "i64", "indices": "i32"}
    listed.append((top_k._select, select, {"BLOCK": top_k.BLOCK}, {"num_warps": 8}))
    return listed


def main() -> None:
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    for kernel, pointers, constants, options in variants():
        signature = {
            name: "constexpr" if name in constants else POINTERS[pointers[name]] if name in pointers else "i32"
            for name in kernel.arg_names
        }
        signature |= {name: "fp32" for name in ("scale", "scale_log2") if name in signature}
        compiled = triton.compile(ASTSource(kernel, signature, constants), target=target, options=options)
        print(kernel.__name__, compiled.metadata.shared, "bytes of shared memory")


if __name__ == "__main__":
    main()
