"""The logits of `cross_entropy` in tiles that never leave the chip as logits, in Triton, on any CUDA GPU.

Forward, a tile leaves for each token its largest logit, the sums of exp and of exp times distance, and its best entry; a
second kernel merges the tiles of a token in their order: the same bits on every run. Backward, a tile leaves its gradients.

Letters: T tokens, D width, V vocabulary; in kernels M tokens, N entries and K depth of a tile, B tiles of a step.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from openkeye.kernels.expert_products import FLOAT32_TILES, Tiles, load_tile, takes_large_tiles

# For many tokens and for few.
HOPPER_TILES = (Tiles(128, 256, 64, 8, 3), Tiles(64, 128, 64, 4, 4))
AMPERE_TILES = (Tiles(128, 128, 64, 8, 4), Tiles(64, 128, 64, 4, 4))
GROUP = 16
# tiles of tokens whose programs run side by side over the same entries
MERGE_ROWS = 32
MERGE_TILES = 32


def choose_tiles(hidden_TD: Tensor) -> Tiles:
    """The measured choice."""
    if hidden_TD.dtype == torch.float32:
        return FLOAT32_TILES[-1]
    return (HOPPER_TILES if takes_large_tiles(hidden_TD.device) else AMPERE_TILES)[hidden_TD.shape[0] <= 64]


def statistics(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, max_scratch_bytes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of the labels, log-sum-exps, entropies (float32) and best entries (int64), each [T]."""
    num_tokens, width = hidden_TD.shape
    vocabulary, device = weight_VD.shape[0], hidden_TD.device
    tiles = choose_tiles(hidden_TD)
    num_tiles = triton.cdiv(vocabulary, tiles.columns)
    # A label beyond the vocabulary stays nan.
    log_probability = torch.full((num_tokens,), math.nan, dtype=torch.float32, device=device)
    lse, entropy = (torch.empty(num_tokens, dtype=torch.float32, device=device) for _ in range(2))
    best = torch.empty(num_tokens, dtype=torch.int64, device=device)
    block = min(num_tokens, max(tiles.rows, max_scratch_bytes // (16 * num_tiles)))
    parts = torch.empty(num_tiles, 3, block, dtype=torch.float32, device=device)
    bests = torch.empty(num_tiles, block, dtype=torch.int32, device=device)
    for start in range(0, num_tokens, block):
        rows = slice(start, min(start + block, num_tokens))
        size = rows.stop - rows.start
        _summarise[(triton.cdiv(size, tiles.rows) * num_tiles,)](
            hidden_TD[rows],
            weight_VD,
            labels_T[rows],
            parts,
            bests,
            log_probability[rows],
            size,
            vocabulary,
            block,
            num_tiles,
            WIDTH=width,
            GROUP=GROUP,
            **_constants(tiles, hidden_TD),
        )
        _merge[(triton.cdiv(size, MERGE_ROWS),)](
            parts,
            bests,
            labels_T[rows],
            log_probability[rows],
            lse[rows],
            entropy[rows],
            best[rows],
            size,
            block,
            num_tiles,
            ROWS=MERGE_ROWS,
            TILES=MERGE_TILES,
            num_warps=4,
        )
    return log_probability, lse, entropy, best


def fill_logit_gradients(
    logit_gradients_RC: Tensor,
    hidden_RD: Tensor,
    entries_CD: Tensor,
    first: int,
    terms: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """See `cross_entropy._fill_logit_gradients`."""
    num_tokens, width = hidden_RD.shape
    num_entries = entries_CD.shape[0]
    tiles = choose_tiles(hidden_RD)
    num_tiles = triton.cdiv(num_entries, tiles.columns)
    _differentiate[(triton.cdiv(num_tokens, tiles.rows) * num_tiles,)](
        hidden_RD,
        entries_CD,
        *terms,
        logit_gradients_RC,
        first,
        num_tokens,
        num_entries,
        num_tiles,
        WIDTH=width,
        GROUP=GROUP,
        **_constants(tiles, hidden_RD),
    )


def _constants(tiles: Tiles, hidden: Tensor) -> dict[str, int | str]:
    """What both products' kernels are told alike."""
    return {
        "BLOCK_ROWS": tiles.rows,
        "BLOCK_COLUMNS": tiles.columns,
        "BLOCK_DEPTH": tiles.depth,
        "PRECISION": "ieee" if hidden.dtype == torch.float32 else "tf32",
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


@triton.jit
def _place(num_tokens, num_tiles, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Which tile of tokens and which of entries this program has: GROUP tiles of tokens take the entries in turn."""
    num_row_tiles = (num_tokens + BLOCK_ROWS - 1) // BLOCK_ROWS
    group = tl.program_id(0) // (GROUP * num_tiles)
    in_group = tl.program_id(0) % (GROUP * num_tiles)
    size = tl.minimum(num_row_tiles - group * GROUP, GROUP)
    return group * GROUP + in_group % size, in_group // size


@triton.jit
def _logits(
    hidden,
    weight,
    row_M,
    column_N,
    num_tokens,
    num_entries,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of logits, fp32. Beyond the last token or entry the last one stands in."""
    IS_DEEP: tl.constexpr = WIDTH % BLOCK_DEPTH == 0
    depth_K = tl.arange(0, BLOCK_DEPTH)
    hidden_MK = hidden + tl.minimum(row_M, num_tokens - 1).to(tl.int64)[:, None] * WIDTH + depth_K[None, :]
    weight_KN = weight + tl.minimum(column_N, num_entries - 1).to(tl.int64)[None, :] * WIDTH + depth_K[:, None]
    logits_MN = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, WIDTH, BLOCK_DEPTH):
        is_depth_K = start + depth_K < WIDTH
        rows_MK = load_tile(hidden_MK, is_depth_K[None, :], IS_DEEP)
        entries_KN = load_tile(weight_KN, is_depth_K[:, None], IS_DEEP)
        logits_MN = tl.dot(rows_MK, entries_KN, logits_MN, input_precision=PRECISION)
        hidden_MK += BLOCK_DEPTH
        weight_KN += BLOCK_DEPTH
    return logits_MN


@triton.jit
def _summarise(
    hidden,
    weight,
    labels,
    parts,
    bests,
    label_logits,
    num_tokens,
    num_entries,
    room,
    num_tiles,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tile, tile = _place(num_tokens, num_tiles, GROUP, BLOCK_ROWS)
    row_M = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    label_M = tl.load(labels + row_M, mask=row_M < num_tokens, other=-1).to(tl.int32)
    # What is left out is not computed where all of a tile is.
    if tl.max(label_M, 0) >= 0:
        column_N = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        logits_MN = _logits(
            hidden,
            weight,
            row_M,
            column_N,
            num_tokens,
            num_entries,
            WIDTH,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_DEPTH,
            PRECISION,
        )
        is_label_here = (label_M >= tile * BLOCK_COLUMNS) & (label_M < (tile + 1) * BLOCK_COLUMNS) & (label_M < num_entries)
        if tl.max(is_label_here.to(tl.int32), 0) > 0:
            label_logit_M = tl.sum(tl.where(column_N[None, :] == label_M[:, None], logits_MN, 0.0), 1)
            tl.store(label_logits + row_M, label_logit_M, mask=is_label_here)
        logits_MN = tl.where((column_N < num_entries)[None, :], logits_MN, float("-inf"))
        top_M = tl.max(logits_MN, 1)
        best_M = tl.min(tl.where(logits_MN == top_M[:, None], column_N[None, :], 0x7FFFFFFF), 1)
        # A column beyond the vocabulary is infinitely far below: its exp is zero, and no distance is taken of it.
        distance_MN = tl.where((column_N < num_entries)[None, :], logits_MN - top_M[:, None], 0.0)
        exp_MN = tl.where((column_N < num_entries)[None, :], tl.exp2(distance_MN * 1.4426950408889634), 0.0)
        place_M = tile.to(tl.int64) * room + row_M
        part_M = parts + tile.to(tl.int64) * 3 * room + row_M
        is_row_M = row_M < num_tokens
        tl.store(bests + place_M, best_M, mask=is_row_M)
        tl.store(part_M, top_M, mask=is_row_M)
        tl.store(part_M + room, tl.sum(exp_MN, 1), mask=is_row_M)
        tl.store(part_M + 2 * room, tl.sum(exp_MN * distance_MN, 1), mask=is_row_M)


@triton.jit
def _merge(
    parts,
    bests,
    labels,
    log_probabilities,
    lses,
    entropies,
    best_entries,
    num_tokens,
    room,
    num_tiles,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """The softmax over the vocabulary from those over its tiles; the label's logit becomes its log-probability."""
    row_M = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row_M = row_M < num_tokens
    label_M = tl.load(labels + row_M, mask=is_row_M, other=-1)
    is_learnt_M = label_M >= 0
    top_M = tl.full([ROWS], float("-inf"), tl.float32)
    sum_M = tl.zeros([ROWS], tl.float32)
    far_M = tl.zeros([ROWS], tl.float32)
    best_M = tl.zeros([ROWS], tl.int32)
    for first in range(0, num_tiles, TILES):
        tile_B = first + tl.arange(0, TILES)
        is_part = (tile_B < num_tiles)[:, None] & is_learnt_M[None, :]
        part_BM = parts + tile_B.to(tl.int64)[:, None] * 3 * room + row_M[None, :]
        top_BM = tl.load(part_BM, mask=is_part, other=float("-inf"))
        sum_BM = tl.load(part_BM + room, mask=is_part, other=0.0)
        far_BM = tl.load(part_BM + 2 * room, mask=is_part, other=0.0)
        best_BM = tl.load(bests + tile_B.to(tl.int64)[:, None] * room + row_M[None, :], mask=is_part, other=0x7FFFFFFF)
        step_top_M = tl.max(top_BM, 0)
        step_best_M = tl.min(tl.where(top_BM == step_top_M[None, :], best_BM, 0x7FFFFFFF), 0)
        best_M = tl.where(step_top_M > top_M, step_best_M, best_M)
        new_top_M = tl.maximum(top_M, step_top_M)
        # How far the old tops lie below the new one; what has no part yet or at all adds nothing.
        fall_M = tl.where(top_M > float("-inf"), top_M - new_top_M, 0.0)
        fall_BM = tl.where(is_part, top_BM - new_top_M[None, :], 0.0)
        shrink_M = tl.exp(fall_M)
        shrink_BM = tl.exp(fall_BM)
        far_M = shrink_M * (far_M + fall_M * sum_M) + tl.sum(shrink_BM * (far_BM + fall_BM * sum_BM), 0)
        sum_M = shrink_M * sum_M + tl.sum(shrink_BM * sum_BM, 0)
        top_M = new_top_M
    sum_M = tl.where(is_learnt_M, sum_M, 1.0)
    lse_M = top_M + tl.log(sum_M)
    label_logit_M = tl.load(log_probabilities + row_M, mask=is_learnt_M, other=0.0)
    entropy_M = tl.log(sum_M) - far_M / sum_M
    tl.store(log_probabilities + row_M, tl.where(is_learnt_M, label_logit_M - lse_M, 0.0), mask=is_row_M)
    tl.store(lses + row_M, tl.where(is_learnt_M, lse_M, 0.0), mask=is_row_M)
    tl.store(entropies + row_M, tl.where(is_learnt_M, entropy_M, 0.0), mask=is_row_M)
    tl.store(best_entries + row_M, tl.where(is_learnt_M, best_M, -1).to(tl.int64), mask=is_row_M)


@triton.jit
def _differentiate(
    hidden,
    weight,
    lses,
    alls,
    label_terms,
    labels,
    logit_gradients,
    first_entry,
    num_tokens,
    num_entries,
    num_tiles,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tile, tile = _place(num_tokens, num_tiles, GROUP, BLOCK_ROWS)
    row_M = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column_N = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_row_M = row_M < num_tokens
    label_M = tl.load(labels + row_M, mask=is_row_M, other=-1).to(tl.int32)
    place_MN = logit_gradients + row_M.to(tl.int64)[:, None] * num_entries + column_N[None, :]
    is_stored = is_row_M[:, None] & (column_N < num_entries)[None, :]
    if tl.max(label_M, 0) < 0:
        tl.store(place_MN, tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], logit_gradients.dtype.element_ty), mask=is_stored)
    else:
        logits_MN = _logits(
            hidden,
            weight,
            row_M,
            column_N,
            num_tokens,
            num_entries,
            WIDTH,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_DEPTH,
            PRECISION,
        )
        lse_M = tl.load(lses + row_M, mask=is_row_M, other=float("inf"))
        all_M = tl.load(alls + row_M, mask=is_row_M, other=0.0)
        label_term_M = tl.load(label_terms + row_M, mask=is_row_M, other=0.0)
        probability_MN = tl.exp2((logits_MN - lse_M[:, None]) * 1.4426950408889634)
        is_label = (column_N + first_entry)[None, :] == label_M[:, None]
        gradient_MN = probability_MN * all_M[:, None] + tl.where(is_label, label_term_M[:, None], 0.0)
        # The logits of a token without a label may be anything, and its terms are zero.
        gradient_MN = tl.where((label_M >= 0)[:, None], gradient_MN, 0.0)
        tl.store(place_MN, gradient_MN.to(logit_gradients.dtype.element_ty), mask=is_stored)
