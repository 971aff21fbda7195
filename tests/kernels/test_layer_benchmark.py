"""The benchmark of a whole layer computes what the model computes."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def test_the_benchmarks_layer_is_the_models():
    command = [sys.executable, "-m", "benchmarks.layer", "--check-only"]
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if not torch.cuda.is_available() else {})
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "sparse: the layer agrees" in result.stdout, result.stderr[-2000:]
