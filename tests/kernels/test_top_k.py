"""Every implementation of the selection against the plain twin: ties, plateaus, ragged rows, extreme scores, odd memory."""

import pytest
import torch

from openkeye.kernels import reference, top_k
from openkeye.kernels.build import cuda_library

needs_library = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda_library("top_k") is None, reason="needs a GPU of compute capability 9.0 and nvcc"),
]


def clusters_of_16(scores, k, num_valid, out=None):
    return top_k.top_k_clusters(scores, k, num_valid, out, cluster_size=16)


@pytest.fixture(
    params=[
        top_k.top_k_triton,
        pytest.param(top_k.top_k_positions, marks=needs_library),
        pytest.param(top_k.top_k_rows, marks=needs_library),
        pytest.param(top_k.top_k_clusters, marks=needs_library),
        pytest.param(clusters_of_16, marks=needs_library),
    ],
    ids=["triton", "chosen", "rows", "clusters", "clusters_of_16"],
)
def select(request):
    return request.param


@pytest.fixture
def small_capacity(monkeypatch):
    """Rows of a few thousand columns go through the sample and what follows from it, as long ones do."""
    monkeypatch.setattr(top_k, "CAPACITY", 1024)
    monkeypatch.setattr(top_k, "BLOCK", 512)


def check(select, scores, k, num_valid):
    result = select(scores, k, num_valid)
    assert result.dtype == torch.int32
    assert torch.equal(result, reference.top_k_positions(scores, k, num_valid))


def draw(*size, seed):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


