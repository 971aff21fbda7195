"""Slots behind one prefix attend as if each question had been asked alone."""

import pytest
import torch

from openkeye.data.slots.slot_batch import SlotLayout
from openkeye.kernels.reference import indexer_select, sparse_attention
from openkeye.model.past import IndexerOutput
from openkeye.train.slots.slot_past import SlotPast

LAYOUT = SlotLayout(num_prefix=20, num_slots=3, slot_length=5)
CLIPS = 2


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_each_slot_equals_its_question_alone(attention):
    num_tokens, top_k = LAYOUT.num_tokens, 6
    query, key, value = draw(CLIPS * num_tokens, 4, 8), draw(CLIPS * num_tokens, 2, 8), draw(CLIPS * num_tokens, 2, 8) * 2
    index = IndexerOutput(draw(CLIPS * num_tokens, 3, 16), draw(CLIPS * num_tokens, 3), draw(CLIPS * num_tokens, 16))
    past = SlotPast(LAYOUT, CLIPS, attention=attention, top_k=top_k)
    output = past.attend(0, query, key, value, index if attention == "sparse" else None)
    for clip in range(CLIPS):
        for slot in range(LAYOUT.num_slots):
            first = clip * num_tokens
            alone = torch.cat(
                [
                    torch.arange(first, first + LAYOUT.num_prefix),
                    first + LAYOUT.num_prefix + slot * LAYOUT.slot_length + torch.arange(LAYOUT.slot_length),
                ]
            )
            positions = torch.arange(len(alone))
            k = top_k if attention == "sparse" else len(alone)
            indices = indexer_select(index.query_TJI[alone], index.gates_TJ[alone], index.key_TI[alone], k, positions)
            expected = sparse_attention(query[alone], key[alone], value[alone], indices, 8**-0.5)
            torch.testing.assert_close(output[alone], expected, atol=1e-5, rtol=1e-4)


def test_indexer_loss_reaches_the_indexer_and_not_the_trunk():
    num_tokens = LAYOUT.num_tokens
    query, key = draw(CLIPS * num_tokens, 4, 8).requires_grad_(), draw(CLIPS * num_tokens, 2, 8).requires_grad_()
    gates = draw(CLIPS * num_tokens, 3).requires_grad_()
    index = IndexerOutput(draw(CLIPS * num_tokens, 3, 16), gates, draw(CLIPS * num_tokens, 16))
    past = SlotPast(LAYOUT, CLIPS, attention="sparse", top_k=6, loss_rows=torch.rand(1, 2, 7))
    past.attend(0, query, key, draw(CLIPS * num_tokens, 2, 8), index)
    torch.stack([layer.loss for layer in past.losses]).sum().backward()
    assert gates.grad is not None and query.grad is None and key.grad is None
