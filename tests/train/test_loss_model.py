"""One pack through the network: pictures by position, losses of the labelled tokens alone, whatever shares a pack."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from openkeye.data.packed_batch import PackedBatch, pack
from openkeye.model.keye import KeyeModel
from openkeye.model.past import PlainPast
from openkeye.train.initialise import initialise
from openkeye.train.loss import StepCounts
from openkeye.train.loss_model import LossModel, PassPlan
from openkeye.train.shard import decoder_layers
from tests.train.toy_runs import ADAPTATION, IMAGE, TOY, WARM_UP, ToyDocuments, toy_stage

DENSE = toy_stage()


@pytest.fixture
def loss_model() -> Iterator[LossModel]:
    keye = KeyeModel(TOY)
    initialise(keye, seed=2)
    yield LossModel(keye)


def plan_of(stage, *packs: PackedBatch) -> PassPlan:
    counts = StepCounts(sum(p.num_tokens for p in packs), sum(p.num_learnt for p in packs), len(packs))
    return PassPlan(stage, counts, torch.full((2, 4), 0.25) if stage.balance_weight else None)


def test_each_document_has_the_loss_that_it_has_alone(loss_model: LossModel):
    documents = [ToyDocuments().read(index) for index in range(5)]
    batch = pack(documents)
    losses = loss_model(batch, plan_of(DENSE, batch)).token_losses
    keye = loss_model.keye
    expected = []
    for document in documents:
        embeds = keye.model.embed_tokens(document.input_ids)
        if document.pictures:
            vectors = keye.encode_patches(document.pictures[0].patches("cpu"))
            embeds = torch.cat([vectors, embeds[len(vectors) :]])
        logits = keye.logits(keye(embeds, document.position_ids, PlainPast(TOY.indexer.top_k, "dense")))
        each = F.cross_entropy(logits[:-1], document.input_ids[1:], reduction="none")
        expected.append(each[document.is_learnt[1:]])
    assert torch.allclose(losses, torch.cat(expected), atol=1e-5)
    assert len(losses) == batch.num_learnt > 10


def test_a_placeholder_in_prose_stays_prose(loss_model: LossModel):
    document = ToyDocuments(picture_every=0).read(1)
    document = replace(document, input_ids=torch.where(torch.arange(document.num_tokens) == 1, IMAGE, document.input_ids))
    seen = ToyDocuments(picture_every=1).read(1)
    apart = torch.cat([loss_model(pack([one]), plan_of(DENSE, pack([one]))).token_losses for one in (document, seen)])
    together = pack([document, seen])
    assert torch.allclose(loss_model(together, plan_of(DENSE, together)).token_losses, apart, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, ADAPTATION], ids=["dense", "adaptation"])
def test_every_parameter_that_may_learn_has_a_gradient_even_without_pictures(loss_model: LossModel, changes: dict):
    stage = toy_stage(**changes)
    loss_model.prepare(stage, recomputes=False)
    batch = pack([ToyDocuments(picture_every=0).read(3)])
    loss_model(batch, plan_of(stage, batch)).total.backward()
    has_indexer = "indexer" in stage.trains
    missing = [name for name, p in loss_model.keye.named_parameters() if p.grad is None]
    assert [name for name in missing if has_indexer or "sa_indexer" not in name] == []
    vision = [p.grad for name, p in loss_model.keye.named_parameters() if name.startswith(("visual", "mlp_AR"))]
    assert all(float(gradient.abs().max()) == 0 for gradient in vision)


def test_the_indexer_learns_from_its_own_loss_alone(loss_model: LossModel):
    batch = pack([ToyDocuments().read(0), ToyDocuments().read(1)])
    gradients = {}
    for name, stage in (("warm-up", toy_stage(**WARM_UP)), ("dense", DENSE), ("adaptation", toy_stage(**ADAPTATION))):
        loss_model.zero_grad()
        loss_model.prepare(stage, recomputes=False)
        loss_model(batch, plan_of(stage, batch)).total.backward()
        gradients[name] = {key for key, p in loss_model.keye.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert gradients["warm-up"] and all("sa_indexer" in key for key in gradients["warm-up"])
    assert not any("sa_indexer" in key for key in gradients["dense"])
    assert gradients["adaptation"] >= gradients["dense"] | {key for key in gradients["warm-up"] if "q_proj" in key}


def test_a_pack_with_nothing_to_learn_adds_nothing(loss_model: LossModel):
    document = ToyDocuments().read(2)
    silent = pack([replace(document, is_learnt=torch.zeros(document.num_tokens, dtype=torch.bool))])
    losses = loss_model(silent, plan_of(DENSE, silent, pack([document])))
    losses.total.backward()
    assert float(losses.total.detach()) == 0 and losses.token_losses.shape == (0,)
    assert all(p.grad is None or float(p.grad.abs().max()) == 0 for p in loss_model.parameters())


def test_routers_are_watched_only_where_that_is_asked_for(loss_model: LossModel):
    batch = pack([ToyDocuments().read(0)])
    balanced = toy_stage(balance_weight=0.5)
    loss_model.prepare(balanced, recomputes=False)
    load = loss_model(batch, plan_of(balanced, batch)).load
    assert float(load.num_picks_LE.sum()) == 2 * batch.num_tokens * TOY.num_experts_per_tok
    assert all(layer.mlp.router_logits is None for layer in decoder_layers(loss_model.keye))
    loss_model.prepare(DENSE, recomputes=False)
    assert loss_model(batch, plan_of(DENSE, batch)).load is None
    assert all(layer.mlp.router_logits is None for layer in decoder_layers(loss_model.keye))
