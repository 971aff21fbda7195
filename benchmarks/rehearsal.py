"""Before anything is timed: what the figures are measured with, and kernels compiled in processes side by side."""

import datetime
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import triton

from openkeye.kernels.build import FOLDER, cuda_library, find_nvcc

REHEARSAL_SECONDS = 90


def header() -> str:
    """What the figures were measured with."""
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = (subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines() or [driver])[
            0
        ].strip()
    has_cuda = cuda_library("top_k") is not None
    parts = [
        torch.cuda.get_device_name(),
        f"driver {driver}",
        f"torch {torch.__version__}",
        f"triton {triton.__version__}",
        f"CUDA {torch.version.cuda}",
        f"cuDNN {torch.backends.cudnn.version()}",
        f"kernels in CUDA C++ {'serve' if has_cuda else 'do not serve'}",
        datetime.date.today().isoformat(),
    ]
    return ", ".join(parts)


def rehearse(commands: Sequence[Sequence[str]]) -> None:
    """Runs modules with their arguments side by side, so that what they compile lies in the caches on the disk."""
    start = time.monotonic()
    # Without the kernels in CUDA C++, which are compiled beside: many processes would each compile all of them.
    environment = os.environ | {"OPENKEYE_CUDA": "0"}
    running = [
        subprocess.Popen([sys.executable, "-m", *command], env=environment, stdout=subprocess.DEVNULL) for command in commands
    ]
    if os.environ.get("OPENKEYE_CUDA") != "0" and find_nvcc() is not None:
        names = [source.stem for source in FOLDER.glob("*.cu")]
        with ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(cuda_library, names))
    for process in running:
        try:
            process.wait(max(0.1, start + REHEARSAL_SECONDS - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    print(f"compiled in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
