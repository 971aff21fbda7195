"""Compiles every Triton kernel for one GPU architecture, which needs no GPU: python compile_kernels.py 80

Prints one line a kernel: its name, registers spilt, bytes of shared memory. The interpreter runs what no compiler accepts, so
this is the other half of testing kernels on a machine without a GPU.
"""

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from openkeye.kernels import (
    cross_entropy_tiles,
    dense_attention,
    expert_products,
    expert_routes,
    experts_backward,
    index_scores,
    indexer_decode,
    norm_rotary,
    quantize,
    sparse_attention,
    sparse_attention_backward,
    sparse_decode,
    top_k,
    unions,
)

POINTERS = {"u8": "*u8", "e4m3": "*fp8e4nv", "bf16": "*bf16", "f32": "*fp32", "i32": "*i32", "i64": "*i64"}


def variants() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Kernel, types of its arguments, values of its constants, launch options."""
    attend = {
        **dict.fromkeys(("query", "key", "value", "output"), "bf16"),
        **dict.fromkeys(("union_keys", "union_masks", "union_counts", "page_table", "sequences", "indices"), "i32"),
        "lse": "f32",
    }
    tile = {"TILE": 16, "BLOCK": 64, "PRECISION": "tf32"}
    shapes = [(32, 8, 8, 128, 0), (64, 16, 8, 128, 64), (9, 3, 4, 64, 0)]
    listed: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]] = [
        (
            sparse_attention._attend,
            attend,
            tile | {"HEADS": h, "GROUP": g, "BLOCK_HEADS": b, "WIDTH": w, "PAGE_SIZE": p},
            {"num_warps": 8 if b == 8 else 4, "num_stages": 3},
        )
        for h, g, b, w, p in shapes
    ]
    alone = tile | {"QUERIES": 4, "HEADS": 32, "GROUP": 8, "ROWS": 16, "WIDTH": 128, "ROOM": 2048}
    for page_size in (0, 64):
        options = {"num_warps": 4, "num_stages": 3}
        listed.append((sparse_attention._attend_alone, attend, alone | {"PAGE_SIZE": page_size}, options))
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
    listed.append((unions._mark, {"indices": "i32", "marks": "i32"}, {"TILE": 16, "BLOCK": unions.MARK_BLOCK}, {}))
    listed.append(
        (unions._collect, dict.fromkeys(("marks", "keys", "masks", "counts"), "i32"), {"BLOCK": unions.SCAN_BLOCK}, {})
    )
    score = {"query": "bf16", "gates": "f32", "key": "bf16", "scales": "f32", "positions": "i64", "firsts": "i64", "out": "f32"}
    codes = score | {"query": "u8", "key": "u8"}
    constants = {"HEADS": 16, "WIDTH": 64, "BLOCK_QUERIES": 8, "KEY_BLOCK": index_scores.KEY_BLOCK, "PRECISION": "tf32"}
    for pointers, is_e4m3, has_fp8 in ((score, False, False), (codes, True, False), (codes, True, True)):
        if has_fp8 and int(sys.argv[1]) < 89:
            continue
        flags = {"IS_E4M3": is_e4m3, "HAS_FP8": has_fp8, "HAS_FIRST": is_e4m3}
        listed.append((index_scores._score, pointers, constants | flags, {"num_warps": 8, "num_stages": 2}))
    select = {"scores": "f32", "num_valid": "i64", "indices": "i32", "kept": "i32"}
    listed.append((top_k._select, select, {"BLOCK": top_k.BLOCK, "CAPACITY": top_k.CAPACITY}, {"num_warps": 8}))
    return listed + between_projections_and_attention() + decoding() + experts_and_head()


def between_projections_and_attention() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Norms, rotary and cache writes, and the merge of dense attention's parts."""
    listed: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]] = []
    names = ("query", "key", "value", "query_weight", "key_weight", "key_bias", "projected", "output", "x", "y", "weight")
    read = dict.fromkeys((*names, "total", "normed", "other", "merged"), "bf16") | {"slots": "i64"}
    read |= dict.fromkeys(("cos", "sin", "key_scales", "value_scales", "gates", "lse", "other_lse", "merged_lse"), "f32")
    for is_e4m3 in (False, True):
        pointers = read | dict.fromkeys(("key_target", "value_target"), "u8" if is_e4m3 else "bf16")
        flags = {"HAS_SLOTS": is_e4m3, "IS_E4M3": is_e4m3}
        for rows, warps in ((8, 1), (32, 4)):
            constants = flags | {"HEADS": 32, "GROUPS": 4, "WIDTH": 128, "ROWS": rows}
            listed.append((norm_rotary._norm_rotary, pointers, constants, {"num_warps": warps, "enable_fp_fusion": False}))
        pointers = pointers | {"query": pointers["key_target"]}
        constants = flags | {"HEADS": 16, "WIDTH": 64, "ROWS": 16, "LOG_HALF": 5}
        listed.append((norm_rotary._index_norm_rotary, pointers, constants, {"num_warps": 1, "enable_fp_fusion": False}))
        constants = {"WIDTH": 2048, "BLOCK": 2048, "ADDS": is_e4m3}
        listed.append((norm_rotary._rms_norm, read, constants, {"num_warps": 4, "enable_fp_fusion": False}))
    constants = {"HEADS": 32, "WIDTH": 128, "PADDED": 128, "ROWS": dense_attention.MERGE_ROWS}
    listed.append((dense_attention._merge, read, constants, {"num_warps": 4}))
    return listed


