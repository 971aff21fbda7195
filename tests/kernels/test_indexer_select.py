"""The selection of every query against the plain twin: packed documents, bounded scratch, e4m3, short rows, plateaus."""

import pytest
import torch
from torch import Tensor

from openkeye.kernels import reference
from openkeye.kernels.index_scores import index_scores
from openkeye.kernels.indexer_select import indexer_select
from openkeye.kernels.quantize import quantize_vectors


def draw_case(num_queries: int, num_keys: int, heads: int, width: int, device: str, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(num_queries, heads, width, generator=generator)
    gates = torch.randn(num_queries, heads, generator=generator) * width**-0.5
    key = torch.randn(num_keys, width, generator=generator)
    return query.to(device), gates.to(device), key.to(device)


def assert_same_selection(picked: Tensor, query, gates, key, k, positions, first=None, scales=None, tolerance=1e-4) -> None:
    """Equal to the twin's, but for keys whose scores stand so near the k-th that rounding decides."""
    expected = reference.indexer_select(query, gates, key, k, positions, None, first, scales)
    scores = reference.index_scores(query, gates, key, scales)
    for row in (picked != expected).any(dim=1).nonzero().flatten().tolist():
        mine, twins = set(picked[row].tolist()), set(expected[row].tolist())
        assert len(mine) == len(twins) and picked[row].tolist() == sorted(mine - {-1}) + [-1] * (-1 in mine) * int(
            (picked[row] < 0).sum()
        )
        edge = scores[row][expected[row].long()].min()
        for key_index in mine ^ twins:
            assert abs(float(scores[row, key_index] - edge)) <= tolerance * max(1.0, abs(float(edge)))


@pytest.mark.parametrize("is_e4m3", [False, True])
@pytest.mark.parametrize(("num_queries", "num_keys", "k"), [(1, 1, 4), (33, 150, 16), (17, 63, 64), (40, 300, 7)])
def test_the_last_queries_of_a_context_select_as_the_twin_does(device, num_queries, num_keys, k, is_e4m3):
    query, gates, key = draw_case(num_queries, num_keys, 4, 16, device)
    positions = torch.arange(num_keys - num_queries, num_keys, device=device)
    scales = None
    if is_e4m3:
        key, scales = quantize_vectors(key)
    picked = indexer_select(query, gates, key, k, positions, 16 * 4 * num_keys, None, scales)
    assert_same_selection(picked, query, gates, key, k, positions, None, scales)


def test_packed_documents_never_see_each_other(device):
    lengths = [3, 70, 1, 41]
    query, gates, key = draw_case(sum(lengths), sum(lengths), 4, 16, device)
    starts = torch.tensor([0, 3, 73, 74])
    first = starts.repeat_interleave(torch.tensor(lengths)).to(device)
    positions = torch.arange(sum(lengths), device=device)
    picked = indexer_select(query, gates, key, 8, positions, None, first)
    assert_same_selection(picked, query, gates, key, 8, positions, first)
    taken = picked >= 0
    assert bool(((picked >= first[:, None]) & (picked <= positions[:, None]))[taken].all())
    for start, length in zip(starts.tolist(), lengths, strict=True):
        part = slice(start, start + length)
        alone = indexer_select(query[part], gates[part], key[part], 8, positions[:length])
        assert torch.equal(torch.where(alone < 0, -1, alone + start), picked[part])


def paged(key: Tensor, scales: Tensor | None, page_size: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """The keys in pages in disorder, NaN in every slot that is not theirs, and their page table."""
    num_keys = key.shape[0]
    num_pages = -(-num_keys // page_size)
    pages = torch.randperm(num_pages + 3, generator=torch.Generator().manual_seed(1))[:num_pages].to(key.device)
    slots = (pages[:, None] * page_size + torch.arange(page_size, device=key.device)).flatten()[:num_keys]
    cache = torch.full(((num_pages + 3) * page_size, key.shape[1]), float("nan"), device=key.device).to(key.dtype)
    cache[slots] = key
    if scales is not None:
        scales = torch.full((cache.shape[0],), float("nan"), device=key.device).index_copy(0, slots, scales)
    return cache, scales, pages.int()


@pytest.mark.parametrize("is_e4m3", [False, True])
def test_a_paged_context_selects_as_one_in_order(device, is_e4m3):
    query, gates, key = draw_case(33, 150, 4, 16, device)
    key, scales = quantize_vectors(key) if is_e4m3 else (key, None)
    positions = torch.arange(117, 150, device=device)
    in_order = indexer_select(query, gates, key, 16, positions, None, None, scales)
    cache, cache_scales, table = paged(key, scales, 16)
    picked = indexer_select(query, gates, cache, 16, positions, None, None, cache_scales, table, 16)
    assert torch.equal(picked, in_order)
    assert_same_selection(picked, query, gates, key, 16, positions, None, scales)


def test_page_tables_that_do_not_fit_are_refused(device):
    query, gates, key = draw_case(2, 48, 4, 16, device)
    positions, table = torch.arange(2, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    for pages, page_size, message in ((table.long(), 16, "got torch.int64"), (table, 36, "48 slots in pages of 36")):
        with pytest.raises(ValueError, match=message):
            indexer_select(query, gates, key, 2, positions, page_table_P=pages, page_size=page_size)


def test_plateaus_of_zeros_take_the_smaller_positions(device):
    query, gates, key = draw_case(20, 100, 4, 16, device)
    picked = indexer_select(query, torch.zeros_like(gates), key, 9, torch.arange(80, 100, device=device))
    assert torch.equal(picked.cpu(), torch.arange(9, dtype=torch.int32).expand(20, 9))


def test_rows_that_take_everything_are_not_scored(device):
    query, gates, key = draw_case(20, 40, 4, 16, device)
    positions = torch.arange(20, 40, device=device)
    out = torch.full((20, 40), float("nan"), device=device)
    index_scores(query, gates, key, positions, out, top_k=40)
    assert bool(out.isnan().all())


def test_scales_come_with_e4m3_only(device):
    query, gates, key = draw_case(2, 5, 4, 16, device)
    codes, scales = quantize_vectors(key)
    with pytest.raises(ValueError, match="queries and keys alike"):
        indexer_select(query, gates, codes, 2, torch.arange(2, device=device))
    with pytest.raises(ValueError, match="queries and keys alike"):
        indexer_select(query, gates, key, 2, torch.arange(2, device=device), None, None, scales)


# The matrix units add products of e4m3 with about fourteen bits.
E4M3_ROUNDING = 2e-3


@pytest.mark.gpu
class TestFused:
    """The kernel in CUDA C++, at the published indexer's shape."""

    @pytest.mark.parametrize(
        ("num_queries", "num_keys", "k"),
        [
            (1, 2049, 2048),
            (63, 5000, 2048),
            (33, 8192, 2048),
            (100, 40_000, 2048),
            (48, 131_072, 2048),
            (17, 3000, 1),
            (16, 70_001, 700),
        ],
    )
    def test_selects_as_the_twin_does(self, num_queries, num_keys, k):
        query, gates, key = draw_case(num_queries, num_keys, 16, 64, "cuda", num_keys)
        key, scales = quantize_vectors(key)
        positions = torch.arange(num_keys - num_queries, num_keys, device="cuda")
        picked = indexer_select(query, gates, key, k, positions, None, None, scales)
        assert_same_selection(picked, query, gates, key, k, positions, None, scales, E4M3_ROUNDING)

    @pytest.mark.parametrize("page_size", [64, 48])
    def test_a_paged_context_selects_as_one_in_order(self, page_size):
        query, gates, key = draw_case(50, 20_011, 16, 64, "cuda")
        key, scales = quantize_vectors(key)
        positions = torch.arange(20_011 - 50, 20_011, device="cuda")
        in_order = indexer_select(query, gates, key, 2048, positions, None, None, scales)
        cache, cache_scales, table = paged(key, scales, page_size)
        picked = indexer_select(query, gates, cache, 2048, positions, None, None, cache_scales, table, page_size)
        assert torch.equal(picked, in_order)

    def test_packed_documents(self):
        lengths = torch.tensor([2000, 30, 20_000, 5, 9000])
        total = int(lengths.sum())
        query, gates, key = draw_case(total, total, 16, 64, "cuda")
        key, scales = quantize_vectors(key)
        first = (lengths.cumsum(0) - lengths).repeat_interleave(lengths).cuda()
        positions = torch.arange(total, device="cuda")
        picked = indexer_select(query, gates, key, 2048, positions, None, first, scales)
        rows = torch.tensor([0, 1999, 2000, 2029, 2030, 4077, 4078, 4079, 15_000, 22_029, 22_034, 24_100, total - 1]).cuda()
        assert_same_selection(
            picked[rows], query[rows], gates[rows], key, 2048, positions[rows], first[rows], scales, E4M3_ROUNDING
        )

    @pytest.mark.parametrize("kind", ["zeros", "rising", "falling", "one_head", "large"])
    def test_hard_scores_stay_exact(self, kind):
        num_keys, num_queries = 50_000, 37
        query, gates, key = draw_case(num_queries, num_keys, 16, 64, "cuda")
        if kind == "zeros":
            gates = torch.zeros_like(gates)
        if kind in ("rising", "falling"):
            ramp = torch.linspace(0.5, 400.0, num_keys, device="cuda")
            key = torch.ones_like(key) * (ramp if kind == "rising" else ramp.flip(0))[:, None]
            query, gates = query.abs(), gates.abs()
        if kind == "one_head":
            gates[:, 1:] = 0
            query[:, 0] = 0
            query[:, 0, 0] = 1
        if kind == "large":
            gates = gates * 1e30
        key, scales = quantize_vectors(key)
        positions = torch.arange(num_keys - num_queries, num_keys, device="cuda")
        picked = indexer_select(query, gates, key, 2048, positions, None, None, scales)
        assert_same_selection(picked, query, gates, key, 2048, positions, None, scales, E4M3_ROUNDING)

    def test_the_same_input_gives_the_same_bits(self):
        query, gates, key = draw_case(64, 30_000, 16, 64, "cuda")
        key, scales = quantize_vectors(key)
        positions = torch.arange(30_000 - 64, 30_000, device="cuda")
        first = indexer_select(query, gates, key, 2048, positions, None, None, scales)
        for _ in range(24):
            assert torch.equal(first, indexer_select(query, gates, key, 2048, positions, None, None, scales))
