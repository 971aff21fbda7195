"""The benchmark of passes over packs runs on a CPU, and its peer computes what the packs' attention does."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.packed_steps import MODES, PeerPast, make_layout
from openkeye.kernels.visible_keys import VisibleKeys
from openkeye.train.packed_past import PackedPast
from tests.train.packs import draw


def test_it_prints_a_row_for_the_peer_and_for_every_mode():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.packed_steps", "--steps", "1"]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [line.split("|")[3].strip() for line in result.stdout.splitlines() if line.startswith("| smallest")]
    assert rows == ["dense, torch's attention", *MODES]


def test_the_peer_computes_the_same():
    layout = make_layout([(20, 3), (7, 0), (9, 1)], 4)
    given = draw(layout.num_tokens)
    peer = PeerPast(VisibleKeys.of(layout.spans, torch.device("cpu"))).attend(0, *given.trunk, None)
    torch.testing.assert_close(peer, PackedPast(layout, 4).attend(0, *given.trunk, None))
