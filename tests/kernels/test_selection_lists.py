"""The CUDA C++ that chooses from lists, on a CPU: threads stand for a block's threads (`emulation/`)."""

import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "emulation"
COMPILER = shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
def test_rows_and_pruned_lists_equal_a_sort(tmp_path):
    program = tmp_path / "selection_lists"
    command = [str(COMPILER), "-std=c++20", "-O1", "-w", "-pthread", "-o", str(program), str(FOLDER / "selection_lists.cpp")]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr[-2000:]
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=200)
    wrong = [line for line in result.stdout.splitlines() if "WRONG" in line]
    assert result.returncode == 0 and not wrong, wrong or result.stderr[-2000:]
    assert result.stdout.count(": ok") >= 50
