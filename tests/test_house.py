"""The house rules that a machine can check: formatting, types, file lengths, help in under a second."""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)


def test_ruff_finds_nothing():
    result = run("ruff", "check", ".")
    assert result.returncode == 0, result.stdout
    result = run("ruff", "format", "--check", ".")
    assert result.returncode == 0, result.stdout


def test_mypy_finds_nothing():
    result = run("mypy", "openkeye")
    assert result.returncode == 0, result.stdout


def test_files_stay_short():
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / "openkeye").rglob("*.py")}
    longest = {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > 650}
    assert not longest, longest
    assert sorted(lengths.values())[len(lengths) // 2] <= 200


def test_help_answers_in_under_a_second():
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        result = run("openkeye.apps.commands", "--help")
        seconds.append(time.monotonic() - start)
        assert result.returncode == 0 and "COMMAND" in result.stdout, result.stderr
    assert min(seconds) < 1.0, seconds
