"""Kernels over packs of documents with branches against the plain twins, alone and through `PackedPast`."""

import pytest
import torch
from torch import Tensor

from openkeye.kernels import dispatch, dispatch_packs, reference, reference_packs
from openkeye.kernels.attention_lse import attention_lse
from openkeye.kernels.branched_attention import BranchedAttention
from openkeye.kernels.indexer_loss import dense_indexer_loss
from openkeye.kernels.indexer_select import indexer_select
from openkeye.kernels.quantize import quantize_vectors
from openkeye.kernels.visible_keys import Offsets, VisibleKeys
from openkeye.train.packed_past import PackedPast, Teaching
from tests.train.packs import Projections, draw, make_layout, visible_keys

LAYOUT = make_layout((37, (5, 20, 1)), (1, ()), (18, (30,)), (75, ()))
FLAT = make_layout((37, ()), (1, ()), (60, ()))
SCALE = 0.2


def visible_of(layout, device: str) -> VisibleKeys:
    return VisibleKeys.of(layout.spans, torch.device(device))


def project(layout, device: str, **shape: int) -> Projections:
    return draw(layout.num_tokens, **({"heads": 6, "groups": 2, "width": 16, "index_width": 16} | shape)).moved(
        device, torch.float32
    )


@pytest.mark.parametrize(
    ("layout", "is_e4m3", "max_scratch_bytes"),
    [(LAYOUT, False, 4 * 80 * 50), (LAYOUT, True, None), (FLAT, True, 4 * 80 * 20), (FLAT, False, None)],
)
def test_every_token_selects_as_its_twin_does(device, layout, is_e4m3, max_scratch_bytes):
    given, visible = project(layout, device), visible_of(layout, device)
    query, gates, key, scales = given.index_query.detach(), given.gates.detach(), given.index_key.detach(), None
    if is_e4m3:
        key, scales = quantize_vectors(key)
    picked = indexer_select(
        query,
        gates,
        key,
        7,
        visible.last_T,
        max_scratch_bytes,
        visible.first_T,
        scales,
        None,
        64,
        visible.gaps,
        visible.max_seen,
    )
    expected = reference_packs.branched_select(query, gates, key, 7, visible, scales)
    assert torch.equal(picked, expected)
    for seen, row in zip(visible_keys(layout), picked.tolist(), strict=True):
        assert {x for x in row if x >= 0} <= set(seen) and sum(x >= 0 for x in row) == min(7, len(seen))


def test_the_widest_view_is_the_longest_trunk_with_its_longest_branch(device):
    assert visible_of(LAYOUT, device).max_seen == max(len(keys) for keys in visible_keys(LAYOUT)) == 75
    assert visible_of(make_layout((37, (5, 20, 1))), device).max_seen == 57


@pytest.mark.parametrize(("heads", "groups", "width"), [(8, 2, 32), (9, 3, 64), (4, 1, 16)])
def test_the_log_sum_exp_leaves_gaps_out(device, heads, groups, width):
    given, visible = project(LAYOUT, device, heads=heads, groups=groups, width=width), visible_of(LAYOUT, device)
    query, key = given.query.detach(), given.key.detach()
    made = attention_lse(query, key, visible.last_T, SCALE, visible.first_T, visible.gaps)
    expected = reference_packs.branched_attention_lse(query.double(), key.double(), visible, SCALE)
    torch.testing.assert_close(made, expected.float(), rtol=1e-5, atol=1e-5)


def test_slabs_hold_every_token_once_beside_all_that_it_sees(device):
    visible, seen = visible_of(LAYOUT, device), visible_keys(LAYOUT)
    for max_pairs, count in ((1 << 20, 1), (64 * 64, 4), (200, None), (1, 187)):
        slabs = visible.slabs(max_pairs)
        assert [row for rows, _ in slabs for row in range(rows.start, rows.stop)] == list(range(LAYOUT.num_tokens))
        assert count is None or len(slabs) == count
        for rows, keys in slabs:
            num_rows = rows.stop - rows.start
            assert num_rows * (keys.stop - keys.start) <= max_pairs or num_rows == 1
            for row in range(rows.start, rows.stop):
                assert keys.start <= seen[row][0] and seen[row][-1] < keys.stop


@pytest.mark.parametrize(("heads", "groups", "width"), [(8, 2, 32), (9, 3, 64)])
@pytest.mark.parametrize("max_pairs", [None, 64 * 64])
def test_the_dense_loss_leaves_gaps_out(device, heads, groups, width, max_pairs):
    given, visible = project(LAYOUT, device, heads=heads, groups=groups, width=width), visible_of(LAYOUT, device)
    weights = torch.rand(LAYOUT.num_tokens, generator=torch.Generator().manual_seed(1)).to(device)
    loss, divergence = dense_indexer_loss(
        given.query, given.key, *given.indexer, visible.last_T, SCALE, visible.first_T, weights,
        gaps=visible.gaps, slabs=None if max_pairs is None else visible.slabs(max_pairs),
    )  # fmt: skip
    other = given.moved(device, torch.float64)
    its_loss, its_divergence = reference_packs.dense_indexer_loss(
        other.query, other.key, *other.indexer, visible, SCALE, weights.double()
    )
    torch.testing.assert_close(divergence, its_divergence.float(), rtol=1e-4, atol=1e-5)
    for mine, its in zip(torch.autograd.grad(loss, given.indexer), torch.autograd.grad(its_loss, other.indexer), strict=True):
        torch.testing.assert_close(mine, its.float(), rtol=1e-4, atol=2e-5 * float(its.abs().max()))


