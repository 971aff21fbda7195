"""The kernels' benchmark: it compares before it times, prints nothing that fails, and its lists share what trained ones do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import switch_over
from benchmarks.inputs import Shape, causal_lists, pooled_lists, uniform_lists
from benchmarks.measure import Case, Peer, Report, Work, compare, only_triton
from openkeye.kernels.build import cuda_library

ROOT = Path(__file__).parents[2]


def check_only(module: str) -> str:
    """What `python -m module --check-only` prints."""
    command = [sys.executable, "-m", module, "--check-only"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-2000:]
    return result.stdout


def test_every_operation_is_compared_with_its_twin():
    text = check_only("benchmarks.kernels")
    agreeing = [line.split(",")[0] for line in text.splitlines() if line.endswith("agrees with its twin")]
    operations = {"indexer_select", "top_k", "build_unions", "sparse_attention", "select + attend", "indexer_decode"}
    operations |= {"sparse_decode", "whole step", "sparse_attention_backward", "dense_indexer_loss", "sparse_indexer_loss"}
    operations |= {"cross_entropy", "experts", "norm_rotary_write", "index_norm_rotary_write", "dense_attention"}
    operations |= {"by unions", "query by query"}
    assert operations == set(agreeing)
    assert text.count("rows equal the twin's in every position") == 2


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


@pytest.mark.parametrize("shape", [Shape(32, 32, 64), Shape(96, 96, 64), Shape(96, 48, 64), Shape(700, 600, 64)])
def test_causal_lists_take_all_keys_while_there_are_few(shape):
    lists = causal_lists(shape, "cpu")
    assert lists.shape == (shape.num_queries, shape.top_k)
    for position, row in zip(shape.positions.tolist(), lists, strict=True):
        taken = row[row >= 0]
        assert taken.numel() == min(position + 1, shape.top_k) and taken[-1] <= position
        assert (taken[1:] > taken[:-1]).all() and (row[taken.numel() :] == -1).all()


def test_sparse_is_compared_with_dense_before_their_switch_over_is_measured():
    lines = check_only("benchmarks.switch_over").splitlines()
    sizes, told = switch_over.SIZES if torch.cuda.is_available() else switch_over.TINY_SIZES, ("fp8", "bf16")
    num_shapes = len(sizes.contexts) + sum(length >= sizes.num_queries for length in sizes.contexts)
    assert sum(line.startswith("dense by ") for line in lines) == num_shapes
    for name in told:
        assert sum(line.startswith(f"select + attend, {name}, ") for line in lines) == num_shapes
        steps = [f"whole step, {name}, {batch} x {length}" for batch in sizes.batches for length in sizes.decode_contexts]
        assert all(f"{step}: agrees with its twin" in lines for step in steps)


@pytest.mark.parametrize(
    ("dense", "sparse", "found"),
    [
        ([1.0, 2.0, 3.0], [0.5, 2.0, 2.0], 1024),
        ([1.0, 2.0, 3.0], [0.5, 2.1, 2.0], 3072),
        ([1.0, 2.0, 3.0], [0.5, 1.0, 3.1], None),
        ([1.0, 2.0, 3.0], [0.5, None, 2.0], 3072),
        ([None, 2.0, 3.0], [0.5, 1.0, 2.0], 2048),
    ],
)
def test_the_switch_over_is_where_sparse_is_never_slower_again(dense, sparse, found, capsys):
    figures = zip((1024, 2048, 3072), dense, sparse, strict=True)
    lines = [switch_over.Line(length, "flash", its, {"fp8": ours, "bf16": 9.0}) for length, its, ours in figures]
    assert switch_over.switch_over(lines, "fp8") == found
    switch_over.say_table(Report("time", "cpu"), "Things", lines, is_microseconds=False)
    printed = capsys.readouterr().out
    where = f"{found} tokens" if found else "no measured length"
    assert f"\nsparse is not slower from {where} on (fp8 index) / no measured length (bf16 index)\n" in printed
    assert f"| 3072 | flash | 3.00 | {sparse[2]:.2f} | {3 / sparse[2]:.2f} | 9.00 | 0.33 |" in printed


@pytest.mark.parametrize(("num_keys", "is_refused"), [(32, True), (96, False)])
def test_no_figure_stands_where_sparse_attention_to_all_keys_is_not_dense(num_keys, is_refused, device, monkeypatch):
    monkeypatch.setattr(Report, "time", lambda self, run: run() is None or 2.0)
    attend = switch_over.dense_attention
    monkeypatch.setattr(switch_over, "dense_attention", lambda *arguments: 1.1 * attend(*arguments))
    report = Report("time", device)
    line = switch_over.Prompt(report, switch_over.TINY_SIZES, num_keys, 32).line()
    # The last 32 of 96 queries see more than k keys: nothing to hold against dense attention but its own twin.
    assert line.dense is None and line.sparse == dict.fromkeys(("fp8", "bf16"), None if is_refused else 2.0)
    assert ("sparse attention to all keys" in report.failures[-1]) == is_refused


def test_no_figure_of_decoding_stands_where_the_step_over_all_keys_is_not_dense(device, monkeypatch):
    attend = switch_over.dense_attention
    monkeypatch.setattr(switch_over, "dense_attention", lambda *arguments: 1.1 * attend(*arguments))
    for context, num_failures in ((64, 2), (128, 0)):
        report = Report("check", device)
        pool = switch_over.Pool(switch_over.TINY_SIZES, context, device)
        switch_over.decode_line(switch_over.Decode(report, pool, 2))
        assert len(report.failures) == num_failures and all("decoding over all keys" in told for told in report.failures)
