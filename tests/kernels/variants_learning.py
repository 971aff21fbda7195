"""What is compiled of the gradients, the indexer's losses, the experts and the head, with the layouts that they choose."""

from typing import Any

from triton.runtime import JITFunction

from openkeye.kernels import (
    cross_entropy_tiles,
    expert_products,
    expert_routes,
    experts_backward,
    indexer_gradients,
    indexer_loss,
    ordered_adds,
    sparse_attention_backward,
)
from openkeye.kernels.expert_products import Tiles
from tests.kernels.variant import Variant, make

PACKED_SHAPES = ((8, 2, 32), (9, 3, 64), (8, 2, 16))
# query heads, KV heads and their width: those of the small models that train in packs


def variants(capability: int) -> list[Variant]:
    """All of these, for a compute capability times ten."""
    return learning(capability >= 90) + experts(capability >= 90) + head(capability >= 90)


def learning(is_hopper: bool) -> list[Variant]:
    """Gradients of selected attention in every schedule that fits, the default ones also in order, and the indexer's losses."""
    lists = ("union_keys", "union_masks", "union_counts", "cuts", "counts")
    sums = ("lse", "lse_log2", "delta", "key_gradient", "value_gradient", "parts", "sums", "differences", "gate_gradient")
    halves = ("query", "key", "value", "output", "output_gradient", "query_gradient", "index_query", "index_key")
    read = dict.fromkeys(halves, "bf16") | dict.fromkeys(lists, "i32") | dict.fromkeys(sums, "f32")
    read |= dict.fromkeys(("gates", "probabilities", "scores", "weights", "divergence"), "f32")
    read |= dict.fromkeys(("positions", "first_keys", "begins", "ends", "first_rows", "first_tiles"), "i64")
    read |= dict.fromkeys(("gap_starts", "gap_ends"), "i32")
    shape = {"TILE": 16, "HEADS": 32, "GROUPS": 4, "GROUP": 8, "BLOCK_HEADS": 8, "WIDTH": 128, "PRECISION": "tf32"}
    index = {"HEADS": 16, "WIDTH": 64, "TILE": 16, "BLOCK_QUERIES": 8, "PRECISION": "tf32"}
    schedules, teachers = sparse_attention_backward.SCHEDULES, indexer_loss.TEACHERS
    listed = []
    for name in schedules if is_hopper else ("rows 16", "rows 32"):
        # The narrowest schedule is for float32.
        pointers = read | dict.fromkeys(halves, "f32") if name == "rows 16" else read
        for launch in schedules[name]:
            constants = shape | {"MAKES_QUERIES": launch.makes_queries, "MAKES_KEYS": launch.makes_keys, "BLOCK": launch.block}
            constants |= {"MAKES_SUMS": launch.makes_queries, "KEYS_ARE_ROWS": launch.keys_are_rows}
            constants |= {"PRECISION": "ieee", "BLOCK_HEADS": 4} if name == "rows 16" else {}
            options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "maxnreg": launch.max_registers}
            for keeps_parts in (False, True) if name in ("rows 32", "rows 64") else (False,):
                kernel = sparse_attention_backward._attend_backward
                listed.append(make(kernel, pointers, constants | {"KEEPS_PARTS": keeps_parts}, **options))
    listed.append(make(sparse_attention_backward._prepare, read, shape))
    constants = shape | {"NUM_BLOCKS": 4, "BLOCK": 64}
    listed.append(make(sparse_attention_backward._sum_probabilities, read, constants, 8, num_stages=2))
    listed.append(make(ordered_adds._cut, read, {"OWNED_KEYS": ordered_adds.OWNED_KEYS, "BLOCK": 128}))
    listed.append(make(ordered_adds._add_parts, read, shape | {"PROGRAMS_PER_GROUP": 1, "BLOCK": 32}))
    for name in ("64 x 128", "64 x 64") if is_hopper else ("64 x 64",):
        both = {"INDEX_HEADS": 16, "INDEX_WIDTH": 64, "INDEX_PRECISION": "tf32"} | teachers[name]
        options = {option: both[option] for option in ("num_warps", "num_stages")}
        listed.append(make(indexer_loss._teach, read, shape | both | {"HAS_GAPS": False}, **options))
        for heads, groups, width in PACKED_SHAPES:
            own = shape | both | {"HEADS": heads, "GROUP": heads // groups, "WIDTH": width, "HAS_GAPS": True}
            listed.append(make(indexer_loss._teach, read, own | {"INDEX_HEADS": 4, "INDEX_WIDTH": 32}, **options))
    for has_gaps in (False, True):
        flags = {"HAS_BEGINS": True, "WRITES": True, "HAS_GAPS": has_gaps, "BLOCK": 2048}
        listed.append(make(indexer_loss._compare, read, flags, 8))
    listed.append(make(indexer_loss._score_selected, read, index | {"BLOCK": 128}, 8, num_stages=3))
    for is_selected, keeps_parts in ((False, False), (True, False), (True, True)):
        flags = {"IS_SELECTED": is_selected, "KEEPS_PARTS": keeps_parts, "BLOCK": indexer_gradients.KEY_BLOCK}
        listed.append(make(indexer_gradients._learn, read, index | flags | {"HAS_GAPS": False}, 8, num_stages=2))
    small = {"HEADS": 4, "WIDTH": 32, "BLOCK_QUERIES": 32, "BLOCK": indexer_gradients.KEY_BLOCK, "HAS_GAPS": True}
    listed.append(make(indexer_gradients._learn, read, index | small | {"IS_SELECTED": False, "KEEPS_PARTS": False}, 8))
    for constants in (index | {"BLOCK": indexer_gradients.KEY_BLOCK, "HAS_GAPS": False}, index | small):
        listed.append(make(indexer_gradients._learn_keys, read, constants, num_stages=5))
    return listed + packed_learning(read, is_hopper)


def packed_learning(read: dict[str, str], is_hopper: bool) -> list[Variant]:
    """Gradients of selected attention and its probabilities at the shapes that train in packs."""
    listed = []
    for heads, groups, width in PACKED_SHAPES:
        shape = {"HEADS": heads, "GROUPS": groups, "GROUP": heads // groups, "BLOCK_HEADS": 4, "WIDTH": width}
        shape |= {"TILE": 16, "NUM_BLOCKS": groups, "PRECISION": "tf32"}
        listed.append(make(sparse_attention_backward._prepare, read, shape))
        listed.append(make(sparse_attention_backward._sum_probabilities, read, shape | {"BLOCK": 64}, 4, num_stages=2))
        for launch in sparse_attention_backward.SCHEDULES["rows 64" if is_hopper else "rows 32"]:
            flags = {
                "MAKES_QUERIES": True,
                "MAKES_KEYS": True,
                "MAKES_SUMS": True,
                "KEYS_ARE_ROWS": False,
                "BLOCK": launch.block,
            }
            constants = shape | flags | {"KEEPS_PARTS": False}
            listed.append(make(sparse_attention_backward._attend_backward, read, constants, 4, num_stages=launch.num_stages))
    return listed


def cut_into(kernel: JITFunction, tiles: Tiles, pointers: dict[str, str], constants: dict[str, Any]) -> Variant:
    """A product's kernel in these tiles."""
    cut = {"BLOCK_ROWS": tiles.rows, "BLOCK_COLUMNS": tiles.columns, "BLOCK_DEPTH": tiles.depth, "PRECISION": "tf32"}
    return make(kernel, pointers, cut | constants, tiles.num_warps, num_stages=tiles.num_stages)


def experts(is_hopper: bool) -> list[Variant]:
    """Routes, every product in every one of its tiles, and the gradients."""
    table = expert_products.HOPPER_TILES if is_hopper else expert_products.AMPERE_TILES
    halves = ("x", "rows", "weight", "down", "activated", "projections", "picks", "weights", "output")
    read = dict.fromkeys((*halves, "left", "right", "output_gradient", "gradients", "weighted"), "bf16")
    read |= dict.fromkeys(("scales", "parts"), "f32") | {"ids": "i64"}
    read |= dict.fromkeys(("order", "ends", "tile_experts", "tile_rows", "counts", "starts"), "i32")
    listed = []
    for kernel in (expert_routes._sort_alone, expert_routes._count, expert_routes._scan, expert_routes._place):
        constants = {"EXPERTS": 128, "STEP": expert_routes.STEP, "SPAN": expert_routes.SPAN, "BLOCK_ROWS": 16}
        listed.append(make(kernel, read, constants, 8))
    shape = {"PICKED": 8, "DEPTH": 2048, "WIDTH": 768}
    alone = {"IS_ALONE": False}
    for kind in ("", " e4m3"):
        # Columns of e4m3 lie in one piece each, of bfloat16 rows do.
        flags = alone | {
            "IS_E4M3": bool(kind),
            "IS_COMPILED": True,
            "weight_depth" if kind else "weight_column": 1,
            "SPLITS": 1,
        }
        pointers = read | {"weight": "u8" if kind else "bf16"}
        # Of e4m3 the fewest rows and the most.
        ends = slice(None, None, 3 if kind else None)
        for tiles in table["gate_up" + kind][ends]:
            keeps = {"KEEPS": tiles.rows == 128 and not kind}
            listed.append(cut_into(expert_products._gate_up, tiles, pointers, flags | shape | keeps))
        for tiles in table["down" + kind][ends]:
            listed.append(cut_into(expert_products._project_rows, tiles, pointers, flags | {"DEPTH": 768, "WIDTH": 2048}))
    for tiles in table["activation_gradients"]:
        listed.append(cut_into(experts_backward._differentiate, tiles, read, shape | {"down_column": 1}))
    tiles = table["matrix_gradients"][0]
    blocks = {"BLOCK_HEIGHT": tiles.rows, "BLOCK_WIDTH": tiles.columns, "BLOCK_ROWS": tiles.depth, "PICKED": 8}
    for height, width, left_gathers in ((2048, 1536, True), (768, 2048, False)):
        constants = blocks | {"HEIGHT": height, "WIDTH": width, "LEFT_GATHERS": left_gathers}
        listed.append(cut_into(experts_backward._contract_rows, tiles, read, constants))
    constants = {"PICKED": 8, "WIDTH": 2048, "BLOCK": 1024, "IS_WEIGHTED": True}
    listed.append(make(expert_products._add_picks, read, constants))
    constants = {"WIDTH": 768, "BLOCK": 256, "SPLITS": 4}
    listed.append(make(expert_products._activate, read | {"projections": "f32"}, constants, 2))
    return listed


def head(is_hopper: bool) -> list[Variant]:
    """The head's cross entropy."""
    read = dict.fromkeys(("hidden", "weight", "logit_gradients"), "bf16") | {"bests": "i32"}
    read |= dict.fromkeys(("parts", "label_logits", "log_probabilities", "lses", "entropies", "alls", "label_terms"), "f32")
    read |= dict.fromkeys(("labels", "best_entries"), "i64")
    listed = [make(cross_entropy_tiles._merge, read, {"ROWS": 32, "TILES": 32})]
    for tiles in cross_entropy_tiles.HOPPER_TILES if is_hopper else cross_entropy_tiles.AMPERE_TILES:
        for kernel in (cross_entropy_tiles._summarise, cross_entropy_tiles._differentiate):
            constants = {"WIDTH": 2048, "GROUP": cross_entropy_tiles.GROUP}
            listed.append(cut_into(kernel, tiles, read, constants))
    return listed