def plain_part(
    query: Tensor, key: Tensor, value: Tensor, offsets: Offsets, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """What a back end of a GPU gives for sequences one after the other."""
    its = (offsets.queries_N, offsets.keys_N, offsets.max_queries, offsets.max_keys)
    output, lse = reference.packed_attention_with_lse(query, key, value, *its, scale, is_causal)
    return output, lse.t().contiguous(), (torch.zeros(1, device=query.device),)


def plain_part_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, extra: list[Tensor],
    offsets: Offsets, scale: float, is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """By the formulas, from the whole's output and sums."""
    assert len(extra) == 1
    num_groups = key.shape[1]
    numbers = torch.arange(query.shape[0], device=query.device), torch.arange(key.shape[0], device=query.device)
    query_document, key_document = (
        torch.bucketize(rows, its[1:].long(), right=True)
        for rows, its in zip(numbers, (offsets.queries_N, offsets.keys_N), strict=True)
    )
    mask = query_document[:, None] == key_document
    if is_causal:
        mask &= numbers[0][:, None] >= numbers[1]
    keys, values = (x.repeat_interleave(query.shape[1] // num_groups, dim=1) for x in (key, value))
    weights = ((torch.einsum("thd,shd->hts", query, keys) * scale) - lse[:, :, None]).exp() * mask
    delta = (gradient * output).sum(dim=-1).t()[:, :, None]
    scores = weights * (torch.einsum("thd,shd->hts", gradient, values) - delta) * scale
    made = (torch.einsum("hts,thd->shd", scores, query), torch.einsum("hts,thd->shd", weights, gradient))
    key_gradient, value_gradient = (x.unflatten(1, (num_groups, -1)).sum(dim=2) for x in made)
    return torch.einsum("hts,shd->thd", scores, keys), key_gradient, value_gradient


def test_branches_merged_with_their_trunks_are_the_whole(device):
    given, visible = project(LAYOUT, device), visible_of(LAYOUT, device)
    output, lse = BranchedAttention.apply(*given.trunk, visible, SCALE, plain_part, plain_part_backward)
    other = given.moved(device, torch.float64)
    expected = reference_packs.branched_attention(*other.trunk, visible, SCALE)
    torch.testing.assert_close(output, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        lse.t(), reference_packs.branched_attention_lse(other.query, other.key, visible, SCALE).float(), rtol=1e-5, atol=1e-5
    )
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(device)
    made = torch.autograd.grad((output * direction).sum(), given.trunk)
    for mine, its in zip(made, torch.autograd.grad((expected * direction).sum(), other.trunk), strict=True):
        torch.testing.assert_close(mine, its.float(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def kernels_serve(monkeypatch) -> None:
    """The kernels run in the interpreter where there is no GPU."""
    for module in (dispatch, dispatch_packs):
        monkeypatch.setattr(module, "can_be_fast", lambda x: x.dtype != torch.float64)


@pytest.mark.filterwarnings("ignore:.*_attention runs in plain PyTorch")
@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize("target", ["dense", "selected", "selected_dense"])
def test_a_past_on_kernels_equals_one_without(device, kernels_serve, attention, target):
    layout = make_layout((25, (4, 9)), (1, ()), (21, ()))
    given = project(layout, device, heads=6, groups=2, width=32)
    other = given.moved(device, torch.float64)
    weights = torch.rand(layout.num_tokens, generator=torch.Generator().manual_seed(3)).to(device)
    direction = torch.randn(given.query.shape, generator=torch.Generator().manual_seed(4)).to(device)
    results = []
    for projections, its_weights in ((given, weights), (other, weights.double())):
        past = PackedPast(layout, 6, attention, Teaching(target, its_weights), wants_metrics=True)
        output = past.attend(0, *projections.trunk, projections.index)
        ((output * direction).sum() + 0.7 * past.indexer_loss).backward()
        results.append((output.detach(), past.report()))
    (output, report), (expected, its_report) = results
    torch.testing.assert_close(output, expected.float(), rtol=1e-4, atol=1e-5)
    assert report.keys() == its_report.keys()
    for name in report:
        assert abs(float(report[name]) - float(its_report[name])) < 1e-4, name
    for mine, its in zip((*given.trunk, *given.indexer), (*other.trunk, *other.indexer), strict=True):
        torch.testing.assert_close(mine.grad, its.grad.float(), rtol=1e-4, atol=3e-5 * float(its.grad.abs().max()))


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_losses_on_kernels_reach_only_what_they_teach(device, kernels_serve, attention):
    layout = make_layout((21, (4,)))
    for is_taught in (False, True):
        given = project(layout, device)
        teaching = Teaching("selected", torch.full((25,), 1 / 25, device=device))
        past = PackedPast(layout, 6, attention, teaching)
        output = past.attend(0, *given.trunk, given.index)
        (past.indexer_loss if is_taught else output.sum()).backward()
        assert all((x.grad is None) == is_taught for x in given.trunk)
        assert all((x.grad is None) != is_taught for x in given.indexer)


def test_a_layer_computed_again_learns_the_same(device, kernels_serve):
    layout = make_layout((21, (4,)))
    teaching = Teaching("selected", torch.full((25,), 1 / 25, device=device))
    made = []
    for recomputes in (False, True):
        given = project(layout, device)
        past = PackedPast(layout, 6, "sparse", teaching, emulates_e4m3=True)

        def layer(past=past, given=given) -> Tensor:
            return past.attend(0, *(2 * x for x in given.trunk), given.index)

        output = torch.utils.checkpoint.checkpoint(layer, use_reentrant=False) if recomputes else layer()
        (output.sum() + past.indexer_loss).backward()
        made.append([past.report()["indexer_kl"], *(x.grad for x in (*given.trunk, *given.indexer))])
    assert made[0][0] > 0
    for mine, its in zip(*made, strict=True):
        torch.testing.assert_close(mine, its)
