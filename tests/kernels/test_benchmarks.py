"""The kernels' benchmark: it compares before it times, prints nothing that fails, and its lists share what trained ones do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.inputs import Shape, pooled_lists, uniform_lists
from benchmarks.measure import Case, Peer, Report, Work, compare, only_triton
from openkeye.kernels.build import cuda_library

ROOT = Path(__file__).parents[2]


def test_every_operation_is_compared_with_its_twin():
    command = [sys.executable, "-m", "benchmarks.kernels", "--check-only"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-2000:]
    agreeing = [line.split(",")[0] for line in result.stdout.splitlines() if line.endswith("agrees with its twin")]
    operations = {"indexer_select", "top_k", "build_unions", "sparse_attention", "select + attend", "indexer_decode"}
    operations |= {"sparse_decode", "whole step", "sparse_attention_backward", "dense_indexer_loss", "sparse_indexer_loss"}
    operations |= {"cross_entropy", "experts", "norm_rotary_write", "index_norm_rotary_write", "dense_attention"}
    assert operations == set(agreeing)
    assert result.stdout.count("rows equal the twin's in every position") == 2


@pytest.mark.parametrize("union_keys", [140, 300, 513, 1200])
def test_pooled_lists_share_as_many_keys_as_asked(union_keys):
    lists = pooled_lists(Shape(8192, 1024, 128), "cpu", union_keys=union_keys)
    assert lists.shape == (1024, 128) and (lists[:, 1:] > lists[:, :-1]).all()
    assert lists.min() >= 0 and lists.max() < 8192 - 1024
    sizes = [tile.unique().numel() for tile in lists.split(16)]
    assert abs(sum(sizes) / len(sizes) / union_keys - 1) < 0.05


@pytest.mark.parametrize(("num_keys", "reported"), [(32768, 4999), (65536, 6485), (131072, 8211), (262144, 10174)])
def test_unions_are_as_large_as_reported(num_keys, reported):
    assert abs(Shape(num_keys, 8192, 2048).union_keys / reported - 1) < 0.001
    lists = pooled_lists(Shape(num_keys, 64, 2048), "cpu")
    sizes = [tile.unique().numel() for tile in lists.split(16)]
    assert abs(sum(sizes) / len(sizes) / reported - 1) < 0.05


def test_uniform_lists_share_next_to_nothing():
    lists = uniform_lists(Shape(32768, 64, 64), "cpu")
    assert (lists[:, 1:] > lists[:, :-1]).all() and lists[:16].unique().numel() > 0.95 * 16 * 64


def test_a_line_that_disagrees_is_not_printed_and_the_others_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Report, "time", lambda self, run: run() or 2.0)
    report = Report("time", "cpu")
    report.begin("Things")
    calls = []
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    for name, result in (("wrong", bad), ("right", good)):
        peer, work = Peer("another", 5.0), Work(flops=716e9)
        run = (lambda name=name: calls.append(name),)
        report.case(Case(name, "3", run, lambda r=result: compare("it", r, good, 1e-3), work, peer=peer, goal=1.5))
    assert calls == ["right"] and report.finish(tmp_path / "out.md") == 1
    text = (tmp_path / "out.md").read_text()
    assert "| right | 3 | 2.00 | 358 TFLOP/s | 1.00 | 50% | another | 5.00 | 2.50 | at most 1.50: MISSED |" in text
    assert "| wrong" not in text and "- wrong, 3: Disagreement" in text
    assert capsys.readouterr().out.strip() == text.strip()


def test_without_cuda_libraries_no_memory_of_them_stays(monkeypatch):
    monkeypatch.setenv("OPENKEYE_CUDA", "1")
    with only_triton():
        assert os.environ["OPENKEYE_CUDA"] == "0" and cuda_library("top_k") is None
        assert cuda_library.cache_info().currsize == 1
    assert os.environ["OPENKEYE_CUDA"] == "1" and cuda_library.cache_info().currsize == 0


def test_kernels_are_named_without_namespaces_and_parameters():
    from benchmarks.where_time_goes import short_name

    assert short_name("(anonymous namespace)::score_kernel((anonymous namespace)::Arguments)") == "score_kernel"
    assert short_name("void at::native::elementwise_kernel<128, 4>(int)") == "elementwise_kernel"
    assert short_name("_quantize") == "_quantize"
