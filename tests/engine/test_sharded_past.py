"""Ranks that score a share each pick what one rank picks, ties to the smaller position; here they are threads."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from openkeye.engine import batch as batch_module
from openkeye.engine import sharded_past as past_module
from openkeye.engine.batch import Batch, Segment
from openkeye.engine.sharded_past import ShardedPast, pick_by_page, pick_by_request
from openkeye.kernels.layer_caches import LayerCaches
from openkeye.kernels.reference import indexer_select, quantize_vectors
from openkeye.model.past import CachedIndex
from openkeye.model.sharding import Shard
from tests.engine.paged_sequences import write_tokens
from tests.engine.test_dense_up_to import LENGTH, TOP_K, Sequences

PAGE_SIZE = 8


class Meeting:
    """Where the threads meet."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.brought: dict[int, Tensor] = {}


@dataclass(frozen=True)
class ThreadShard(Shard):
    """A rank that is a thread."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))

    def gather(self, x: Tensor) -> Tensor:
        self.meeting.brought[self.rank] = x.clone()
        self.meeting.barrier.wait()
        gathered = torch.stack([self.meeting.brought[rank] for rank in range(self.size)])
        self.meeting.barrier.wait()
        return gathered


def on_ranks(size: int, work: Callable[[ThreadShard], Tensor]) -> list[Tensor]:
    """What the work returns on every rank."""
    meeting = Meeting(size)
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(lambda rank: work(ThreadShard(rank, size, None, meeting)), range(size)))


def index_case(lengths: list[int], has_ties: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, gates, a cache whose free slots are NaN, a page table in disorder, lengths."""
    generator = torch.Generator().manual_seed(sum(lengths))
    draw = (
        (lambda *shape: torch.randint(-1, 2, shape, generator=generator).float())
        if has_ties
        else (lambda *shape: torch.randn(shape, generator=generator))
    )
    num_pages = [-(-length // PAGE_SIZE) for length in lengths]
    order = torch.randperm(64, generator=generator).int()
    table = torch.zeros(len(lengths), max(num_pages), dtype=torch.int32)
    cache = torch.full((64 * PAGE_SIZE, 16), torch.nan)
    first = 0
    for number, (length, count) in enumerate(zip(lengths, num_pages, strict=True)):
        table[number, :count] = order[first : first + count]
        slots = (table[number, :count, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()[:length]
        cache[slots] = draw(length, 16)
        first += count
    gates = draw(len(lengths), 4).abs() + 1
    return draw(len(lengths), 4, 16), gates, cache, table, torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize("pick", [pick_by_request, pick_by_page])
@pytest.mark.parametrize("has_ties", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("lengths", [[90], [1], [5, 90, 17], [64, 8, 9, 30, 31, 1, 90]])
def test_ranks_pick_what_one_picks(lengths, size, has_ties, pick):
    query, gates, cache, table, lengths_B = index_case(lengths, has_ties)
    expected = []
    for number, length in enumerate(lengths):
        slots = (table[number, :, None].long() * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()[:length]
        position = torch.tensor([length - 1])
        expected.append(indexer_select(query[number, None], gates[number, None], cache[slots], 12, position)[0])
    caches = LayerCaches(cache, cache, cache, page_size=PAGE_SIZE)
    found = on_ranks(size, lambda shard: pick(shard, CachedIndex(query, gates), caches, table, lengths_B, 12))
    assert all(torch.equal(picked, torch.stack(expected)) for picked in found)


@pytest.mark.parametrize("pick", [pick_by_request, pick_by_page])
@pytest.mark.parametrize("lengths", [[90], [5, 90, 17]])
def test_ranks_pick_from_index_keys_in_e4m3_too(lengths, pick):
    query, gates, cache, table, lengths_B = index_case(lengths, False)
    codes, scales = quantize_vectors(cache.nan_to_num())
    caches = LayerCaches(cache, cache, codes, None, None, scales, PAGE_SIZE)
    query_codes, query_scales = quantize_vectors(query)
    index = CachedIndex(query_codes, gates * query_scales)
    expected = []
    for number, length in enumerate(lengths):
        row, position = slice(number, number + 1), torch.tensor([length - 1])
        options = {"key_scales_S": scales, "page_table_P": table[number], "page_size": PAGE_SIZE}
        expected.append(indexer_select(index.query_TJI[row], index.gates_TJ[row], codes, 12, position, **options)[0])
    found = on_ranks(2, lambda shard: pick(shard, index, caches, table, lengths_B, 12))
    assert all(torch.equal(picked, torch.stack(expected)) for picked in found)


def attend(shard: ThreadShard, sequences: Sequences, parts: list[tuple[int, int, int]]) -> Tensor:
    """As `Sequences.attend`, on one rank."""
    segments = [Segment(None, start, count, sequences.slots[number, : start + count]) for number, start, count in parts]
    columns = [[x[start : start + count] for x in sequences.tokens[number]] for number, start, count in parts]
    query, key, value, *index = (torch.cat(column) for column in zip(*columns, strict=True))
    past = ShardedPast(Batch(segments), sequences.caches, "sparse", TOP_K)
    past.shard = shard
    write_tokens(sequences.caches, 0, past.new_slots_T, key, value, index[2])
    return past.attend(0, query, CachedIndex(*index[:2]))


@pytest.mark.parametrize("size", [2, 4])
def test_a_mixed_batch_over_ranks_attends_as_one_rank_does(size):
    parts = [(0, LENGTH - 1, 1), (1, 50, 1), (2, 20, 50), (3, 0, 7), (4, 30, 1)]

    def work(shard: ThreadShard) -> Tensor:
        sequences = Sequences(len(parts))
        for number, start, _ in parts:
            if start:
                attend(shard, sequences, [(number, 0, start)])
        return attend(shard, sequences, parts)

    sequences = Sequences(len(parts))
    expected = []
    for number, start, count in parts:
        expected.append(torch.cat([sequences.dense(number)[:TOP_K], sequences.sparse(number)[TOP_K:]])[start : start + count])
    for found in on_ranks(size, work):
        torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [2, 4])
def test_scoring_is_split_and_not_repeated(monkeypatch, size):
    num_queries: list[int] = []
    num_keys: list[int] = []
    select, score = batch_module.indexer_select, past_module.scores_in_pages

    def count_queries(query: Tensor, *others: object, **options: object) -> Tensor:
        num_queries.append(query.shape[0])
        return select(query, *others, **options)

    def count_keys(query: Tensor, gates: Tensor, caches: LayerCaches, table: Tensor, lengths: Tensor) -> Tensor:
        num_keys.append(int(lengths.sum()))
        return score(query, gates, caches, table, lengths)

    monkeypatch.setattr(batch_module, "indexer_select", count_queries)
    monkeypatch.setattr(past_module, "scores_in_pages", count_keys)
    sequences = [Sequences(5) for _ in range(size)]
    on_ranks(size, lambda shard: attend(shard, sequences[shard.rank], [(0, 0, LENGTH - 1)]))
    assert len(num_queries) == size and sum(num_queries) == LENGTH - 1 - TOP_K and max(num_queries) - min(num_queries) <= 1
    on_ranks(size, lambda shard: attend(shard, sequences[shard.rank], [(0, LENGTH - 1, 1)]))
    assert len(num_keys) == size and sum(num_keys) == LENGTH and max(num_keys) - min(num_keys) <= PAGE_SIZE
    num_keys.clear()
    on_ranks(size, lambda shard: attend(shard, sequences[shard.rank], [(number, 50, 1) for number in range(4)]))
    assert num_keys == [4 // size * 51] * size
