"""Index scores of one token a request over paged caches, against the plain twin."""

import pytest
import torch
from torch import Tensor

from openkeye.kernels import reference
from openkeye.kernels.indexer_decode import IndexerPlan, indexer_decode, indexer_plan
from openkeye.kernels.quantize import quantize_vectors

LENGTHS = [63, 0, 300, 1, 129]
# Triton's interpreter multiplies bfloat16 as if it were integers.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16


def paged_case(
    lengths: list[int], dtype: torch.dtype, device: str, page: int = 16, heads: int = 16, width: int = 64, seed: int = 0
) -> tuple[Tensor, ...]:
    """Query, gates, a cache whose unused slots are NaN, its scales, a page table whose unused entries lead nowhere."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // page) for length in lengths]
    num_pages = sum(counts) + 2
    pages = torch.randperm(num_pages, generator=generator).tolist()
    key = torch.full((num_pages * page, width), float("nan"))
    scales = torch.full((num_pages * page,), float("nan"))
    table = torch.full((len(lengths), max(counts) + 1), 2**30, dtype=torch.int32)
    for request, length in enumerate(lengths):
        for number in range(counts[request]):
            table[request, number] = pages.pop()
            first, used = int(table[request, number]) * page, min(page, length - number * page)
            key[first : first + used] = torch.randn(used, width, generator=generator)
    if dtype == torch.float8_e4m3fn:
        is_used = ~key[:, 0].isnan()
        key8 = key.to(dtype)
        key8[is_used], scales[is_used] = reference.quantize_vectors(key[is_used])
        key = key8
    query = torch.randn(len(lengths), heads, width, generator=generator)
    query = query if dtype == torch.float8_e4m3fn else query.to(dtype)
    gates = torch.randn(len(lengths), heads, generator=generator) * width**-0.5
    return tuple(tensor.to(device) for tensor in (query, gates, key.to(dtype), scales, table))


def compare(lengths: list[int], dtype: torch.dtype, device: str, plan: IndexerPlan | None = None, **shape: int) -> None:
    query, gates, key, scales, table = paged_case(lengths, dtype, device, **shape)
    page, max_len = shape.get("page", 16), max(lengths) + 5
    given = scales if dtype == torch.float8_e4m3fn else None
    lengths_B = torch.tensor(lengths, dtype=torch.int32, device=device)
    out = torch.full((len(lengths), max_len + 3), float("nan"), device=device)
    result = indexer_decode(query, gates, key, table, lengths_B, max_len, given, page, out, plan)
    expected = torch.full_like(out, float("nan"))
    reference.indexer_decode(query, gates, key, table, lengths_B, max_len, given, page, expected)
    assert result is out and torch.equal(out.isnan(), expected.isnan()), "columns beyond the length are left alone"
    assert_scores_close(out, expected, (query, gates, key, table, lengths_B, max_len, given, page))


def assert_scores_close(out: Tensor, expected: Tensor, arguments: tuple) -> None:
    """Equal but for the rounding of sums, in which all that is added counts, whatever its sign."""
    query, gates, key, *rest = arguments
    signless = (query.abs(), gates.abs(), key.float().abs().to(key.dtype), *rest)
    added = reference.indexer_decode(*signless, torch.full_like(out, float("nan")))
    # On Hopper the matrix unit adds e4m3 products with about 14 bits.
    is_coarse = key.dtype == torch.float8_e4m3fn and out.is_cuda
    off = (out - expected).abs() > (2**-14 if is_coarse else 2**-18) * added + 1e-5
    assert not bool(off.any()), f"{int(off.sum())} scores are off, by up to {float((out - expected).abs().nan_to_num().max())}"


@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float8_e4m3fn])
@pytest.mark.parametrize("num_programs", [1, 4, 50])
def test_scores_equal_their_twin_however_the_blocks_are_shared(device, dtype, num_programs):
    compare(LENGTHS, dtype, device, IndexerPlan(64, num_programs, 4, 3))


@pytest.mark.parametrize("dtype", [HALF, torch.float8_e4m3fn])
@pytest.mark.parametrize(("heads", "width", "page"), [(1, 32, 48), (4, 128, 64), (64, 64, 16), (6, 64, 128)])
def test_other_shapes_equal_their_twin(device, dtype, heads, width, page):
    compare([70, 200], dtype, device, heads=heads, width=width, page=page)


def test_gpus_without_fp8_multiply_halves_to_the_same_scores(device, monkeypatch):
    monkeypatch.setattr("openkeye.kernels.indexer_decode.has_fp8", lambda device: False)
    compare(LENGTHS, torch.float8_e4m3fn, device)


def test_a_quantised_query_with_its_scales_in_the_gates_gives_the_same(device):
    query, gates, key, scales, table = paged_case(LENGTHS, torch.float8_e4m3fn, device)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    query8, query_scale = quantize_vectors(query)
    zeros = [torch.zeros(len(LENGTHS), 300, device=device) for _ in range(2)]
    inside = indexer_decode(query, gates, key, table, lengths, 300, scales, 16, zeros[0])
    before = indexer_decode(query8, gates * query_scale, key, table, lengths, 300, scales, 16, zeros[1])
    assert torch.equal(inside, before)


def test_all_requests_empty_writes_nothing(device):
    query, gates, key, _, table = paged_case([40, 40], torch.float32, device)
    out = torch.full((2, 40), float("nan"), device=device)
    indexer_decode(query, gates, key, table, torch.zeros(2, dtype=torch.int32, device=device), 40, None, 16, out)
    assert out.isnan().all()


def test_a_length_beyond_max_len_stops_at_max_len(device):
    query, gates, key, _, table = paged_case([90], torch.float32, device)
    out = torch.full((1, 96), float("nan"), device=device)
    indexer_decode(query, gates, key, table, torch.tensor([90], dtype=torch.int32, device=device), 50, None, 16, out)
    assert out[0, :50].isfinite().all() and out[0, 50:].isnan().all()


def test_what_is_not_served_is_refused_in_one_sentence(device):
    query, gates, key, scales, table = paged_case([40, 40], torch.float32, device)
    lengths = torch.tensor([40, 40], dtype=torch.int32, device=device)
    cases = [
        ((query[..., :48], gates, key, table, lengths, 40, None, 16), "widths of 32, 64 or 128 and up to 64 heads"),
        ((query.half(), gates, key, table, lengths, 40, None, 16), "got queries in torch.float16 and keys in torch.float32"),
        (
            (query, gates, key, table, lengths, 40, scales, 16),
            "a scale for each slot, without gaps, with keys in float8_e4m3fn only",
        ),
        ((query, gates, key, table, lengths, 40, None, 24), "page sizes that are multiples of 16, got 24"),
        ((query, gates, key, table[:1], lengths, 40, None, 16), "got 2 queries, a page table of"),
        ((query, gates, key, table, lengths.long(), 40, None, 16), "int32 without gaps, got torch.int32 and torch.int64"),
        ((query, gates, key, table, lengths, 4000, None, 16), "too few for 4000 keys"),
        ((query, gates, key, table, lengths, 40, None, 16, query[:, :, 0]), "writes 2 rows of 40 columns side by side"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            indexer_decode(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_captured_graph_serves_other_lengths_and_page_tables():
    query, gates, key, scales, table = paged_case([300] * 3, torch.float8_e4m3fn, "cuda")
    lengths = torch.tensor([300, 300, 300], dtype=torch.int32, device="cuda")
    out = torch.full((3, 304), float("nan"), device="cuda")
    arguments = (query, gates, key, table, lengths, 304, scales, 16, out)
    indexer_decode(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indexer_decode(*arguments)
    for new_lengths in ([0, 63, 300], [1, 200, 0]):
        lengths.copy_(torch.tensor(new_lengths, dtype=torch.int32))
        table.copy_(table[torch.tensor([1, 2, 0], device="cuda")])
        out.fill_(float("nan"))
        graph.replay()
        expected = reference.indexer_decode(*arguments[:-1], torch.full_like(out, float("nan")))
        assert torch.equal(out.isnan(), expected.isnan())
        assert_scores_close(out, expected, arguments[:-1])


def test_the_plan_does_not_depend_on_lengths():
    key = torch.zeros(64, 64, dtype=torch.float8_e4m3fn)
    assert indexer_plan(key) == indexer_plan(key[:16])
