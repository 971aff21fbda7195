"""The measuring past against the plain one, document by document, and its figures against all pairs written out."""

import pytest
import torch

from openkeye.kernels.reference import index_scores
from openkeye.model import measuring_past
from openkeye.model.config import KeyeConfig
from openkeye.model.keye import KeyeModel
from openkeye.model.measuring_past import MeasuringPast
from openkeye.model.past import IndexerOutput, PlainPast
from tests.model.naive_keye import make_config, make_weights

LENGTH = 40


@pytest.fixture(scope="module")
def model() -> KeyeModel:
    raw = make_config(
        vision_config=None, num_attention_heads=6, num_key_value_heads=2, num_experts=0, intermediate_size=64, use_qk_norm=False
    )
    model = KeyeModel(KeyeConfig.from_dict(raw))
    weights = make_weights(raw | {"num_experts": 1})
    state = {name: weights.get(name, torch.randn(tensor.shape) * 0.15) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    return model.requires_grad_(False)


def walk(model: KeyeModel, ids: torch.Tensor, past, positions: torch.Tensor | None = None) -> torch.Tensor:
    positions = torch.arange(len(ids)) if positions is None else positions
    return model(model.embed(ids, None, None), positions.expand(3, -1), past)


def documents(count: int) -> torch.Tensor:
    return torch.randint(0, 60, (count, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("attention", "top_k"), [("dense", 0), ("sparse", 8), ("sparse", LENGTH)])
def test_documents_are_walked_together_as_alone(model, attention, top_k):
    ids = documents(3)
    positions = torch.arange(LENGTH).repeat(3)
    together = walk(model, ids.flatten(), MeasuringPast(LENGTH, attention, top_k), positions)
    alone = torch.cat([walk(model, one, PlainPast(top_k, attention)) for one in ids])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    if top_k != 8:
        dense = torch.cat([walk(model, one, PlainPast(8, "dense")) for one in ids])
        torch.testing.assert_close(together, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["dense", "sparse", "oracle"])
def test_branches_see_the_document_and_themselves(model, attention):
    prompt, tails = documents(1)[0], torch.tensor([[7, 8, 9], [50, 3, 21]])
    past = MeasuringPast(LENGTH, attention, 8, branches_N=torch.tensor([0, 0, 0, 1, 1, 1]))
    positions = torch.cat([torch.arange(LENGTH), torch.arange(LENGTH, LENGTH + 3).repeat(2)])
    found = walk(model, torch.cat([prompt, tails.flatten()]), past, positions)[LENGTH:].unflatten(0, (2, 3))
    for number, tail in enumerate(tails):
        alone = walk(model, torch.cat([prompt, tail]), MeasuringPast(LENGTH + 3, attention, 8))
        torch.testing.assert_close(found[number], alone[LENGTH:], atol=1e-5, rtol=1e-5)


def drawn_layer() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, IndexerOutput]:
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(LENGTH, heads, 16, generator=generator) for heads in (6, 2, 2))
    index = [torch.randn(shape, generator=generator) for shape in ((LENGTH, 4, 16), (LENGTH, 4), (LENGTH, 16))]
    return query * 2, key, value, IndexerOutput(*index)


def shares_of(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    logits = torch.einsum("thd,shd->hts", query, key.repeat_interleave(3, dim=1)) / 4
    return logits.masked_fill(~torch.ones(LENGTH, LENGTH).tril().bool(), -torch.inf).softmax(-1).mean(0)


@pytest.mark.parametrize("slab_bytes", [4 * LENGTH * 7, 1 << 20])
def test_recall_and_mass_equal_sets_written_out(monkeypatch, slab_bytes):
    monkeypatch.setattr(measuring_past, "SLAB_BYTES", slab_bytes)
    query, key, value, index = drawn_layer()
    past = MeasuringPast(LENGTH, measured=(4, 16))
    past.attend(5, query, key, value, index)
    (found,) = past.results[5]
    share, scores = shares_of(query, key), index_scores(index.query_TJI, index.gates_TJ, index.key_TI)
    for figures, k in zip(found, (4, 16), strict=True):
        rows = []
        for row in range(k, LENGTH):
            best = share[row, : row + 1].topk(k).indices
            # ReLU leaves ties at zero, which the smaller position wins.
            picked = scores[row, : row + 1].sort(descending=True, stable=True).indices[:k]
            rows.append([len({*best.tolist()} & {*picked.tolist()}) / k, share[row, picked].sum(), share[row, best].sum()])
        torch.testing.assert_close(figures, torch.tensor(rows).mean(0), atol=1e-5, rtol=1e-5)


def test_the_oracle_attends_to_attentions_own_best():
    query, key, value, _ = drawn_layer()
    share = shares_of(query, key)
    found = MeasuringPast(LENGTH, "oracle", 6).attend(0, query, key, value, None)
    for row in (0, 3, 20, LENGTH - 1):
        best = share[row, : row + 1].topk(min(6, row + 1)).indices
        keys, values = (x[best].repeat_interleave(3, dim=1) for x in (key, value))
        weights = (torch.einsum("hd,khd->hk", query[row], keys) / 4).softmax(-1)
        torch.testing.assert_close(found[row], torch.einsum("hk,khd->hd", weights, values), atol=1e-5, rtol=1e-5)
