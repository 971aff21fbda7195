import numpy as np
import pytest

from openkeye.common.checks import InputError
from openkeye.distill.scaling import ScalingConfig, category_factors, domain_scales
from openkeye.distill.token_categories import Category


def test_factors_average_one_over_what_the_policy_sampled():
    codes = [np.array([Category.FORMAT, Category.REASONING, Category.TIMES, Category.FORMAT]), np.array([Category.PERCEPTION])]
    policy = [np.array([True, True, True, False]), np.array([True])]
    factors = category_factors(codes, policy, ScalingConfig())
    counted = np.concatenate([f[p] for f, p in zip(factors, policy, strict=True)])
    assert counted.mean() == pytest.approx(1.0)
    assert factors[0][1] / factors[0][0] == pytest.approx(3.0) and factors[0][2] / factors[0][0] == pytest.approx(2.0)
    assert factors[0].dtype == np.float32


def test_what_counts_nothing_is_no_part_of_the_mean():
    codes = [np.array([Category.FORMAT, Category.REASONING, Category.TIMES])]
    (factors,) = category_factors(codes, [np.ones(3, bool)], ScalingConfig({"format": 0.0, "reasoning": 3.0}))
    assert factors.tolist() == [0.0, 1.5, 0.5]


def test_without_factors_every_token_counts_one():
    codes = [np.arange(6, dtype=np.uint8)]
    assert category_factors(codes, [np.ones(6, bool)], ScalingConfig({}))[0].tolist() == [1.0] * 6
    plain = ScalingConfig({"format": 0.5})
    assert category_factors(codes, [np.zeros(6, bool)], plain)[0].tolist() == [1, 1, 0.5, 1, 1, 1]


def test_a_step_in_which_nothing_counts_is_told():
    codes = [np.full(3, Category.FORMAT)]
    with pytest.raises(InputError, match="factor is 0"):
        category_factors(codes, [np.ones(3, bool)], ScalingConfig({"format": 0.0}))


def test_domains_scale_by_their_scatter_and_no_further_than_the_bounds():
    rng = np.random.default_rng(0)
    domains = ["calm", "noisy", "calm", "noisy", "silent"]
    values = [rng.normal(0, sigma, 4000) for sigma in (0.1, 1.0, 0.1, 1.0)] + [np.zeros(100)]
    scales = domain_scales(domains, values, ScalingConfig())
    sigma = np.concatenate(values).std()
    assert scales["noisy"] == pytest.approx(sigma / np.concatenate(values[1:4:2]).std())
    assert scales["calm"] == 4.0 and scales["silent"] == 1.0
    assert domain_scales(domains, values, ScalingConfig(least_domain=1.0, most_domain=1.0)) == dict.fromkeys(scales, 1.0)
    assert domain_scales(["one"], values[:1], ScalingConfig()) == {"one": 1.0}
    loud = domain_scales(["a", "b"], [np.tile([-1.0, 1.0], 10_000), np.tile([-100.0, 100.0], 10)], ScalingConfig())
    assert loud["b"] == 0.25


def test_wrong_factors_are_told():
    for words, told in (
        ({"categories": {"formats": 1.0}}, "did you mean format"),
        ({"categories": {"format": -1.0}}, "from 0 on"),
        ({"least_domain": 2.0, "most_domain": 1.0}, "rising"),
    ):
        with pytest.raises(InputError, match=told):
            ScalingConfig(**words)
