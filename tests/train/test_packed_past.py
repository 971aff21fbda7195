"""`PackedPast`: packed equals alone, the indexer's losses equal their definitions, and who gets a gradient from what."""

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from openkeye.engine.batch import Batch, PagedPast, Segment
from openkeye.engine.config import EngineConfig
from openkeye.engine.pages import PagedCaches
from openkeye.kernels.dispatch import indexer_select
from openkeye.kernels.reference import index_scores, quantize_vectors
from openkeye.model.config import KeyeConfig
from openkeye.model.keye import KeyeModel
from openkeye.model.past import IndexerOutput, PlainPast
from openkeye.train.packed_past import PackedPast, Teaching
from tests.model.naive_keye import make_config, make_weights
from tests.train.packs import Projections, draw, make_layout, visible_keys

LAYOUT = make_layout((7, ()), (9, (4, 1, 6)), (1, ()), (2, (3,)), (13, ()))
K = 4
TARGETS = ("dense", "selected", "selected_dense")


def weights_of(layout, dtype=torch.float64) -> Tensor:
    return torch.full((layout.num_tokens,), 1 / layout.num_tokens, dtype=dtype)


def selected(layout, given: Projections, k: int = K) -> list[list[int]]:
    """Token by token: what answering would select, of a sequence made of what the token sees."""
    result = []
    for token, seen in enumerate(visible_keys(layout)):
        row = slice(token, token + 1)
        position = torch.tensor([len(seen) - 1])
        picked = indexer_select(given.index_query[row], given.gates[row], given.index_key[seen], k, position)[0]
        result.append([seen[column] for column in picked.tolist() if column >= 0])
    return result


def attend_by_definition(given: Projections, lists: list[list[int]]) -> Tensor:
    group = given.query.shape[1] // given.key.shape[1]
    rows = []
    for token, keys in enumerate(lists):
        key, value = (x[keys].repeat_interleave(group, dim=1) for x in (given.key, given.value))
        weights = (torch.einsum("hd,shd->hs", given.query[token], key) * given.query.shape[2] ** -0.5).softmax(dim=1)
        rows.append(torch.einsum("hs,shd->hd", weights, value))
    return torch.stack(rows)


