"""The Triton kernels of selected attention against their plain twins."""

import pytest
import torch
from torch import Tensor

from openkeye.kernels import reference
from openkeye.kernels import sparse_attention as module
from openkeye.kernels.sparse_attention import sparse_attention, sparse_attention_with_lse
from openkeye.kernels.unions import TILE, build_unions


def draw_lists(num_queries: int, num_keys: int, num_picked: int, shares: float, device: str, seed: int = 0) -> Tensor:
    """Causal-free lists: a share of each list is common to its tile, the rest is its own; some rows end in pads."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for query in range(num_queries):
        common = torch.Generator().manual_seed(seed + 1000 + query // TILE)
        num_common = int(shares * num_picked)
        shared = torch.randperm(num_keys, generator=common)[:num_common]
        own = torch.randperm(num_keys, generator=generator)[: num_picked - num_common]
        row = torch.cat([shared, own]).unique()
        if query % 5 == 4:
            row = row[: len(row) // 2]
        rows.append(torch.cat([row, torch.full((num_picked - len(row),), -1)]))
    return torch.stack(rows).int().to(device)


def expected_unions(indices_TK: Tensor) -> list[dict[int, int]]:
    """Key -> mask of every tile, by hand."""
    tiles: list[dict[int, int]] = [{} for _ in range(-(-indices_TK.shape[0] // TILE))]
    for query, row in enumerate(indices_TK.tolist()):
        for key in row:
            if key >= 0:
                tiles[query // TILE][key] = tiles[query // TILE].get(key, 0) | 1 << query % TILE
    return tiles


@pytest.mark.parametrize("shares", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("scratch_bytes", [1, 1 << 20])
def test_unions_hold_every_key_once_with_its_queries(device, shares, scratch_bytes):
    indices = draw_lists(37, 151, 24, shares, device)
    indices[0, 0] = 150
    unions = build_unions(indices, 151, scratch_bytes)
    for tile, expected in enumerate(expected_unions(indices)):
        count = int(unions.counts_N[tile])
        keys, masks = unions.keys_NU[tile, :count].tolist(), unions.masks_NU[tile, :count].tolist()
        assert keys == sorted(expected) and dict(zip(keys, masks, strict=True)) == expected


def draw(shape: tuple[int, ...], device: str, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize(
    ("heads", "groups", "width"),
    [(8, 1, 64), (4, 4, 64), (9, 3, 64), (16, 1, 64), (8, 2, 128), (8, 2, 32), (9, 3, 32), (4, 1, 16)],
)
@pytest.mark.parametrize("num_queries", [1, 15, 33])
def test_attention_equals_its_twin(device, heads, groups, width, num_queries):
    query = draw((num_queries, heads, width), device, torch.float32, 1)
    key, value = (draw((100, groups, width), device, torch.float32, seed) for seed in (2, 3))
    indices = draw_lists(num_queries, 100, 20, 0.5, device)
    output, lse = sparse_attention_with_lse(query, key, value, indices, width**-0.5)
    expected = reference.sparse_attention(query, key, value, indices, width**-0.5)
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=1e-4)
    scores = torch.einsum("thd,shd->ths", query, key.repeat_interleave(heads // groups, dim=1)) * width**-0.5
    named = torch.zeros(num_queries, 101, dtype=torch.bool, device=device)
    named.scatter_(1, torch.where(indices < 0, 100, indices).long(), True)
    expected_lse = scores.masked_fill(~named[:, None, :100], -torch.inf).logsumexp(dim=-1)
    torch.testing.assert_close(lse, expected_lse, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize(("heads", "groups", "width"), [(8, 1, 64), (9, 3, 64), (20, 1, 64), (8, 2, 128), (8, 2, 32)])
def test_tiles_that_share_little_are_served_query_by_query(device, monkeypatch, share, heads, groups, width):
    monkeypatch.setattr(module, "TRITON_SHARE", share)
    monkeypatch.setattr(module, "CUDA_SHARE", share)
    query = draw((37, heads, width), device, torch.float32, 1)
    key, value = (draw((400, groups, width), device, torch.float32, seed) for seed in (2, 3))
    # The first tile's lists are alike, the others' are not: with a share of a half both kernels have work in one call.
    alike, unlike = draw_lists(16, 200, 20, 1.0, device), draw_lists(21, 400, 20, 0.0, device)
    indices = torch.cat([alike, unlike])
    indices[20] = -1
    value[300:], key[300:] = float("nan"), float("nan")
    indices[indices >= 300] -= 300
    indices = torch.stack([torch.nn.functional.pad(row.unique(), (20 - len(row.unique()), 0), value=-1) for row in indices])
    output, lse = sparse_attention_with_lse(query, key, value, indices, width**-0.5)
    expected = reference.sparse_attention(query, key[:300], value[:300], indices, width**-0.5)
    expected[20] = 0.0
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=1e-4)
    assert torch.isneginf(lse[20]).all() and torch.isfinite(lse[:20]).all() and torch.isfinite(lse[21:]).all()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_keys_in_pages_equal_keys_in_a_row(device, monkeypatch, share):
    monkeypatch.setattr(module, "TRITON_SHARE", share)
    monkeypatch.setattr(module, "CUDA_SHARE", share)
    page_size, lengths, num_queries = 16, (90, 40), (33, 7)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3)).int()
    table = torch.stack([order[:6], order[6:12]]).to(device)
    cache = torch.full((2, 20 * page_size, 2, 64), float("nan"), device=device)
    queries, rows, expected, sequences = [], [], [], []
    for number, (length, count) in enumerate(zip(lengths, num_queries, strict=True)):
        both = draw((2, length, 2, 64), device, torch.float32, 10 + number)
        position = torch.arange(length, device=device)
        cache[:, table[number].long()[position // page_size] * page_size + position % page_size] = both
        num_rows = -(-count // TILE) * TILE
        query = draw((num_rows, 8, 64), device, torch.float32, 20 + number)
        lists = draw_lists(num_rows, length, 12, 0.5, device, seed=number)
        # Whole tiles for each sequence: what is missing are rows that name nothing.
        lists[count:] = -1
        queries.append(query)
        rows.append(lists)
        expected.append(reference.sparse_attention(query, *both, lists, 0.1)[:count])
        sequences += [number] * (num_rows // TILE)
    sequence_N = torch.tensor(sequences, dtype=torch.int32, device=device)
    arguments = torch.cat(queries), cache[0], cache[1], torch.cat(rows), 0.1
    output = sparse_attention(*arguments, page_table_BP=table, page_size=page_size, sequence_N=sequence_N)
    parts = output.split([len(part) for part in rows])
    for part, other in zip(parts, expected, strict=True):
        torch.testing.assert_close(part[: len(other)], other, atol=2e-6, rtol=1e-4)
        assert (part[len(other) :] == 0).all()


def test_packed_documents_need_nothing_special(device):
    lengths = (21, 5, 40)
    query, key, value = (
        draw((sum(lengths), 8, 64), device, torch.float32, seed)[:, :heads] for seed, heads in ((1, 8), (2, 2), (3, 2))
    )
    rows, expected, first = [], [], 0
    for number, length in enumerate(lengths):
        # Tiles straddle the documents; each query sees its own document up to itself.
        lists = draw_lists(length, length, 10, 0.5, device, seed=number)
        lists = (
            torch.where(lists <= torch.arange(length, device=device)[:, None], lists, -1).sort(dim=1, descending=True).values
        )
        part = slice(first, first + length)
        expected.append(reference.sparse_attention(query[part], key[part], value[part], lists, 0.1).nan_to_num())
        rows.append(torch.where(lists >= 0, lists + first, -1))
        first += length
    output = sparse_attention(query, key, value, torch.cat(rows), 0.1)
    torch.testing.assert_close(output, torch.cat(expected), atol=2e-6, rtol=1e-4)


def test_the_same_input_gives_the_same_bits(device):
    query = draw((40, 8, 64), device, torch.float32, 1)
    key = draw((120, 1, 64), device, torch.float32, 2)
    indices = draw_lists(40, 120, 16, 0.5, device)
    first = sparse_attention_with_lse(query, key, key, indices, 0.1)
    for _ in range(3 if device == "cpu" else 25):
        again = sparse_attention_with_lse(query, key, key, indices, 0.1)
        assert all(map(torch.equal, first, again))


def test_keys_and_values_may_be_slices_of_a_cache(device):
    query = draw((20, 8, 64), device, torch.float32, 1)
    both = draw((90, 2, 2, 64), device, torch.float32, 2)
    indices = draw_lists(20, 90, 16, 0.5, device)
    key, value = both[:, 0], both[:, 1]
    expected = reference.sparse_attention(query, key, value, indices, 0.1)
    torch.testing.assert_close(sparse_attention(query, key, value, indices, 0.1), expected, atol=2e-6, rtol=1e-4)


def test_a_query_that_selected_nothing_gets_zeros(device):
    query = draw((18, 8, 64), device, torch.float32, 1)
    key = draw((50, 1, 64), device, torch.float32, 2)
    indices = draw_lists(18, 50, 8, 0.5, device)
    indices[3] = -1
    output, lse = sparse_attention_with_lse(query, key, key, indices, 0.1)
    assert torch.equal(output[3], torch.zeros_like(output[3])) and torch.isneginf(lse[3]).all()
    assert torch.isfinite(output).all() and torch.isfinite(lse[:3]).all()


def test_what_no_list_names_is_never_touched(device):
    query = draw((16, 8, 64), device, torch.float32, 1)
    key = draw((60, 1, 64), device, torch.float32, 2)
    indices = draw_lists(16, 30, 8, 0.5, device)
    key[30:] = float("nan")
    assert torch.isfinite(sparse_attention(query, key, key, indices, 0.1)).all()


def test_unsupported_tensors_are_refused_in_one_sentence(device):
    indices = torch.zeros(4, 2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="heads of 16 or 32 or 64 or 128"):
        sparse_attention(*(torch.zeros(4, 2, 48, device=device),) * 3, indices, 1.0)
    with pytest.raises(ValueError, match="same number of query heads"):
        sparse_attention(torch.zeros(4, 5, 64, device=device), *(torch.zeros(4, 2, 64, device=device),) * 2, indices, 1.0)
    with pytest.raises(ValueError, match="scales above zero"):
        sparse_attention(torch.zeros(4, 2, 64, device=device), *(torch.zeros(4, 2, 64, device=device),) * 2, indices, 0.0)
    with pytest.raises(ValueError, match="float64"):
        sparse_attention(*(torch.zeros(4, 2, 64, device=device, dtype=torch.float64),) * 3, indices, 1.0)
    with pytest.raises(ValueError, match=r"lists in int32, got torch\.int64"):
        sparse_attention(*(torch.zeros(4, 2, 64, device=device),) * 3, indices.long(), 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "groups", "width"), [(32, 4, 128), (64, 4, 128), (8, 2, 128), (8, 1, 64)])
@pytest.mark.parametrize("num_queries", [1, 63, 500])
def test_half_precision_is_as_near_as_its_rounding(device, dtype, heads, groups, width, num_queries):
    query = draw((num_queries, heads, width), device, dtype, 1)
    key, value = (draw((3000, groups, width), device, dtype, seed) for seed in (2, 3))
    for shares in (0.0, 0.5, 1.0):
        indices = draw_lists(num_queries, 3000, 300, shares, device)
        output, lse = sparse_attention_with_lse(query, key, value, indices, width**-0.5)
        expected = reference.sparse_attention(query.float(), key.float(), value.float(), indices, width**-0.5)
        error = (output.float() - expected).norm() / expected.norm()
        assert error < 1e-2 and torch.isfinite(lse).all()
