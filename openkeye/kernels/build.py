"""Compiles the CUDA C++ kernels (`NAME.cu` beside `NAME.py`) for Hopper GPUs and loads them through ctypes.

A kernel is compiled when it is first asked for and kept in ~/.cache/openkeye (or $XDG_CACHE_HOME/openkeye). To compile all of
them ahead of time, on a machine that needs nvcc but no GPU:

    python -m openkeye.kernels.build

OPENKEYE_CUDA=0 in the environment leaves them out, so that the Triton kernels serve everywhere.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from openkeye.common.checks import InputError, writing_to

FOLDER = Path(__file__).parent
CAPABILITY = (9, 0)
FLAGS = (
    "-gencode=arch=compute_90a,code=sm_90a",
    "-O3",
    "-std=c++17",
    "-lineinfo",
    "-shared",
    "-Xcompiler=-fPIC",
)
NO_NVCC = "no nvcc under $CUDA_HOME, on the PATH or in /usr/local/cuda/bin"


@functools.cache
def cuda_library(name: str) -> ctypes.CDLL | None:
    """The compiled `NAME.cu`, or None where its Triton twin has to serve: the GPU is no Hopper, or nothing can compile.

    The launchers in it take raw pointers, sizes and a stream, and return a cudaError_t; see `check_launch`.

    Raises:
        RuntimeError: nvcc refused the source.
    """
    if os.environ.get("OPENKEYE_CUDA") == "0":
        return None
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != CAPABILITY:
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        # Without nvcc a library that was compiled elsewhere from this very source serves too.
        compiled = sorted(cache_folder().glob(f"{name}-{_source_key(name)}-*.so"))
        if not compiled:
            _warn_once(f"{NO_NVCC}: the slower Triton kernels serve on this GPU")
            return None
        return ctypes.CDLL(str(compiled[-1]))
    path = cached_path(name, nvcc)
    try:
        if not path.exists():
            compile_library(name, path)
    except InputError as error:
        _warn_once(f"{error}: the slower Triton kernels serve on this GPU (XDG_CACHE_HOME names another folder)")
        return None
    return ctypes.CDLL(str(path))


def check_launch(status: int, operation: str) -> None:
    """Raises RuntimeError where a launcher returned another cudaError_t than success."""
    if status:
        raise RuntimeError(f"{operation}: the CUDA kernel could not be launched (cudaError_t {status})")


def compile_library(name: str, out_path: Path) -> None:
    """Compiles `NAME.cu` to a shared library at out_path, whole or not at all; needs nvcc and no GPU.

    Raises:
        RuntimeError: there is no nvcc, or it refused the source; with nvcc's words.
        InputError: the folder cannot be written.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError(f"{name}.cu cannot be compiled: {NO_NVCC}")
    with writing_to(out_path.parent):
        out_path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out_path.parent) as scratch:
            unfinished = Path(scratch) / out_path.name
            command = [nvcc, *FLAGS, "-o", str(unfinished), str(FOLDER / f"{name}.cu")]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise RuntimeError(f"nvcc could not compile {name}.cu:\n{result.stdout}{result.stderr}")
            # Another process may be doing the same: the last one to finish wins, and nobody loads half a file.
            unfinished.replace(out_path)


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "openkeye"


def cached_path(name: str, nvcc: str) -> Path:
    """Where the library of this source, these flags and this compiler lies."""
    return cache_folder() / f"{name}-{_source_key(name)}-{_digest(_nvcc_version(nvcc))}.so"


@functools.cache
def find_nvcc() -> str | None:
    """nvcc of $CUDA_HOME or $CUDA_PATH, else of the PATH, else of /usr/local/cuda."""
    roots = [os.environ[variable] for variable in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(variable)]
    candidates = [str(Path(root) / "bin" / "nvcc") for root in roots] + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for found in map(shutil.which, candidates) if found), None)


@functools.cache
def _nvcc_version(nvcc: str) -> bytes:
    return subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout


@functools.cache
def _source_key(name: str) -> str:
    """Changes with the source, with any header beside it and with the flags."""
    parts = [path.read_bytes() for path in (FOLDER / f"{name}.cu", *sorted(FOLDER.glob("*.cuh")))]
    return _digest(*parts, " ".join(FLAGS).encode())


def _digest(*parts: bytes) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little") + part)
    return state.hexdigest()[:16]


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def main() -> int:
    for source in sorted(FOLDER.glob("*.cu")):
        nvcc = find_nvcc()
        if nvcc is None:
            print(f"{NO_NVCC}: install the CUDA toolkit", file=sys.stderr)
            return 1
        path = cached_path(source.stem, nvcc)
        try:
            if not path.exists():
                compile_library(source.stem, path)
        except InputError as error:
            print(error, file=sys.stderr)
            return 2
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
