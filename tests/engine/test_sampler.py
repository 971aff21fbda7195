"""Greedy, temperature, top-k and top-p."""

import pytest
import torch

from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.sampler import sample

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0])


def draw(count: int = 400, **options) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return [sample(LOGITS, SamplingParameters(**options), generator) for _ in range(count)]


def test_temperature_zero_takes_the_likeliest():
    assert set(draw(10)) == {1}


def test_top_k_keeps_k_tokens():
    assert set(draw(temperature=2.0, top_k=2)) == {1, 3}
    assert set(draw(temperature=2.0, top_k=1)) == {1}


def test_top_p_keeps_the_smallest_set_that_holds_p():
    probabilities = LOGITS.softmax(-1)
    assert probabilities[1] < 0.7 < probabilities[1] + probabilities[3]
    assert set(draw(temperature=1.0, top_p=0.7)) == {1, 3}


def test_frequencies_follow_the_softmax():
    drawn = torch.bincount(torch.tensor(draw(4000, temperature=1.0)), minlength=4) / 4000
    assert (drawn - LOGITS.softmax(-1)).abs().max() < 0.03


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": 0}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="sampling needs"):
        SamplingParameters(**wrong)


def test_engine_settings_are_checked():
    with pytest.raises(ValueError, match="multiple of page_size"):
        EngineConfig(cache_tokens=100)
    with pytest.raises(ValueError, match="give at least 1"):
        EngineConfig(prefill_chunk_tokens=0)
