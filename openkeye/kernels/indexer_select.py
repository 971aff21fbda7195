"""`indexer_select` on a CUDA GPU: the k best keys of every query, without ever holding more than a bounded slab of scores.

Twin: `reference.indexer_select`. On Hopper with keys in e4m3 one kernel in CUDA C++ (`indexer_select.cu`) scores and selects
in one walk; everywhere else scores are written a slab of queries at a time and selected from. Letters: T queries, S keys,
J indexer heads, I indexer width, C columns of a slab.
"""

import ctypes
import functools

import torch
from torch import Tensor

from openkeye.kernels.build import check_launch, cuda_library
from openkeye.kernels.index_scores import check_supported, index_scores
from openkeye.kernels.quantize import quantize_vectors
from openkeye.kernels.reference import in_page_order
from openkeye.kernels.top_k import top_k_positions

SCRATCH_BYTES = 256 << 20
FUSED_HEADS, FUSED_WIDTH = 16, 64
# the published indexer's shape, which the fused kernel is built for
FUSED_TILE = 16
# queries of one of its blocks


def indexer_select(
    query_TJI: Tensor,
    gates_TJ: Tensor,
    key_SI: Tensor,
    k: int,
    query_positions_T: Tensor,
    max_scratch_bytes: int | None = None,
    first_keys_T: Tensor | None = None,
    key_scales_S: Tensor | None = None,
    page_table_P: Tensor | None = None,
    page_size: int = 64,
    gaps: tuple[Tensor, Tensor] | None = None,
    max_visible: int | None = None,
) -> Tensor:
    """See `reference.indexer_select`; the host waits for nothing.

    The fused kernel reads pages where it arranges the keys; for the others keys of a paged context are gathered first. Scratch
    is 256 MiB unless said.

    Args:
        gaps: starts and ends [T] of keys that a query does not see, of the positions' dtype and equal where it sees all.
        max_visible: keys that the query with the longest view sees, so that rows of scores are no longer; None: all keys.

    Raises:
        ValueError: shapes or dtypes that no kernel serves, or a page table that does not fit the cache.
    """
    if page_table_P is not None:
        _check_pages(key_SI, page_table_P, page_size)
    if key_scales_S is not None and query_TJI.dtype != torch.float8_e4m3fn:
        query_TJI, query_scales_TJ = quantize_vectors(query_TJI)
        gates_TJ = gates_TJ * query_scales_TJ
    check_supported(query_TJI, key_SI, key_scales_S)
    budget = max_scratch_bytes or SCRATCH_BYTES
    if key_scales_S is not None and gaps is None and query_TJI.shape[1:] == (FUSED_HEADS, FUSED_WIDTH):
        library = _fused_library()
        if library is not None and k <= library.indexer_select_max_k():
            bounds = (query_positions_T, budget, first_keys_T)
            return _select_fused(library, query_TJI, gates_TJ, key_SI, k, *bounds, key_scales_S, page_table_P, page_size)
    if page_table_P is not None:
        key_SI, key_scales_S = in_page_order(key_SI, key_scales_S, page_table_P, page_size)
    bounds = (query_positions_T, budget, first_keys_T)
    return select_by_slabs(query_TJI, gates_TJ, key_SI, k, *bounds, key_scales_S, gaps, max_visible)


