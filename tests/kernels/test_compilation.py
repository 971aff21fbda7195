"""Every Triton kernel compiles for the oldest and the newest served architecture, on a machine without a GPU too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


# The neighbours of sm_80 (86, 89) have 99 KiB of shared memory a block, sm_90 has 227.
@pytest.mark.parametrize(("capability", "shared_kib"), [("80", 99), ("90", 227)])
def test_every_kernel_compiles(tmp_path, capability, shared_kib):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "compile_kernels.py"), capability]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    for line in result.stdout.splitlines():
        assert int(line.split()[1]) <= shared_kib * 1024, line
    assert len(result.stdout.splitlines()) >= 11
