"""Compiling the CUDA C++ kernels: on any machine with nvcc, loaded on Hopper alone."""

import ctypes
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

from openkeye.kernels import build

needs_nvcc = pytest.mark.skipif(build.find_nvcc() is None, reason="needs nvcc")

SOURCE = 'extern "C" int openkeye_answer(void) { return 42; }\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Sources and cache of one test, and no memory of other tests."""
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENKEYE_CUDA", raising=False)
    (tmp_path / "answer.cu").write_text(SOURCE)
    cached = (build.cuda_library, build.find_nvcc, build._source_key, build._warn_once)
    for function in cached:
        function.cache_clear()
    yield tmp_path
    for function in cached:
        function.cache_clear()


def pretend_hopper(monkeypatch, capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)


def hide_nvcc(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_: None)


@needs_nvcc
def test_a_library_is_compiled_once_and_its_functions_can_be_called(folder, monkeypatch):
    pretend_hopper(monkeypatch)
    library = build.cuda_library("answer")
    assert library is not None and library.openkeye_answer() == 42
    compiled = list((folder / "cache" / "openkeye").iterdir())
    assert [path.suffix for path in compiled] == [".so"]
    build.cuda_library.cache_clear()
    monkeypatch.setattr(build, "compile_library", None)
    assert build.cuda_library("answer").openkeye_answer() == 42


@needs_nvcc
def test_another_source_is_another_library(folder):
    nvcc = build.find_nvcc()
    first = build.cached_path("answer", nvcc)
    build._source_key.cache_clear()
    (folder / "answer.cu").write_text(SOURCE.replace("42", "43"))
    second = build.cached_path("answer", nvcc)
    build._source_key.cache_clear()
    (folder / "shared.cuh").write_text("// a header\n")
    assert len({first, second, build.cached_path("answer", nvcc)}) == 3


@needs_nvcc
def test_every_source_is_compiled_ahead_of_time_and_then_serves_without_nvcc(folder, monkeypatch, capsys):
    assert build.main() == 0
    assert ctypes.CDLL(capsys.readouterr().out.strip()).openkeye_answer() == 42
    build.find_nvcc.cache_clear()
    pretend_hopper(monkeypatch)
    hide_nvcc(monkeypatch)
    assert build.cuda_library("answer").openkeye_answer() == 42


@needs_nvcc
def test_a_source_that_does_not_compile_is_refused_with_the_words_of_nvcc(folder):
    (folder / "answer.cu").write_text("int answer() { return undeclared_name; }\n")
    with pytest.raises(RuntimeError, match=r"could not compile answer.cu(.|\n)*undeclared_name"):
        build.compile_library("answer", folder / "answer.so")
    assert [path.name for path in folder.iterdir()] == ["answer.cu"]


def test_a_hopper_gpu_without_nvcc_is_told_once(folder, monkeypatch):
    pretend_hopper(monkeypatch)
    hide_nvcc(monkeypatch)
    with pytest.warns(UserWarning, match="no nvcc"):
        assert build.cuda_library("answer") is None
    build.cuda_library.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.cuda_library("answer") is None


def test_other_gpus_and_a_switched_off_library_are_served_by_triton_without_a_word(folder, monkeypatch):
    hide_nvcc(monkeypatch)
    pretend_hopper(monkeypatch, (8, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.cuda_library("answer") is None
        build.cuda_library.cache_clear()
        pretend_hopper(monkeypatch)
        monkeypatch.setenv("OPENKEYE_CUDA", "0")
        assert build.cuda_library("answer") is None


def test_without_nvcc_compiling_ahead_of_time_says_what_is_missing(folder, monkeypatch, capsys):
    hide_nvcc(monkeypatch)
    assert build.main() == 1
    assert "install the CUDA toolkit" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="cannot be compiled: no nvcc"):
        build.compile_library("answer", folder / "answer.so")


def test_a_launch_that_failed_is_an_error():
    build.check_launch(0, "answer")
    with pytest.raises(RuntimeError, match=r"answer: .* 98"):
        build.check_launch(98, "answer")


def test_a_folder_that_cannot_be_written_is_one_line():
    command = [sys.executable, "-m", "openkeye.kernels.build"]
    environment = os.environ | {"XDG_CACHE_HOME": "/dev/full"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if build.find_nvcc() is None:
        assert result.returncode == 1
        return
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "cannot be written" in result.stderr


@needs_nvcc
def test_on_hopper_a_folder_that_cannot_be_written_leaves_triton_and_says_so_once(folder, monkeypatch):
    pretend_hopper(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/full")
    with pytest.warns(UserWarning, match="cannot be written .* Triton kernels serve"):
        assert build.cuda_library("answer") is None
