"""Where sequences are short enough, all keys are attended to: nothing is scored, and the answer does not depend on the cuts."""

import pytest
import torch
from torch import Tensor

from openkeye.engine import batch as batch_module
from openkeye.engine.batch import Batch, PagedPast, Segment
from openkeye.engine.config import EngineConfig
from openkeye.engine.loop import Engine
from openkeye.engine.pages import PagedCaches
from openkeye.inputs.encode import encode
from openkeye.kernels.reference import dense_attention
from openkeye.model.config import KeyeConfig
from openkeye.model.past import CachedIndex, IndexerOutput, PlainPast
from openkeye.model.weights import load_model
from tests.engine.paged_sequences import write_tokens
from tests.engine.test_loop import QUESTIONS, chat, first_logits
from tests.model.naive_keye import make_config

TOP_K, LENGTH, LIMIT = 8, 90, 40


class Sequences:
    """Random projections of some sequences of LENGTH tokens, for one layer whose pages lie in disorder."""

    def __init__(self, count: int = 1) -> None:
        model = KeyeConfig.from_dict(make_config())
        assert model.indexer.top_k == TOP_K
        self.caches = PagedCaches(model, EngineConfig(page_size=8, cache_tokens=512), torch.device("cpu"), torch.float32)
        for cache in (self.caches.keys, self.caches.values, self.caches.index_keys):
            cache.fill_(torch.nan)
            # The plain twin multiplies slot 0 by nothing where a list is short.
            cache[:, 0] = 0.0
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(64, generator=generator)[: 12 * count].view(count, 12)
        self.slots = (8 * order[:, :, None] + torch.arange(8)).flatten(1)[:, :LENGTH]
        shapes = ((4, 16), (2, 16), (2, 16), (4, 16), (4,), (16,))
        self.tokens = [[torch.randn(LENGTH, *shape, generator=generator) for shape in shapes] for _ in range(count)]

    def attend(self, parts: list[tuple[int, int, int]], dense_up_to: int | None, attention: str = "sparse") -> Tensor:
        """[T, H, D] of one batch; a part is the number of its sequence, its first token and how many there are."""
        segments = [Segment(None, start, count, self.slots[number, : start + count]) for number, start, count in parts]
        columns = zip(*([x[start : start + count] for x in self.tokens[number]] for number, start, count in parts), strict=True)
        query, key, value, *index = (torch.cat(column) for column in columns)
        past = PagedPast(Batch(segments), self.caches, attention, TOP_K, dense_up_to)
        write_tokens(self.caches, 0, past.new_slots_T, key, value, index[2])
        return past.attend(0, query, CachedIndex(*index[:2]))

    def attend_in_chunks(self, chunk: int, dense_up_to: int | None) -> Tensor:
        """[LENGTH, H, D] of the first sequence."""
        starts = range(0, LENGTH, chunk)
        return torch.cat([self.attend([(0, start, min(chunk, LENGTH - start))], dense_up_to) for start in starts])

    def sparse(self, number: int = 0) -> Tensor:
        query, key, value, *index = self.tokens[number]
        return PlainPast(TOP_K).attend(0, query, key, value, IndexerOutput(*index))

    def dense(self, number: int = 0) -> Tensor:
        query, key, value = self.tokens[number][:3]
        return dense_attention(query, key, value, torch.arange(LENGTH), query.shape[-1] ** -0.5)


