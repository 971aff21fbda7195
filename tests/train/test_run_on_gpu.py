"""A whole run on one GPU, in bf16 through the kernels, stopped and gone on with."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openkeye.data.config import Share
from openkeye.inputs.processor import BUNDLED_DIR
from openkeye.train.loop import Trainer
from openkeye.train.reporter import SilentReporter
from tests.train.test_golden_losses import recipe, squares_loader


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"recomputes": True, "optimizer": "muon"}], ids=["plain", "recomputed"])
def test_a_run_in_bf16_is_near_the_one_in_fp32(tmp_path: Path, changes: dict):
    reporters = {}
    for dtype in ("float32", "bfloat16"):
        config = replace(recipe(tmp_path / dtype), compute_dtype=dtype, model_dir=str(BUNDLED_DIR), metrics_every=2, **changes)
        assert config.stages[0].mixture == (Share("squares"),)
        reporters[dtype] = SilentReporter()
        is_finished = False
        # Stopped after each of the first steps, then run to the end.
        for seconds in (0, 0, math.inf):
            is_finished = Trainer(config, reporters[dtype], squares_loader, torch.device("cuda", 0)).run(seconds)
        assert is_finished and len(reporters[dtype].records) == 20
    pairs = zip(reporters["float32"].records, reporters["bfloat16"].records, strict=True)
    for step, (wide, narrow) in enumerate(pairs):
        assert narrow["num_skipped"] == 0 and float(narrow["memory_bytes"]) > 1 << 20
        for figure in ("answer_loss", "indexer_kl"):
            if figure in wide:
                # Equal weights differ by rounding alone. Later Adam has moved weights of the smallest gradients by the signs of
                # their rounding: the same twenty steps on a CPU part by up to a tenth.
                assert narrow[figure] == pytest.approx(wide[figure], rel=0.15 if step else 0.005), (step, figure)
