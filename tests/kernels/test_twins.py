"""`benchmarks.twins`: both twins learn from the same packs, and the gap is of held-out losses."""

import json
import math

import pytest

from benchmarks import twins
from openkeye.inputs.processor import BUNDLED_DIR


def test_the_interval_is_students():
    mean, low, high = twins.mean_with_interval([0.1, 0.2, 0.3])
    assert (mean, low, high) == pytest.approx((0.2, 0.2 - 4.303 * 0.1 / math.sqrt(3), 0.2 + 4.303 * 0.1 / math.sqrt(3)))
    assert math.isnan(twins.mean_with_interval([0.1])[1])


@pytest.mark.timeout(240)
def test_twins_on_a_cpu(tmp_path, capsys):
    words = ["--model", str(BUNDLED_DIR), "--steps", "1", "--seeds", "1", "--frames", "16", "--tokens", "1024"]
    words += ["--context", "1024", "--held-out", "2", "--work", str(tmp_path)]
    assert twins.main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["gap"]["mean"] == pytest.approx(report["after"]["sparse"][0] - report["after"]["dense"][0])
    read = {
        attention: json.loads((tmp_path / f"{attention}-1-run" / "log.jsonl").read_text().splitlines()[-1])
        for attention in twins.ATTENTIONS
    }
    assert read["dense"]["loader/tokens/clips"] == read["sparse"]["loader/tokens/clips"]
    # openkeye-tiny attends sparsely: over all keys it answers worse, not by much.
    assert 0 < report["before"]["sparse"] < 1