@pytest.fixture
def selected(monkeypatch) -> list[list[int]]:
    """Positions of the queries of every selection that the engine's past asks for."""
    calls: list[list[int]] = []
    select = batch_module.indexer_select

    def record(
        query_TJI: Tensor, gates_TJ: Tensor, key_SI: Tensor, k: int, query_positions_T: Tensor, **pages: object
    ) -> Tensor:
        calls.append(query_positions_T.tolist())
        return select(query_TJI, gates_TJ, key_SI, k, query_positions_T, **pages)

    monkeypatch.setattr(batch_module, "indexer_select", record)
    return calls


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_queries_that_see_at_most_top_k_keys_are_not_scored(video, processor, selected):
    engine = Engine(config=EngineConfig(prefill_chunk_tokens=50))
    prompt = encode(chat(video, QUESTIONS[0]), processor).model_input
    logits = first_logits(engine, chat(video, QUESTIONS[0]))
    layers, top_k = engine.runner.model.config.num_hidden_layers, engine.runner.model.config.indexer.top_k
    scored = sorted(position for call in selected for position in call)
    assert scored == sorted(layers * list(range(top_k, prompt.num_tokens))) and 50 < top_k < prompt.num_tokens
    model = load_model(engine.model_dir, "cpu", torch.float32)
    with torch.inference_mode():
        embeds = model.embed(prompt.input_ids, None, model.encode_patches(prompt.video_patches))
        hidden = model(embeds, prompt.position_ids, PlainPast(top_k))
        close(logits, model.logits(hidden[-1:])[0], 1e-4)


def test_without_a_limit_the_past_is_the_plain_sparse_one(selected):
    sequences = Sequences()
    close(sequences.attend_in_chunks(LENGTH, None), sequences.sparse())
    assert selected == [list(range(TOP_K, LENGTH))]
    close(sequences.attend_in_chunks(LENGTH, 0), sequences.sparse())
    assert selected[1:] == [list(range(LENGTH))], "with a limit of 0 every query selects"


@pytest.mark.parametrize("dense_up_to", [5, LIMIT, 1000])
def test_positions_below_the_limit_are_dense_and_the_others_sparse(dense_up_to):
    sequences = Sequences()
    attended = sequences.attend_in_chunks(LENGTH, dense_up_to)
    limit = max(TOP_K, dense_up_to)
    close(attended[:limit], sequences.dense()[:limit])
    close(attended[limit:], sequences.sparse()[limit:])
    assert (sequences.sparse() - sequences.dense())[TOP_K:].abs().amax(dim=(1, 2)).min() > 1e-3, "the two must differ"


# Chunks of one token run as answers do.
@pytest.mark.parametrize("chunk", [1, 7, 16, 37, LIMIT, 64])
@pytest.mark.parametrize("dense_up_to", [None, LIMIT])
def test_the_cuts_do_not_matter(chunk, dense_up_to):
    close(Sequences().attend_in_chunks(chunk, dense_up_to), Sequences().attend_in_chunks(LENGTH, dense_up_to))


@pytest.mark.parametrize("lengths", [(6, LIMIT, LIMIT + 1, 30), (30, LIMIT), (6, LENGTH)])
def test_answers_of_all_lengths_go_on_together(lengths):
    sequences = Sequences(len(lengths))
    for number in range(len(lengths)):
        sequences.attend([(number, 0, LENGTH)], None)
    attended = sequences.attend([(number, length - 1, 1) for number, length in enumerate(lengths)], LIMIT)
    for number, length in enumerate(lengths):
        expected = sequences.dense(number) if length <= LIMIT else sequences.sparse(number)
        close(attended[number], expected[length - 1])


def test_a_limit_beyond_every_sequence_is_dense_attention(video):
    limited, dense = Engine(config=EngineConfig(dense_up_to=100_000)), Engine(attention="dense")
    messages = chat(video, QUESTIONS[1])
    close(first_logits(limited, messages), first_logits(dense, messages), 1e-4)
    assert limited.generate(messages).text == dense.generate(messages).text


@pytest.mark.parametrize("value", [-1, 0.5, True, "8"])
def test_a_limit_that_is_no_number_of_tokens_is_refused_in_one_line(value):
    with pytest.raises(ValueError, match=r"dense_up_to is .*; give a whole number of tokens from 0 on") as caught:
        EngineConfig(dense_up_to=value)
    assert "\n" not in str(caught.value) and repr(value) in str(caught.value)