# What a trained or an untrained indexer, or a fault, may produce: [2, S] each.
def kinds(length):
    generator = torch.Generator().manual_seed(length)
    normal, uniform = draw(2, length, seed=length), torch.rand(2, length, generator=generator)
    column = torch.arange(length).expand(2, length)
    sparse = normal.clamp_min(0) * (uniform < 0.02)
    extreme = torch.where(uniform < 0.3, -torch.inf, torch.where(uniform < 0.31, torch.inf, normal * 1e30))
    return {
        "normal": normal,
        "plateau of zeros": sparse,
        "all equal": torch.full((2, length), 1.5),
        "both zeros": torch.where(uniform < 0.5, -0.0, 0.0),
        "few values": (normal * 4).floor() / 4,
        "within one bin": 1.0 + uniform * 1e-6,
        "denormal": normal * 1e-40,
        "1e30 and infinite": extreme,
        "-1e30": -1e30 + uniform * 1e29,
        "mostly -inf": torch.where(uniform < 0.99, -torch.inf, normal),
        "mostly inf": torch.where(uniform < 0.9, torch.inf, normal),
        "rising": column.float(),
        "falling": -column.float(),
        "peak at the end": torch.where(column > length - 600, normal + 10, normal),
        "blocks": torch.where(column // 16 % 64 == 3, normal + 10, normal),
    }


@pytest.mark.parametrize("length", [1, 63, 2047, 2049, 5000])
@pytest.mark.parametrize("k", [1, 7, 2048, 4096])
def test_random_rows_of_all_lengths(select, device, length, k):
    num_valid = torch.tensor([0, length, length // 2, min(length, k + 1)], device=device)
    check(select, draw(4, length, seed=length).to(device), k, num_valid)
    check(select, draw(4, length, seed=length).to(device), k, num_valid.int())


@pytest.mark.parametrize("kind", sorted(kinds(1)))
def test_every_kind_of_score(select, device, kind):
    scores = kinds(3000)[kind].to(device)
    for k in (7, 700):
        check(select, scores, k, torch.tensor([3000, 2801], device=device))


@pytest.mark.parametrize("kind", sorted(kinds(1)))
def test_rows_longer_than_what_is_kept_of_them(device, small_capacity, kind):
    scores = kinds(5000)[kind].to(device)
    for k in (7, 512):
        check(top_k.top_k_triton, scores, k, torch.tensor([5000, 1025], device=device))


@pytest.mark.parametrize("is_sampled_high", [True, False])
def test_a_sample_that_misleads_costs_time_and_nothing_else(device, small_capacity, is_sampled_high):
    # The columns that the Triton kernel samples of a row of this length, as `_sample_threshold` writes it.
    lane = torch.arange(top_k.BLOCK)
    stretch = 5000 // top_k.BLOCK
    sampled = (lane // 16 * stretch + lane // 16 * 40503 % stretch) * 16 + lane % 16
    scores = draw(1, 5000, seed=1)
    scores[0, sampled] += 100 if is_sampled_high else -100
    check(top_k.top_k_triton, scores.to(device), 600, torch.tensor([5000], device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [8193, 32768, 70001, 131072, 262144])
@pytest.mark.parametrize("k", [7, 2048, 4096])
def test_long_rows_of_every_kind(select, device, length, k):
    scores = torch.cat(list(kinds(length).values())).to(device)
    num_valid = torch.full((scores.shape[0],), length, device=device)
    num_valid[1::2] = torch.arange(scores.shape[0] // 2, device=device) * (length // 20) + 1
    check(select, scores, k, num_valid)


@pytest.mark.gpu
def test_many_rows_of_causal_lengths(select, device):
    scores = draw(700, 20000, seed=8).to(device)
    check(select, scores, 2048, torch.arange(700, device=device) * 28 + 1)


def test_columns_past_the_valid_ones_are_never_looked_at(select, device):
    scores = draw(2, 600, seed=3).to(device)
    num_valid = torch.tensor([500, 60], device=device)
    expected = select(scores, 50, num_valid)
    scores[0, 500:], scores[1, 60:] = float("nan"), float("inf")
    assert torch.equal(select(scores, 50, num_valid), expected)


def test_more_valid_columns_than_there_are_count_as_all(select, device):
    check(select, draw(3, 600, seed=9).to(device), 50, torch.tensor([600, 601, 1 << 30], device=device))


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize("stride", [1000, 1003, 1310])
def test_rows_may_begin_anywhere_in_memory(select, device, offset, stride):
    memory = torch.full((4 * stride + 8,), float("nan"), device=device)
    rows = memory[offset:].as_strided((3, 999), (stride, 1))
    rows.copy_(draw(3, 999, seed=offset))
    check(select, rows, 64, torch.tensor([999, 998, 333], device=device))


def test_a_given_tensor_takes_the_result_at_any_stride(select, device):
    scores, num_valid = draw(3, 900, seed=5).to(device), torch.tensor([900, 30, 500], device=device)
    memory = torch.full((3, 80), -9, dtype=torch.int32, device=device)
    for function in (select, reference.top_k_positions):
        memory.fill_(-9)
        out = memory[:, :64]
        assert function(scores, 64, num_valid, out).data_ptr() == memory.data_ptr()
        assert torch.equal(out, reference.top_k_positions(scores, 64, num_valid))
        assert bool((memory[:, 64:] == -9).all())


def test_something_serves_on_every_device(device):
    scores, num_valid = draw(2, 900, seed=7).to(device), torch.tensor([900, 3], device=device)
    assert torch.equal(
        top_k.top_k_positions(scores, 64, num_valid).cpu(), reference.top_k_positions(scores.cpu(), 64, num_valid.cpu())
    )


def test_no_rows_at_all(select, device):
    empty = torch.empty(0, dtype=torch.int64, device=device)
    assert select(torch.empty(0, 100, device=device), 7, empty).shape == (0, 7)


def test_the_same_rows_give_the_same_positions_every_time(select, device):
    scores = draw(2, 3000, seed=4).round(decimals=1).to(device)
    num_valid = torch.full((2,), 3000, device=device)
    first = select(scores, 256, num_valid)
    assert all(torch.equal(first, select(scores, 256, num_valid)) for _ in range(24))


@pytest.mark.gpu
def test_a_captured_graph_serves_other_lengths(select, device):
    scores = draw(4, 40000, seed=6).to(device)
    num_valid = torch.full((4,), 40000, device=device)
    out = torch.empty(4, 2048, dtype=torch.int32, device=device)
    select(scores, 2048, num_valid, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        select(scores, 2048, num_valid, out)
    for lengths in ([40000, 1, 2049, 0], [5000, 39999, 2048, 12345]):
        num_valid.copy_(torch.tensor(lengths))
        scores.copy_(draw(4, 40000, seed=lengths[0]))
        graph.replay()
        assert torch.equal(out.cpu(), reference.top_k_positions(scores.cpu(), 2048, num_valid.cpu()))


def test_unsupported_requests_are_refused_in_one_sentence(select, device):
    one = torch.tensor([9], device=device)
    with pytest.raises(ValueError, match="k from 1 to 4096, got 5000"):
        select(torch.zeros(1, 9000, device=device), 5000, one)
    with pytest.raises(ValueError, match="serves float32"):
        select(torch.zeros(1, 9, dtype=torch.bfloat16, device=device), 5, one)
    with pytest.raises(ValueError, match="num_valid as 1 int32 or int64"):
        select(torch.zeros(1, 9, device=device), 5, one.float())
    with pytest.raises(ValueError, match="writes int32"):
        select(torch.zeros(1, 9, device=device), 5, one, torch.zeros(1, 4, dtype=torch.int32, device=device))


@pytest.mark.skipif(cuda_library("top_k") is not None, reason="has the library")
def test_asking_for_cuda_where_there_is_none_is_refused(device):
    with pytest.raises(ValueError, match="needs a GPU of compute capability"):
        top_k.top_k_rows(torch.zeros(1, 9, device=device), 5, torch.tensor([9], device=device))