def teach_by_definition(given: Projections, layout, target: str, weights: Tensor, k: int = K) -> Tensor:
    """Sum of weights * KL, the formulas of the report one token at a time."""
    num_groups, scale = given.key.shape[1], given.query.shape[2] ** -0.5
    lists = selected(layout, given, k)
    total = torch.zeros((), dtype=torch.float64)
    for token, seen in enumerate(visible_keys(layout)):
        keys = seen if target == "dense" else lists[token]
        group_keys = given.key.detach()[seen].repeat_interleave(given.query.shape[1] // num_groups, dim=1)
        logits = torch.einsum("hd,shd->hs", given.query.detach()[token], group_keys) * scale
        inside = torch.tensor([seen.index(key) for key in keys])
        if target == "selected":
            wanted = logits[:, inside].softmax(dim=1).mean(dim=0)
        else:
            dense = logits.softmax(dim=1).unflatten(0, (num_groups, -1)).sum(dim=1)[:, inside]
            wanted = (dense / dense.sum(dim=1, keepdim=True)).mean(dim=0)
        row = slice(token, token + 1)
        scores = index_scores(given.index_query[row], given.gates[row], given.index_key[keys])[0]
        total = total + weights[token] * (wanted * (wanted.log() - scores.log_softmax(dim=0))).sum()
    return total


def run(past: PackedPast, given: Projections) -> Tensor:
    return past.attend(0, *given.trunk, given.index if past.needs_index else None)


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_every_token_attends_to_what_the_rule_says(attention):
    given = draw(LAYOUT.num_tokens)
    direction = torch.randn(given.query.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    output = run(PackedPast(LAYOUT, K, attention), given)
    lists = visible_keys(LAYOUT) if attention == "dense" else selected(LAYOUT, given)
    expected = attend_by_definition(given, lists)
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-11)
    made = torch.autograd.grad((output * direction).sum(), given.trunk)
    for gradient, wanted in zip(made, torch.autograd.grad((expected * direction).sum(), given.trunk), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize("target", TARGETS)
def test_each_loss_and_its_gradients_equal_its_definition(attention, target):
    given = draw(LAYOUT.num_tokens, seed=2)
    weights = torch.rand(LAYOUT.num_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    past = PackedPast(LAYOUT, K, attention, Teaching(target, weights))
    run(past, given)
    expected = teach_by_definition(given, LAYOUT, target, weights)
    torch.testing.assert_close(past.indexer_loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(past.report()["indexer_kl"], expected.detach(), rtol=1e-10, atol=1e-12)
    made = torch.autograd.grad(3 * past.indexer_loss, given.indexer)
    for gradient, wanted in zip(made, torch.autograd.grad(3 * expected, given.indexer), strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-11)


def test_the_two_targets_over_the_selection_differ():
    given = draw(LAYOUT.num_tokens, seed=4)
    values = []
    for target in ("selected", "selected_dense"):
        past = PackedPast(LAYOUT, K, "sparse", Teaching(target, weights_of(LAYOUT)))
        run(past, given)
        values.append(float(past.indexer_loss.detach()))
    assert abs(values[0] - values[1]) > 1e-3


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_losses_reach_only_what_they_teach(attention):
    for target in TARGETS:
        given = draw(LAYOUT.num_tokens)
        past = PackedPast(LAYOUT, K, attention, Teaching(target, weights_of(LAYOUT)))
        run(past, given).square().sum().backward()
        assert all(x.grad is None for x in given.indexer) and all(x.grad is not None for x in given.trunk)
        given = draw(LAYOUT.num_tokens)
        past = PackedPast(LAYOUT, K, attention, Teaching(target, weights_of(LAYOUT)))
        run(past, given)
        past.indexer_loss.backward()
        assert all(x.grad is None for x in given.trunk) and all(x.grad is not None for x in given.indexer)


def test_one_target_of_all_groups_has_the_gradient_of_one_a_group():
    given = draw(LAYOUT.num_tokens, heads=6, groups=2, seed=5)
    made = []
    for groups in (slice(0, 2), slice(0, 1), slice(1, 2)):
        heads = slice(3 * groups.start, 3 * groups.stop)
        past = PackedPast(LAYOUT, K, "dense", Teaching("dense", weights_of(LAYOUT)))
        past.attend(0, given.query[:, heads], given.key[:, groups], given.value[:, groups], given.index)
        made.append((past.indexer_loss, torch.autograd.grad(past.indexer_loss, given.indexer)))
    (loss, together), *apart = made
    for number, gradient in enumerate(together):
        torch.testing.assert_close(gradient * 2, apart[0][1][number] + apart[1][1][number], rtol=1e-9, atol=1e-12)
    # One target a group keeps a floor that no indexer can get under: stop on recall, never on the loss.
    assert apart[0][0] + apart[1][0] - 2 * loss > 1e-3


@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_nan_where_rows_are_alone_or_do_not_count(attention, target):
    layout = make_layout((1, ()), (1, (1, 1)), (6, ()), (1, ()))
    given = draw(layout.num_tokens, seed=6)
    with torch.no_grad():
        # Scores and logits that overflow a careless exponential, and rows whose scores are all zero.
        given.index_query[5] *= 1e3
        given.query[6] *= 1e3
        given.gates[7] = 0.0
    weights = torch.zeros(layout.num_tokens, dtype=torch.float64)
    weights[[4, 5, 6]] = 0.25
    past = PackedPast(layout, 3, attention, Teaching(target, weights))
    output = run(past, given)
    (past.indexer_loss + output.sum()).backward()
    assert torch.isfinite(past.indexer_loss) and torch.isfinite(output).all()
    for x in (*given.trunk, *given.indexer):
        assert torch.isfinite(x.grad).all()
    uncounted = (weights == 0).nonzero().flatten()
    assert (given.index_query.grad[uncounted] == 0).all() and (given.gates.grad[uncounted] == 0).all()
    assert given.index_query.grad[5].abs().max() > 0
    alone = PackedPast(make_layout((1, ()), (1, ())), 3, attention, Teaching(target, torch.ones(2, dtype=torch.float64)))
    run(alone, draw(2))
    assert alone.indexer_loss == 0.0


def test_every_token_counts_alike_whatever_pack_it_lies_in():
    long, short = make_layout((24, ())), [make_layout((3, ()))] * 4
    whole = make_layout((24, ()), *[(3, ())] * 4)
    given = draw(whole.num_tokens, seed=7)
    past = PackedPast(whole, K, "sparse", Teaching("selected", weights_of(whole)))
    run(past, given)
    total, start = torch.zeros((), dtype=torch.float64), 0
    for layout in (long, *short):
        part = given.take(slice(start, start + layout.num_tokens))
        its_weights = torch.full((layout.num_tokens,), 1 / whole.num_tokens, dtype=torch.float64)
        its_past = PackedPast(layout, K, "sparse", Teaching("selected", its_weights))
        run(its_past, part)
        total += its_past.indexer_loss.detach()
        start += layout.num_tokens
    torch.testing.assert_close(past.indexer_loss.detach(), total)
    past_of_all = PackedPast(whole, K, "sparse", Teaching("dense", weights_of(whole)))
    run(past_of_all, given)
    expected = teach_by_definition(given, whole, "dense", weights_of(whole)).detach()
    torch.testing.assert_close(past_of_all.indexer_loss.detach(), expected)


def test_layers_are_averaged():
    past = PackedPast(LAYOUT, K, "sparse", Teaching("selected", weights_of(LAYOUT)))
    losses = []
    for layer in range(3):
        given = draw(LAYOUT.num_tokens, seed=10 + layer)
        past.attend(layer, *given.trunk, given.index)
        losses.append(teach_by_definition(given, LAYOUT, "selected", weights_of(LAYOUT)))
    torch.testing.assert_close(past.indexer_loss, torch.stack(losses).mean())


def test_e4m3_selects_and_scores_with_rounded_numbers_and_lets_gradients_through():
    # float32 as the model computes: quantising is defined from there on
    given = draw(LAYOUT.num_tokens, seed=8).moved("cpu", torch.float32)
    past = PackedPast(LAYOUT, K, "sparse", Teaching("selected", weights_of(LAYOUT, torch.float32)), emulates_e4m3=True)
    output = run(past, given)
    codes, scales = quantize_vectors(given.index_key.detach())
    lists = []
    for token, seen in enumerate(visible_keys(LAYOUT)):
        row = slice(token, token + 1)
        position = torch.tensor([len(seen) - 1])
        picked = indexer_select(
            given.index_query.detach()[row], given.gates.detach()[row], codes[seen], K, position, scales[seen]
        )[0]
        lists.append([seen[column] for column in picked.tolist() if column >= 0])
    assert lists != selected(LAYOUT, given), "rounding must change the selection, or this shows nothing"
    torch.testing.assert_close(output, attend_by_definition(given, lists))
    query_codes, query_scales = quantize_vectors(given.index_query.detach())
    rounded = Projections(
        *(x.detach() for x in given.trunk),
        (query_codes.float() * query_scales[..., None]).requires_grad_(),
        given.gates.detach().clone().requires_grad_(),
        (codes.float() * scales[:, None]).requires_grad_(),
    )
    plain = PackedPast(LAYOUT, K, "sparse", Teaching("selected", weights_of(LAYOUT, torch.float32)))
    run(plain, rounded)
    torch.testing.assert_close(past.indexer_loss, plain.indexer_loss)
    made, wanted = (torch.autograd.grad(p.indexer_loss, x.indexer) for p, x in ((past, given), (plain, rounded)))
    for gradient, its in zip(made, wanted, strict=True):
        torch.testing.assert_close(gradient, its)


def test_refusals_say_what_came():
    with pytest.raises(ValueError, match="dense, sparse, got 'full'"):
        PackedPast(LAYOUT, K, "full")
    with pytest.raises(ValueError, match="got 'mean'"):
        Teaching("mean", weights_of(LAYOUT))
    with pytest.raises(ValueError, match=r"weights \[46\], got \[3\]"):
        PackedPast(LAYOUT, K, "dense", Teaching("dense", torch.ones(3)))
    with pytest.raises(ValueError, match="got 0 tokens and 4"):
        PackedPast(make_layout(), K)
    with pytest.raises(ValueError, match="forward pass"):
        _ = PackedPast(LAYOUT, K).indexer_loss


def test_the_indexer_is_asked_only_where_somebody_scores():
    teaching = Teaching("dense", weights_of(LAYOUT))
    assert not PackedPast(LAYOUT, K).needs_index
    assert PackedPast(LAYOUT, K, wants_metrics=True).needs_index
    assert PackedPast(LAYOUT, K, teaching=teaching).needs_index and PackedPast(LAYOUT, K, "sparse").needs_index


def build_model(dtype: torch.dtype) -> tuple[KeyeModel, dict]:
    raw = make_config()
    model = KeyeModel(KeyeConfig.from_dict(raw))
    weights = {name: tensor for name, tensor in make_weights(raw).items() if "packing" not in name}
    model.load_state_dict(weights, strict=True)
    return model.to(dtype), raw


@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_a_pack_equals_separate_conversations_through_the_whole_network(attention, dtype, tolerance):
    """Hidden states and every parameter's gradient; the other side is `PlainPast`, one conversation a branch."""
    model, raw = build_model(dtype)
    top_k = raw["sa_config"]["topk"]
    layout = make_layout((top_k + 5, (4, 6)), (6, ()), (1, ()), (2 * top_k, (3,)))
    generator = torch.Generator().manual_seed(9)
    ids = torch.randint(0, raw["image_token_id"], (layout.num_tokens,), generator=generator)
    seen = visible_keys(layout)
    positions = torch.tensor([len(keys) - 1 for keys in seen]).expand(3, -1)
    direction = torch.randn(layout.num_tokens, raw["hidden_size"], generator=generator, dtype=torch.float64).to(dtype)

    def hidden_states(tokens: list[int], past) -> Tensor:
        return model(model.embed(ids[tokens], None, None), positions[:, tokens], past)

    together = hidden_states(list(range(layout.num_tokens)), PackedPast(layout, top_k, attention))
    (together * direction).sum().backward()
    gradients = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    for span in layout.spans:
        trunk = list(range(span.start, span.trunk_end))
        ends = (*span.branches[1:], span.end)
        own = [[], *(list(range(start, end)) for start, end in zip(span.branches, ends, strict=False))]
        for branch in own:
            output = hidden_states(trunk + branch, PlainPast(top_k, attention))
            learnt = branch or trunk
            torch.testing.assert_close(output[-len(learnt) :], together[learnt], rtol=tolerance, atol=tolerance)
            (output[-len(learnt) :] * direction[learnt]).sum().backward()
    assert set(gradients) == {name for name, x in model.named_parameters() if x.grad is not None}
    assert any("q_norm" in name for name in gradients) and not any("sa_indexer" in name for name in gradients)
    for name, gradient in gradients.items():
        wanted = dict(model.named_parameters())[name].grad
        spread = wanted.abs().max().clamp_min(1.0)
        torch.testing.assert_close(gradient / spread, wanted / spread, rtol=10 * tolerance, atol=10 * tolerance, msg=name)


@torch.no_grad()
def test_emulated_e4m3_is_what_the_engine_answers_with():
    """Hidden states of every token equal those of the engine's pages with index keys in e4m3, each branch a prompt."""
    model, raw = build_model(torch.float32)
    top_k = raw["sa_config"]["topk"]
    layout = make_layout((3 * top_k, (9, 2 * top_k)), (2 * top_k + 3, ()))
    ids = torch.randint(0, raw["image_token_id"], (layout.num_tokens,), generator=torch.Generator().manual_seed(4))
    seen = visible_keys(layout)
    positions = torch.tensor([len(keys) - 1 for keys in seen]).expand(3, -1)
    embeds = model.embed(ids, None, None)
    weights = weights_of(layout, torch.float32)
    found = {}
    for is_e4m3 in (True, False):
        past = PackedPast(layout, top_k, "sparse", Teaching("selected", weights), emulates_e4m3=is_e4m3)
        found[is_e4m3] = model(embeds, positions, past)
    config = EngineConfig(page_size=8, cache_tokens=128, index_cache="e4m3")
    num_changed = 0
    for last in [start - 1 for span in layout.spans for start in (*span.branches[1:], span.end)]:
        tokens = seen[last]
        caches = PagedCaches(model.config, config, torch.device("cpu"), torch.float32)
        pages = torch.randperm(16, generator=torch.Generator().manual_seed(last))
        slots = (8 * pages[:, None] + torch.arange(8)).flatten()[: len(tokens)]
        past = PagedPast(Batch([Segment(None, 0, len(tokens), slots)], is_prompt=True), caches, "sparse", top_k)
        answered = model(embeds[tokens], positions[:, tokens], past)
        torch.testing.assert_close(found[True][tokens], answered, rtol=1e-4, atol=1e-4)
        num_changed += int(((found[False][tokens] - answered).abs().amax(dim=1) > 1e-2).sum())
    assert num_changed > 5, "rounding must change selections, or this shows nothing"


def test_a_layer_computed_again_is_not_held():
    """With checkpointing the past keeps the step's own loss, not the second one with all that it was made from."""
    given = draw(LAYOUT.num_tokens)
    past = PackedPast(LAYOUT, K, "dense", Teaching("dense", weights_of(LAYOUT)))
    calls = []

    def layer() -> Tensor:
        calls.append(1)
        # As in a layer, something after attention keeps its input.
        return past.attend(0, *given.trunk, IndexerOutput(*(2 * x for x in given.indexer))).sin().sin()

    def made_by():
        return past.indexer_loss.grad_fn.next_functions[0][0].next_functions[0][0]

    output = torch.utils.checkpoint.checkpoint(layer, use_reentrant=False)
    first = made_by()
    (output.sum() + past.indexer_loss).backward()
    assert len(calls) == 2 and made_by() is first