def select_by_slabs(
    query_TJI: Tensor,
    gates_TJ: Tensor,
    key_SI: Tensor,
    k: int,
    query_positions_T: Tensor,
    max_scratch_bytes: int = SCRATCH_BYTES,
    first_keys_T: Tensor | None = None,
    key_scales_S: Tensor | None = None,
    gaps: tuple[Tensor, Tensor] | None = None,
    max_visible: int | None = None,
) -> Tensor:
    """Scores of as many queries as fit the scratch (at least 16), then their top k; queries as `index_scores` takes them."""
    num_queries, num_columns = query_TJI.shape[0], max_visible or key_SI.shape[0]
    slab = min(num_queries, max(16, max_scratch_bytes // (4 * max(1, num_columns))))
    scores = torch.empty(slab, num_columns, dtype=torch.float32, device=key_SI.device)
    picked = []
    for start in range(0, num_queries, slab):
        part = slice(start, start + slab)
        positions = query_positions_T[part]
        first = None if first_keys_T is None else first_keys_T[part].to(positions.dtype)
        rows = scores[: positions.shape[0]]
        its_gaps = None if gaps is None else (gaps[0][part], gaps[1][part])
        index_scores(query_TJI[part], gates_TJ[part], key_SI, positions, rows, first, key_scales_S, k, its_gaps)
        num_visible = positions + 1 if first is None else positions + 1 - first
        if its_gaps is not None:
            num_visible = num_visible - (its_gaps[1] - its_gaps[0])
        picked.append(_to_keys(top_k_positions(rows, k, num_visible), first, its_gaps))
    return torch.cat(picked)


def _to_keys(columns_RK: Tensor, first_R: Tensor | None, gaps: tuple[Tensor, Tensor] | None) -> Tensor:
    """The keys that columns stand for: the c-th that a query sees from its first on."""
    keys = columns_RK if first_R is None else columns_RK + first_R[:, None].int()
    if gaps is not None:
        start, end = (x[:, None].int() for x in gaps)
        keys = torch.where((keys < start) | (start == end), keys, keys + (end - start))
    return keys if keys is columns_RK else torch.where(columns_RK < 0, -1, keys)


@functools.cache
def _fused_library() -> ctypes.CDLL | None:
    library = cuda_library("indexer_select")
    if library is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int
        tensors, sizes = [pointer] * 7, [number] * 6
        library.indexer_select.argtypes = [*tensors, *sizes, *[pointer] * 3, *[number] * 2, pointer]
        library.indexer_select_tile_bytes.restype = ctypes.c_int64
        library.indexer_select_arranged_bytes.restype = ctypes.c_int64
    return library


def _select_fused(
    library: ctypes.CDLL,
    query_TJI: Tensor,
    gates_TJ: Tensor,
    key_SI: Tensor,
    k: int,
    query_positions_T: Tensor,
    max_scratch_bytes: int,
    first_keys_T: Tensor | None,
    key_scales_S: Tensor | None,
    page_table_P: Tensor | None,
    page_size: int,
) -> Tensor:
    num_keys = key_SI.shape[0] if page_table_P is None else page_table_P.shape[0] * page_size
    num_queries, device = query_TJI.shape[0], key_SI.device
    indices = torch.empty(num_queries, k, dtype=torch.int32, device=device)
    if not num_queries:
        return indices
    last, first = query_positions_T.contiguous(), first_keys_T
    if first is not None:
        first = first.to(last.dtype).contiguous()
    assert last.dtype in (torch.int32, torch.int64) and key_scales_S is not None
    tile_bytes, num_multiprocessors = library.indexer_select_tile_bytes(), _num_multiprocessors(device)
    num_tiles, tiles_at_once = -(-num_queries // FUSED_TILE), max(1, max_scratch_bytes // tile_bytes)
    # Whole waves of blocks where there are several.
    tiles_at_once = tiles_at_once // num_multiprocessors * num_multiprocessors or tiles_at_once
    tiles_at_once = min(num_tiles, tiles_at_once)
    tiles = torch.empty(tiles_at_once * tile_bytes, dtype=torch.uint8, device=device)
    arranged = torch.empty(library.indexer_select_arranged_bytes(num_keys), dtype=torch.uint8, device=device)
    query, gates, key, scales = (x.contiguous() for x in (query_TJI, gates_TJ.float(), key_SI, key_scales_S))
    with torch.cuda.device(device):
        status = library.indexer_select(
            query.data_ptr(),
            gates.data_ptr(),
            key.data_ptr(),
            scales.data_ptr(),
            None if first is None else first.data_ptr(),
            last.data_ptr(),
            None if page_table_P is None else page_table_P.data_ptr(),
            int(last.dtype == torch.int64),
            page_size,
            0 if page_table_P is None else page_table_P.stride(0),
            num_queries,
            num_keys,
            k,
            indices.data_ptr(),
            arranged.data_ptr(),
            tiles.data_ptr(),
            tiles_at_once,
            num_multiprocessors,
            torch.cuda.current_stream(device).cuda_stream,
        )
    check_launch(status, "indexer_select")
    return indices


def _check_pages(key_SI: Tensor, page_table_P: Tensor, page_size: int) -> None:
    is_whole = page_size > 0 and key_SI.shape[0] % page_size == 0
    if page_table_P.dtype != torch.int32 or page_table_P.dim() != 1 or not is_whole:
        raise ValueError(
            f"indexer_select serves one sequence's page table in int32 and caches of whole pages, got {page_table_P.dtype} of "
            f"shape {tuple(page_table_P.shape)} and {key_SI.shape[0]} slots in pages of {page_size}"
        )


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
