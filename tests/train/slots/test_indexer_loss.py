"""The indexer's loss: zero at its target, right gradient, no NaN on masked rows."""

import torch

from openkeye.model.past import IndexerOutput
from openkeye.train.slots.indexer_loss import index_scores, indexer_loss


def random_case(seed: int = 0, num_keys: int = 12):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    index = IndexerOutput(draw(2, 5, 3, 8), draw(2, 5, 3), draw(2, num_keys, 8))
    rows = torch.arange(num_keys - 5, num_keys)
    visible = (rows[:, None] >= torch.arange(num_keys)).expand(2, -1, -1)
    return draw(2, 4, 5, 16), draw(2, 4, num_keys, 16), index, visible


def test_scores_follow_the_formula():
    _, _, index, _ = random_case()
    expected = torch.einsum(
        "brj,brjl->brl", index.gates_TJ, torch.relu(torch.einsum("brji,bli->brjl", index.query_TJI, index.key_TI))
    )
    torch.testing.assert_close(index_scores(index.query_TJI, index.gates_TJ, index.key_TI), expected)


def test_loss_is_the_kl_over_visible_positions():
    query, key, index, visible = random_case()
    result = indexer_loss(query, key, index, visible, top_k=4)
    logits = (query @ key.transpose(2, 3)).double() * 16**-0.5
    target = logits.masked_fill(~visible[:, None], -torch.inf).softmax(-1).mean(1)
    scores = index_scores(index.query_TJI, index.gates_TJ, index.key_TI).double()
    total = 0.0
    for clip in range(2):
        for row in range(5):
            seen = visible[clip, row]
            p, q = target[clip, row, seen], scores[clip, row, seen].softmax(-1)
            total += float((p * (p / q).log()).sum())
    assert abs(float(result.loss) - total / 10) < 1e-5


def test_mean_over_groups_has_the_gradient_of_the_sum_over_groups():
    query, key, index, visible = random_case(1)
    gates = index.gates_TJ.clone().requires_grad_()
    output = IndexerOutput(index.query_TJI, gates, index.key_TI)
    (mean_gradient,) = torch.autograd.grad(indexer_loss(query, key, output, visible, 4).loss, gates)
    halves = [indexer_loss(query[:, g : g + 2], key[:, g : g + 2], output, visible, 4).loss for g in (0, 2)]
    (sum_gradient,) = torch.autograd.grad(torch.stack(halves).mean(), gates)
    torch.testing.assert_close(mean_gradient, sum_gradient)


def test_over_the_selected_set_only_what_was_selected_has_a_voice():
    query, key, index, visible = random_case(2)
    selected = visible & (torch.arange(12) % 2 == 0)
    result = indexer_loss(query, key, index, visible, 4, selected)
    torch.testing.assert_close(result.loss, indexer_loss(query, key, index, selected, 0).loss)
    torch.testing.assert_close(result.recall, indexer_loss(query, key, index, visible, 4).recall)


def test_fully_masked_keys_give_finite_gradients():
    query, key, index, visible = random_case()
    only_self = torch.zeros_like(visible)
    only_self[:, :, 0] = True
    gates = index.gates_TJ.clone().requires_grad_()
    result = indexer_loss(query, key, IndexerOutput(index.query_TJI, gates, index.key_TI), only_self, 4)
    result.loss.backward()
    assert torch.isfinite(gates.grad).all() and abs(float(result.loss.detach())) < 1e-6


def test_recall_is_one_when_the_indexer_ranks_as_attention_does():
    query, _, _, visible = random_case()
    key = torch.randn(2, 1, 12, 16)
    same = query[:, :1]
    index = IndexerOutput(same.transpose(1, 2), torch.ones(2, 5, 1), key[:, 0])
    positive = torch.relu(same @ key.transpose(2, 3))
    result = indexer_loss(same, key, index, visible & (positive[:, 0] > 0), top_k=2)
    assert float(result.recall) == 1.0
