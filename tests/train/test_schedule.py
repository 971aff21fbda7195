"""Rates over a stage, by hand."""

import pytest

from openkeye.train.schedule import rate_share, rates_at
from tests.train.toy_runs import toy_stage


def test_warm_up_then_cosine_to_the_end_share():
    stage = toy_stage(num_steps=9, num_warmup_steps=4, rate_end_share=0.2)
    shares = [rate_share(stage, step) for step in range(9)]
    # Half of a cosine from 1 to 0.2 over the steps 4 to 8.
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.8828427, 0.6, 0.3171573, 0.2])


def test_every_part_has_its_own_peak():
    stage = toy_stage(num_steps=3, num_warmup_steps=2, trains=("projector", "decoder"), rates={"projector": 4.0}, rate=2.0)
    assert rates_at(stage, 0) == {"projector": 2.0, "decoder": 1.0}


def test_a_stage_of_one_step_and_one_that_only_warms_up():
    assert rate_share(toy_stage(num_steps=1, num_warmup_steps=0), 0) == pytest.approx(0.1)
    assert rate_share(toy_stage(num_steps=2, num_warmup_steps=2), 1) == 1.0
