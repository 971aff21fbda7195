"""The engine's benchmarks run at a size for a CPU: what they measure is there, and what they claim of exactness holds."""

import json

import pytest
import torch

from benchmarks import exactness, invariance, serving
from benchmarks.random_model import TOPIC_TOKENS, Unions, shape_tiny, topic_embeddings, topical_ids

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs them at full size")


def test_serving_measures_dense_and_sparse_by_position(tmp_path, capsys):
    path = tmp_path / "results.json"
    assert serving.main(["--tiny", "--json", str(path), "--out", str(tmp_path / "results.md")]) == 0
    results = json.loads(path.read_text())
    for phase in ("prefill_ms", "decode_ms"):
        assert set(results[phase]["sparse"]) == set(results[phase]["dense"]) == {"32", "64", "128"}
        assert all(cost > 0 for curve in results[phase].values() for cost in curve.values())
    assert set(results["fixed_ms"]) == set(results["batch_ms"]) == {"1", "2"}
    assert 16 <= results["unions"]["128"] <= 16 * 16
    printed = capsys.readouterr().out
    assert (tmp_path / "results.md").read_text().strip() in printed and "sparse / dense" in printed


def test_without_a_gpu_the_full_size_is_refused_in_one_line(capsys):
    assert serving.main([]) == 2
    assert capsys.readouterr().err == "the 30B shape needs a GPU; --tiny runs on a CPU\n"


def test_the_engine_is_as_exact_as_the_plain_model_in_float32(capsys):
    assert exactness.main(["--layers", "2", "--tokens", "6"]) == 0
    rows = [line.split("|")[2:4] for line in capsys.readouterr().out.splitlines()[2:]]
    errors = [float(largest) for _, largest in rows]
    # Index keys in the model's format twice, everything in e4m3, and the plain model against itself.
    assert errors[0] < 1e-5 and errors[1] < 1e-5 and errors[3] == 0 and 0 < errors[2] < 1


def test_company_changes_bits_only_without_the_mode(capsys):
    assert invariance.main(["--layers", "2", "--tokens", "4"]) == 0
    rows = {line.split("|")[1].strip(): line.split("|")[2:4] for line in capsys.readouterr().out.splitlines()[2:]}
    assert [float(cell) for cell in rows["batch-invariant"]] == [0, 0]
    assert max(float(cell) for cell in rows["other"]) > 0


def test_tokens_of_a_topic_lie_close_and_a_prompt_stays_with_one():
    vocabulary = shape_tiny().vocab_size
    ids = topical_ids(640, vocabulary)
    assert int(ids.max()) < vocabulary and all(len(run.unique()) == 1 for run in (ids // TOPIC_TOKENS).split(64))
    embeddings = topic_embeddings(torch.Size((vocabulary, 64)), 0.1, torch.Generator().manual_seed(0), "cpu")
    first, second, other = embeddings[0], embeddings[1], embeddings[TOPIC_TOKENS]
    assert (first - second).norm() < 0.2 * first.norm() < (first - other).norm()


def test_unions_count_distinct_keys_of_neighbours(monkeypatch):
    def select(*_arguments, **_pages):
        return torch.cat([torch.arange(16)[:, None], torch.full((16, 1), 3), torch.full((16, 1), -1)], dim=1).int()

    monkeypatch.setattr("openkeye.engine.batch.indexer_select", select)
    unions = Unions()
    with unions.counted():
        from openkeye.engine import batch

        batch.indexer_select()
    assert unions.mean() == 16 and batch.indexer_select is select