def decoding() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Quantisation, the indexer's scores and attention of one token a request, over caches in bfloat16 and e4m3."""
    constants: dict[str, Any] = {"WIDTH": 64, "PADDED": 64, "ROWS": 64}
    listed: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]] = [
        (quantize._quantize, {"x": "bf16", "codes": "u8", "scales": "f32"}, constants, {"num_warps": 4})
    ]
    read = dict.fromkeys(("query", "output"), "bf16") | dict.fromkeys(("page_table", "lengths", "indices", "counters"), "i32")
    read |= dict.fromkeys(("gates", "scales", "key_scales", "value_scales", "out", "parts"), "f32")
    common = {"PAGE_SIZE": 64, "PRECISION": "tf32"}
    score = common | {"REQUESTS": 32, "HEADS": 16, "ROWS": 16, "WIDTH": 64, "BLOCK": 128, "IS_QUANTIZED": False}
    attend = common | {"HEADS": 32, "GROUP": 8, "GROUPS": 4, "WIDTH": 128, "NUM_SPLITS": 8, "PADDED_SPLITS": 8, "UNROLLED": 8}
    for dtype in ("bf16", "u8", "e4m3"):
        if dtype == "e4m3" and int(sys.argv[1]) < 89:
            continue
        pointers = read | {"key": dtype, "value": dtype}
        flags = {"IS_FP8": dtype != "bf16", "IS_NATIVE": dtype == "e4m3"}
        options = {"num_warps": 4, "num_stages": 3 if dtype == "bf16" else 4}
        listed.append((indexer_decode._score_pages, pointers, score | flags, options))
        for together, block, rows, merged in ((1, 64, 16, 8), (4, 16, 32, 32)):
            cut = {"TOGETHER": together, "BLOCK": block, "ROWS": rows, "MERGED": merged}
            listed.append((sparse_decode._decode, pointers, attend | flags | cut, {"num_warps": 4, "num_stages": 3}))
    return listed


