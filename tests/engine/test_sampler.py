"""Greedy, temperature, top-k and top-p."""

import pytest
import torch

from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.sampler import sample, sample_batch, token_logprobs

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


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"seed": 2**64},
        {"stop": ("a", "")},
        {"stop": "a"},
        {"stop": ("a",) * 17},
        {"stop": (1,)},
        {"logprobs": -1},
        {"logprobs": 21},
        {"logprobs": True},
    ],
)
def test_settings_that_would_fail_later_are_refused_in_one_line(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} ") as caught:
        SamplingParameters(**wrong)
    assert "\n" not in str(caught.value)


def test_temperatures_too_small_for_float32_are_greedy():
    assert set(draw(10, temperature=1e-60)) == {1}


def test_a_batch_is_sampled_row_by_row():
    logits = torch.stack([LOGITS, LOGITS.flip(0), LOGITS])
    hot = SamplingParameters(temperature=3.0)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    tokens = sample_batch(logits, [SamplingParameters(), SamplingParameters(), hot], generators)
    assert tokens == [1, 2, sample(LOGITS, hot, torch.Generator().manual_seed(2))]


def test_logprobs_are_of_the_logits_themselves_likeliest_first():
    expected = LOGITS.double().log_softmax(-1)
    logprob, top = token_logprobs(LOGITS.bfloat16(), 0, 3)
    assert logprob == pytest.approx(float(expected[0]), abs=1e-6)
    assert [token for token, _ in top] == [1, 3, 2]
    assert [value for _, value in top] == pytest.approx(expected[[1, 3, 2]].tolist(), abs=1e-6)
    assert token_logprobs(LOGITS, 0, None) == (None, []) and token_logprobs(LOGITS, 0, 0)[1] == []
    assert [token for token, _ in token_logprobs(torch.zeros(4), 0, 4)[1]] == [0, 1, 2, 3]
