"""What is compiled of selection, attention, norms and decoding, with the layouts that the operations choose."""

from typing import Any

import torch

from openkeye.kernels import (
    attention_lse,
    dense_attention,
    index_scores,
    indexer_decode,
    norm_rotary,
    paged_reads,
    quantize,
    router,
    sparse_attention,
    sparse_decode,
    top_k,
    unions,
)
from tests.kernels.variant import Variant, make

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "u8": torch.uint8, "e4m3": torch.float8_e4m3fn}


def variants(capability: int) -> list[Variant]:
    """All of these, for a compute capability times ten."""
    return attending() + selecting(capability) + between_projections_and_attention() + decoding(capability)


def attending() -> list[Variant]:
    """Attention over unions and query by query, and the unions themselves."""
    lists = dict.fromkeys(("union_keys", "union_masks", "union_counts", "page_table", "sequences", "indices"), "i32") | {
        "lse": "f32"
    }
    halves, floats = (lists | dict.fromkeys(("query", "key", "value", "output"), dtype) for dtype in ("bf16", "f32"))
    listed = []

    def add(pointers: dict[str, str], heads: int, group: int, width: int, page_size: int) -> None:
        block_heads = min(sparse_attention.MAX_HEADS, 1 << (group - 1).bit_length())
        union = sparse_attention.UNION_CONFIG if block_heads == sparse_attention.MAX_HEADS else sparse_attention.NARROW_CONFIG
        alone = sparse_attention.ALONE_CONFIG
        if pointers is floats:
            union, alone = sparse_attention.FLOAT32_CONFIG, sparse_attention.FLOAT32_ALONE_CONFIG
        shape = {"HEADS": heads, "GROUP": group, "BLOCK_HEADS": block_heads, "WIDTH": width, "PAGE_SIZE": page_size}
        shape |= {"QUERIES": sparse_attention.ALONE_QUERIES, "ROWS": sparse_attention.ALONE_ROWS, "ROOM": 2048, "TILE": 16}
        shape["PRECISION"] = "ieee" if pointers is floats else "tf32"
        for kernel, config in ((sparse_attention._attend, union), (sparse_attention._attend_alone, alone)):
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": config.num_registers}
            listed.append(make(kernel, pointers, shape | {"BLOCK": config.block}, **options))

    add(halves, heads=32, group=8, width=128, page_size=0)
    add(halves, heads=64, group=16, width=128, page_size=64)
    add(halves, heads=32, group=4, width=128, page_size=0)
    add(halves, heads=9, group=3, width=64, page_size=0)
    add(halves, heads=8, group=4, width=32, page_size=0)
    add(halves, heads=8, group=4, width=16, page_size=64)
    add(floats, heads=32, group=8, width=128, page_size=0)
    add(floats, heads=8, group=4, width=32, page_size=0)
    ints = dict.fromkeys(("indices", "marks", "keys", "masks", "counts"), "i32")
    listed.append(make(unions._mark, ints, {"TILE": 16, "BLOCK": unions.MARK_BLOCK}))
    listed.append(make(unions._collect, ints, {"BLOCK": unions.SCAN_BLOCK}))
    shape = {"TILE": 16, "HEADS": 32, "GROUPS": 4, "GROUP": 8, "BLOCK_HEADS": 8, "WIDTH": 128, "PRECISION": "tf32"}
    shape |= {"HAS_FIRST": True, "BLOCK": attention_lse.BLOCK}
    pointers = halves | dict.fromkeys(("positions", "first_keys", "gap_starts", "gap_ends"), "i64")
    listed.append(make(attention_lse._attention_lse, pointers, shape | {"HAS_GAPS": False}, 8, num_stages=3))
    pointers = halves | dict.fromkeys(("positions", "first_keys", "gap_starts", "gap_ends"), "i32")
    for heads, groups, width in ((8, 2, 32), (9, 3, 64)):
        own = shape | {"HEADS": heads, "GROUPS": groups, "GROUP": heads // groups, "BLOCK_HEADS": 4, "WIDTH": width}
        listed.append(make(attention_lse._attention_lse, pointers, own | {"HAS_GAPS": True}, 4, num_stages=3))
    return listed


def selecting(capability: int) -> list[Variant]:
    """The indexer's scores in bfloat16, in e4m3 with and without a GPU's own, and the top k of them."""
    score = {"query": "bf16", "gates": "f32", "key": "bf16", "scales": "f32", "positions": "i64", "firsts": "i64", "out": "f32"}
    score |= {"gap_starts": "i64", "gap_ends": "i64"}
    constants = {"HEADS": 16, "WIDTH": 64, "BLOCK_QUERIES": 8, "KEY_BLOCK": index_scores.KEY_BLOCK, "PRECISION": "tf32"}
    listed = []
    for is_e4m3, has_fp8 in ((False, False), (True, False), (True, True)):
        if has_fp8 and capability < 89:
            continue
        codes = dict.fromkeys(("query", "key"), "u8" if is_e4m3 else "bf16")
        flags = {"IS_E4M3": is_e4m3, "HAS_FP8": has_fp8, "HAS_FIRST": is_e4m3, "HAS_GAPS": False}
        listed.append(make(index_scores._score, score | codes, constants | flags, 8, num_stages=2))
        packed = dict.fromkeys(("positions", "firsts", "gap_starts", "gap_ends"), "i32")
        flags = flags | {"HEADS": 4, "WIDTH": 32, "BLOCK_QUERIES": 32, "HAS_FIRST": True, "HAS_GAPS": True}
        listed.append(make(index_scores._score, score | codes | packed, constants | flags, 8, num_stages=2))
    select = {"scores": "f32", "num_valid": "i64", "indices": "i32", "kept": "i32"}
    listed.append(make(top_k._select, select, {"BLOCK": top_k.BLOCK, "CAPACITY": top_k.CAPACITY}, 8))
    return listed


def between_projections_and_attention() -> list[Variant]:
    """Norms, rotary and cache writes, and the merge of dense attention's parts."""
    names = ("query", "key", "value", "query_weight", "key_weight", "key_bias", "projected", "output", "x", "y", "weight")
    read = dict.fromkeys((*names, "total", "normed", "other", "merged"), "bf16") | {"slots": "i64"}
    read |= dict.fromkeys(("cos", "sin", "key_scales", "value_scales", "gates", "lse", "other_lse", "merged_lse"), "f32")
    listed = []
    for is_e4m3 in (False, True):
        pointers = read | dict.fromkeys(("key_target", "value_target"), "u8" if is_e4m3 else "bf16")
        flags: dict[str, Any] = {"HAS_SLOTS": is_e4m3, "IS_E4M3": is_e4m3}
        for rows, warps in ((8, 1), (32, 4)):
            constants = flags | {"HEADS": 32, "GROUPS": 4, "WIDTH": 128, "ROWS": rows}
            listed.append(make(norm_rotary._norm_rotary, pointers, constants, warps, enable_fp_fusion=False))
        pointers = pointers | {"query": pointers["key_target"]}
        constants = flags | {"HEADS": 16, "WIDTH": 64, "ROWS": 16, "LOG_HALF": 5}
        listed.append(make(norm_rotary._index_norm_rotary, pointers, constants, 1, enable_fp_fusion=False))
        constants = {"WIDTH": 2048, "BLOCK": 2048, "ADDS": is_e4m3}
        listed.append(make(norm_rotary._rms_norm, read, constants, 4, enable_fp_fusion=False))
    constants = {"HEADS": 32, "WIDTH": 128, "PADDED": 128, "ROWS": dense_attention.MERGE_ROWS}
    listed.append(make(dense_attention._merge, read, constants))
    return listed


def decoding(capability: int) -> list[Variant]:
    """Quantisation, the indexer's scores and attention of one token a request, for few requests and many."""
    quantised = {"x": "bf16", "codes": "u8", "scales": "f32"}
    listed = [make(quantize._quantize, quantised, {"WIDTH": 64, "PADDED": 64, "ROWS": 64})]
    ints = dict.fromkeys(("page_table", "lengths", "indices", "counters"), "i32")
    read = ints | dict.fromkeys(("gates", "scales", "key_scales", "value_scales", "out", "parts"), "f32")
    for name, dtype in DTYPES.items():
        if name == "e4m3" and capability < 89:
            continue
        wide = "f32" if name == "f32" else "bf16"
        pointers = read | {"key": name, "value": name, "query": wide, "output": wide}
        flags = {"IS_FP8": name in ("u8", "e4m3"), "IS_NATIVE": name == "e4m3", "IS_QUANTIZED": False, "PAGE_SIZE": 64}
        flags["PRECISION"] = "ieee" if name == "f32" else "tf32"
        cut = indexer_decode.indexer_plan(torch.empty(0, 64, dtype=dtype))
        shape = {"REQUESTS": 32, "HEADS": 16, "ROWS": 16, "WIDTH": 64, "BLOCK": cut.block}
        listed.append(make(indexer_decode._score_pages, pointers, shape | flags, cut.num_warps, num_stages=cut.num_stages))
        for num_requests in (1, 32):
            plan = sparse_decode.decode_plan(num_requests, 32, torch.empty(0, 4, 128, dtype=dtype), 2048)
            shape = {"HEADS": 32, "GROUP": 8, "GROUPS": 4, "WIDTH": 128, "NUM_SPLITS": 8, "PADDED_SPLITS": 8, "UNROLLED": 8}
            shape |= {"TOGETHER": plan.num_groups, "BLOCK": plan.block, "ROWS": max(16, 8 * plan.num_groups)}
            shape |= {"MERGED": 8 * plan.num_groups}
            listed.append(make(sparse_decode._decode, pointers, shape | flags, plan.num_warps, num_stages=plan.num_stages))
        plan = sparse_decode.decode_plan(1, 8, torch.empty(0, 2, 32, dtype=dtype), 192)
        shape |= {"HEADS": 8, "GROUP": 4, "GROUPS": 2, "WIDTH": 32, "NUM_SPLITS": 2, "PADDED_SPLITS": 2, "UNROLLED": 2}
        shape |= {"TOGETHER": plan.num_groups, "BLOCK": plan.block, "ROWS": max(16, 4 * plan.num_groups)}
        shape |= {"MERGED": 4 * plan.num_groups}
        listed.append(make(sparse_decode._decode, pointers, shape | flags, plan.num_warps, num_stages=plan.num_stages))
    return listed + reading_and_routing()


def reading_and_routing() -> list[Variant]:
    """Keys out of their pages, and the router's picks of one token and of many."""
    listed = []
    for cache in ("bf16", "u8"):
        pointers = {"cache": cache, "scales": "f32", "page_table": "i32", "output": "bf16"}
        shape = {"GROUPS": 4, "WIDTH": 128, "PADDED": 128, "PAGE_SIZE": 64, "ROWS": paged_reads.ROWS}
        listed.append(make(paged_reads._read, pointers, shape | {"IS_E4M3": cache == "u8"}))
    for dtype in ("bf16", "f32"):
        shape = {"EXPERTS": 128, "PADDED": 128, "PICKED": 8, "PADDED_PICKED": 8, "ROWS": 4, "IS_NORMALISED": True}
        listed.append(make(router._route, {"logits": dtype, "weights": dtype, "ids": "i64"}, shape))
    return listed
