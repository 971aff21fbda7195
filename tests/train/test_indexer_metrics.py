"""Recall, mass and unique keys equal their definitions on the runs that are sampled, and the runs are the right ones."""

import pytest
import torch

from openkeye.kernels.visible_keys import VisibleKeys
from openkeye.train.indexer_metrics import NUM_RUNS, RUN, sample_runs
from openkeye.train.packed_past import PackedPast, Teaching
from tests.train.packs import draw, make_layout, visible_keys
from tests.train.test_packed_past import selected


def test_runs_are_whole_stay_inside_a_segment_and_see_more_than_k():
    layout = make_layout((40, (33, 5)), (10, (16,)), (7, ()), (300, ()))
    visible = VisibleKeys.of(layout.spans, torch.device("cpu"))
    seen = visible_keys(layout)
    runs = sample_runs(visible, 20)
    assert len(runs) == NUM_RUNS and runs == sample_runs(visible, 20)
    for run in runs:
        assert run.end - run.start == RUN
        assert all(len(seen[token]) > 20 for token in range(run.start, run.end))
        bounds = (run.span.start, run.span.trunk_end, *run.span.branches[1:], run.span.end)
        assert not any(run.start < bound < run.end for bound in bounds)
    assert len({run.span.start for run in runs}) > 1
    short = make_layout((9, (4,)), (3, ()))
    assert [(run.start, run.end) for run in sample_runs(VisibleKeys.of(short.spans, torch.device("cpu")), 7)] == [
        (7, 9),
        (9, 13),
    ]


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_figures_equal_their_definitions(attention):
    layout, k = make_layout((30, (20, 7)), (5, ()), (41, ())), 6
    given = draw(layout.num_tokens, seed=3)
    past = PackedPast(layout, k, attention, wants_metrics=True)
    with torch.no_grad():
        for layer in (0, 1):
            past.attend(layer, *given.trunk, given.index)
    report = past.report()
    seen, picked = visible_keys(layout), selected(layout, given, k)
    recalls, masses, unique = [], [], []
    for run in sample_runs(VisibleKeys.of(layout.spans, torch.device("cpu")), k):
        for token in range(run.start, run.end):
            keys = given.key.detach()[seen[token]].repeat_interleave(3, dim=1)
            logits = torch.einsum("hd,shd->hs", given.query.detach()[token], keys) * 8**-0.5
            target = logits.softmax(dim=1).mean(dim=0)
            best = {seen[token][column] for column in target.topk(k).indices.tolist()}
            recalls.append(len(best & set(picked[token])) / k)
            masses.append(sum(float(target[seen[token].index(key)]) for key in picked[token]))
        unique.append(len(set().union(*picked[run.start : run.end])))
    expected = {"recall": recalls, "mass": masses, "unique_keys": unique}
    for name, values in expected.items():
        wanted = sum(values) / len(values)
        for key in (f"indexer_{name}/0", f"indexer_{name}/1", f"indexer_{name}"):
            assert abs(float(report[key]) - wanted) < 1e-5, key
    assert 0 < report["indexer_recall"] < 1 and k < report["indexer_unique_keys"] < RUN * k


def test_a_perfect_indexer_recalls_all():
    """One head, and index keys and queries that are attention's own: the scores' order is that of the probabilities."""
    layout, k = make_layout((40, (18,))), 5
    given = draw(layout.num_tokens, heads=1, groups=1, index_heads=1)
    with torch.no_grad():
        # A constant beside them keeps the ReLU out of the order.
        given.index_query[:, 0, :4], given.index_key[:, :4] = given.query[:, 0, :4], given.key[:, 0, :4]
        given.query[:, :, 4:], given.key[:, :, 4:] = 0.0, 0.0
        given.index_query[:, 0, 4:], given.index_key[:, 4:], given.gates[:] = 50.0, 1.0, 1.0
    past = PackedPast(layout, k, "sparse", wants_metrics=True)
    past.attend(0, *given.trunk, given.index)
    assert past.report()["indexer_recall"] == 1.0


def test_without_rows_that_select_there_is_no_figure():
    layout = make_layout((6, (2,)))
    given = draw(layout.num_tokens)
    teaching = Teaching("selected", torch.full((layout.num_tokens,), 1 / 8, dtype=torch.float64))
    past = PackedPast(layout, 20, "sparse", teaching, wants_metrics=True)
    past.attend(0, *given.trunk, given.index)
    report = past.report()
    assert torch.isnan(report["indexer_recall"]) and report["indexer_kl"] > 0
