"""One query a request over paged caches, against the plain twin on each request alone."""

import pytest
import torch
from torch import Tensor

from openkeye.kernels import reference
from openkeye.kernels.sparse_decode import sparse_decode
from tests.kernels.test_sparse_attention import draw

PAGE = 16


def paged_case(lengths: list[int], num_picked: int, heads: int, groups: int, device: str) -> tuple[Tensor, ...]:
    """Queries, caches whose unused slots are NaN, lists, page tables."""
    num_pages = sum(-(-length // PAGE) for length in lengths) + 3
    pages = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0)).tolist()
    caches = [torch.full((num_pages * PAGE, groups, 64), float("nan")) for _ in range(2)]
    table = torch.zeros(len(lengths), max(-(-length // PAGE) for length in lengths), dtype=torch.int32)
    lists = torch.full((len(lengths), num_picked), -1, dtype=torch.int32)
    for request, length in enumerate(lengths):
        for number in range(-(-length // PAGE)):
            page = pages.pop()
            table[request, number] = page
            used = min(PAGE, length - number * PAGE)
            for seed, cache in enumerate(caches):
                cache[page * PAGE : page * PAGE + used] = draw((used, groups, 64), "cpu", torch.float32, page * 2 + seed)
        chosen = torch.randperm(length, generator=torch.Generator().manual_seed(request))[:num_picked].sort().values
        lists[request, : len(chosen)] = chosen.int()
    query = draw((len(lengths), heads, 64), "cpu", torch.float32, 9)
    return tuple(tensor.to(device) for tensor in (query, *caches, lists, table))


@pytest.mark.parametrize("num_splits", [None, 1, 3, 8])
@pytest.mark.parametrize(("heads", "groups"), [(8, 1), (9, 3), (4, 4), (32, 1)])
def test_every_request_equals_its_twin_alone(device, heads, groups, num_splits):
    lengths = [1, 70, 300, 129]
    query, key, value, lists, table = paged_case(lengths, 130, heads, groups, device)
    output = sparse_decode(query, key, value, lists, 0.1, table, PAGE, num_splits)
    for request in range(len(lengths)):
        row = lists[request]
        slots = torch.where(row < 0, -1, table[request, row.clamp_min(0) // PAGE] * PAGE + row % PAGE)
        clean = [cache.nan_to_num(0.0) for cache in (key, value)]
        expected = reference.sparse_attention(query[request : request + 1], *clean, slots[None], 0.1)
        torch.testing.assert_close(output[request : request + 1], expected, atol=2e-6, rtol=1e-4)


def test_lists_of_slots_need_no_page_table(device):
    query, key, value, lists, table = paged_case([50, 90], 40, 8, 1, device)
    slots = torch.gather(table, 1, lists.clamp_min(0).long() // PAGE) * PAGE + lists % PAGE
    direct = sparse_decode(query, key, value, torch.where(lists < 0, -1, slots).int(), 0.1)
    assert torch.equal(direct, sparse_decode(query, key, value, lists, 0.1, table, PAGE))


def test_an_empty_list_gives_zeros_and_leaves_the_others_alone(device):
    query, key, value, lists, table = paged_case([50, 90], 40, 8, 1, device)
    alone = sparse_decode(query, key, value, lists, 0.1, table, PAGE)
    lists[0] = -1
    output = sparse_decode(query, key, value, lists, 0.1, table, PAGE)
    assert torch.equal(output[0], torch.zeros_like(output[0])) and torch.equal(output[1], alone[1])


def test_a_page_table_of_other_requests_is_refused(device):
    query, key, value, lists, table = paged_case([50, 90], 40, 8, 1, device)
    with pytest.raises(ValueError, match="2 queries and a page table of 1 requests"):
        sparse_decode(query, key, value, lists, 0.1, table[:1], PAGE)
