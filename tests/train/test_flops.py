"""Counts of operations, against PyTorch's own counter and by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from openkeye.data.document import Document
from openkeye.data.packed_batch import pack
from openkeye.model.keye import KeyeModel
from openkeye.model.past import PlainPast
from openkeye.train.flops import decoder_flops, device_peak, pairs, pass_flops, vision_flops
from tests.train.toy_runs import ADAPTATION, TOY, WARM_UP, ToyDocuments, toy_stage


def text(length: int, branches: tuple[int, ...] = ()) -> Document:
    positions = torch.arange(length)
    masks = {"is_learnt": positions > 1, "is_media": positions < 0}
    return Document("text", positions % 30, positions.expand(3, -1), **masks, branches=branches)


def test_a_token_costs_what_its_products_cost():
    keye = KeyeModel(TOY)
    document = text(8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = keye(keye.model.embed_tokens(document.input_ids), document.position_ids, PlainPast(6, "dense"))
    # The counter sees all of T x T pairs where attention is causal; both halves of it are products of heads' width.
    attention = 4.0 * 2 * 64 * 8 * 8
    assert hidden.shape == (8, 32)
    assert 8 * decoder_flops(keye) + attention == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_vision_is_counted_as_pytorch_counts_it():
    keye = KeyeModel(TOY)
    patches = ToyDocuments(picture_every=1).read(1).pictures[0].patches("cpu")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        keye.encode_patches(patches)
    assert vision_flops(TOY, patches.pixels.shape[0], 1) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_pairs_by_hand():
    batch = pack([text(4), text(7, branches=(3, 5))])
    # 1+2+3+4; a trunk of 3: 1+2+3; two branches of 2 that see it: 4+5 each.
    assert pairs(batch) == 10 + 6 + 9 + 9
    assert pairs(batch, limit=3) == (1 + 2 + 3 + 3) + 6 + 3 * 4
    assert pairs(batch, limit=100) == pairs(batch)


def test_what_learns_costs_three_times_and_what_is_frozen_once():
    batch = pack([text(20), text(12)])
    per_token = decoder_flops(KeyeModel(TOY))
    forward = 32 * per_token + 4.0 * 2 * 64 * pairs(batch)
    head = 2.0 * batch.num_learnt * 32 * 40
    dense = pass_flops(TOY, per_token, toy_stage(), batch)
    assert dense == pytest.approx(3 * (forward + head))
    assert pass_flops(TOY, per_token, toy_stage(trains=("projector",)), batch) == pytest.approx(2 * (forward + head))
    index = 2.0 * 2 * (32 * 32 * (32 + 2 + 16) + 32 * pairs(batch))
    assert pass_flops(TOY, per_token, toy_stage(**WARM_UP), batch) == pytest.approx(forward + 3 * index)
    assert pass_flops(TOY, per_token, toy_stage(**ADAPTATION), batch) < dense + 3 * index


def test_a_cpu_has_no_peak():
    assert device_peak(torch.device("cpu")) is None
