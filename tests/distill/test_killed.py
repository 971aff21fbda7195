"""kill -9 at any moment of a distillation: the run ends as if nothing had happened, and counts no rollout twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from openkeye.model.weights import load_model
from tests.distill.killed_distillation import MOMENTS

ROOT = Path(__file__).parents[2]


def test_a_distillation_that_is_killed_again_and_again_ends_as_an_unbroken_one(tmp_path):
    words = [sys.executable, "-m", "tests.distill.killed_distillation", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ends = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert ends == {**dict.fromkeys(MOMENTS, "-9"), "end": "0"}, done.stderr
    logs = [
        [json.loads(line) for line in (tmp_path / name / "run" / "log.jsonl").read_text().splitlines()]
        for name in ("unbroken", "broken")
    ]
    told = [[(record["step"], record["num_samples"], record["loss/ref_kl"]) for record in log] for log in logs]
    assert [step for step, _, _ in told[0]] == [1, 2, 3, 4, 5]
    assert told[0] == told[1], "each step once, with the figures of the unbroken run"
    whole, mended = (load_model(tmp_path / name / "out").state_dict() for name in ("unbroken", "broken"))
    assert all(torch.equal(whole[name], mended[name]) for name in whole)
    # Steps behind a checkpoint are repeated over the same rollouts, and over no others.
    attempts = (tmp_path / "broken" / "run" / "attempts.txt").read_text().splitlines()
    assert len(attempts) > 5 and set(attempts) == set((tmp_path / "unbroken" / "run" / "attempts.txt").read_text().splitlines())