def experts_and_head() -> list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Routes, grouped products in the fewest and the most rows of a tile, their gradients, and the head's cross entropy."""
    is_hopper = int(sys.argv[1]) >= 90
    table = expert_products.HOPPER_TILES if is_hopper else expert_products.AMPERE_TILES
    halves = ("x", "rows", "weight", "down", "activated", "projections", "picks", "weights", "output", "hidden")
    read = dict.fromkeys((*halves, "left", "right", "output_gradient", "gradients", "weighted", "logit_gradients"), "bf16")
    read |= dict.fromkeys(("scales", "parts", "label_logits", "log_probabilities", "lses", "entropies"), "f32")
    read |= dict.fromkeys(("alls", "label_terms"), "f32") | dict.fromkeys(("ids", "labels", "best_entries"), "i64")
    read |= dict.fromkeys(("order", "ends", "tile_experts", "tile_rows", "counts", "starts", "bests"), "i32")
    listed: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]] = []

    def add(kernel: Any, tiles: expert_products.Tiles, pointers: dict[str, str], **constants: Any) -> None:
        cut = {"BLOCK_ROWS": tiles.rows, "BLOCK_COLUMNS": tiles.columns, "BLOCK_DEPTH": tiles.depth, "PRECISION": "tf32"}
        options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
        listed.append((kernel, pointers, {n: v for n, v in (cut | constants).items() if n in kernel.arg_names}, options))

    for kernel in (expert_routes._sort_alone, expert_routes._count, expert_routes._scan, expert_routes._place):
        constants = {"EXPERTS": 128, "STEP": expert_routes.STEP, "SPAN": expert_routes.SPAN, "BLOCK_ROWS": 16}
        listed.append((kernel, read, {n: v for n, v in constants.items() if n in kernel.arg_names}, {"num_warps": 8}))
    for number, weight in ((0, "bf16"), (0, "u8"), (-1, "bf16")):
        flags = {"IS_E4M3": weight == "u8", "IS_COMPILED": True, "weight_depth" if weight == "u8" else "weight_column": 1}
        pointers, shape = read | {"weight": weight}, {"PICKED": 8, "DEPTH": 2048, "WIDTH": 768}
        splits = {"SPLITS": 1, "KEEPS": False} if number == 0 else {"SPLITS": 1, "KEEPS": True}
        add(expert_products._gate_up, table["gate_up"][number], pointers, **flags, **shape, **splits)
        add(expert_products._project_rows, table["down"][number], pointers, **flags, DEPTH=768, WIDTH=2048)
        add(experts_backward._differentiate, table["activation_gradients"][number], read, **shape, down_column=1)
    cut = table["matrix_gradients"][0]
    blocks = {"BLOCK_HEIGHT": cut.rows, "BLOCK_WIDTH": cut.columns, "BLOCK_ROWS": cut.depth, "PICKED": 8}
    add(experts_backward._contract_rows, cut, read, HEIGHT=2048, WIDTH=1536, LEFT_GATHERS=True, **blocks)
    constants = {"PICKED": 8, "WIDTH": 2048, "BLOCK": 1024, "IS_WEIGHTED": True}
    listed.append((expert_products._add_picks, read, constants, {"num_warps": 4}))
    constants = {"WIDTH": 768, "BLOCK": 256, "SPLITS": 4}
    listed.append((expert_products._activate, read | {"projections": "f32"}, constants, {"num_warps": 2}))
    for cut in cross_entropy_tiles.HOPPER_TILES if is_hopper else cross_entropy_tiles.AMPERE_TILES:
        for kernel in (cross_entropy_tiles._summarise, cross_entropy_tiles._differentiate):
            add(kernel, cut, read, WIDTH=2048, GROUP=cross_entropy_tiles.GROUP)
    listed.append((cross_entropy_tiles._merge, read, {"ROWS": 32, "TILES": 32}, {"num_warps": 4}))
    return listed


def main() -> None:
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    for kernel, pointers, constants, options in variants():
        signature = {
            name: "constexpr" if name in constants else POINTERS[pointers[name]] if name in pointers else "i32"
            for name in kernel.arg_names
        }
        signature |= {name: "fp32" for name in ("scale", "scale_log2", "eps", "factor") if name in signature}
        compiled = triton.compile(ASTSource(kernel, signature, constants), target=target, options=options)
        print(kernel.__name__, compiled.metadata.shared, "bytes of shared memory")


if __name__ == "__main__":
    main()
