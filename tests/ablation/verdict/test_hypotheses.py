"""Tests of a difference against SciPy, brute force and hand-computed numbers."""

from __future__ import annotations

import doctest
import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from workbench.ablation.verdict import hypotheses
from workbench.ablation.verdict.hypotheses import (
    ExactTest,
    TTest,
    compatible_bounds,
    directional_holm,
    fisher,
    sampling_sd,
    skewness,
    skewness_limit,
)

exact = settings(max_examples=60, deadline=None, derandomize=True)
differences = st.lists(st.integers(-20, 20), min_size=4, max_size=9).filter(lambda x: len(set(x)) > 1)


def test_examples():
    assert doctest.testmod(hypotheses).failed == 0


def flips(values, side: int) -> float:
    """P(mean with random signs ≥ mean), by enumeration."""
    values = side * np.asarray(values, float)
    means = [np.mean(values * signs) for signs in product((-1, 1), repeat=values.size)]
    return float(np.mean([mean >= values.mean() - 1e-12 for mean in means]))


def exact_test(differences_S, level: float = 0.025) -> ExactTest:
    base_S = np.full(len(differences_S), 0.5)
    return ExactTest(base_S + np.asarray(differences_S) / 100, base_S, 1.0, 300, level)


@exact
@given(differences)
def test_t_is_the_one_sided_t_test(values):
    for side, alternative in ((1, "greater"), (-1, "less")):
        assert TTest(values).p(side) == pytest.approx(stats.ttest_1samp(values, 0, alternative=alternative).pvalue)


@exact
@given(differences)
def test_bounds_of_t_are_those_of_the_interval(values):
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (TTest(values).bound(-1, 0.025), TTest(values).bound(1, 0.025)) == pytest.approx((low, high))


@exact
@given(differences)
def test_sign_flips_are_the_enumeration(values):
    for side in (1, -1):
        assert exact_test(values).flip_p(side) == pytest.approx(flips(values, side))


@exact
@given(differences, st.floats(-0.2, 0.2))
def test_bounds_of_sign_flips_are_the_inversion_of_the_test(values, shift):
    """A value below the lower bound is rejected at that level, one above it is not."""
    test, level = exact_test(values), 0.1
    test.flip_weight = 1.0
    low = test.bound(-1, level)
    if abs(low - shift) > 1e-9 and low > -1:
        assert (shift < low) == (flips(np.asarray(values) / 100 - shift, 1) <= level)


@pytest.mark.parametrize(("arm", "baseline", "n"), [(0, 5, 5), (3, 8, 8), (6, 6, 6), (0, 4, 4), (7, 2, 9)])
def test_fisher_is_scipys(arm, baseline, n):
    table = [[arm, n - arm], [baseline, n - baseline]]
    assert fisher(arm, n, baseline, n) == pytest.approx(stats.fisher_exact(table).pvalue)


def test_shares_are_fishers_one_sided_test():
    test = ExactTest(np.array([0.9, 0.8, 0.0, 0.7, 0.9]), np.zeros(5), 1.0, 300, 0.025)
    assert test.share_p(1) == pytest.approx(stats.fisher_exact([[1, 4], [5, 0]], alternative="less").pvalue)
    assert test.share_p(-1) == pytest.approx(stats.fisher_exact([[1, 4], [5, 0]], alternative="greater").pvalue)


@pytest.mark.parametrize(("n", "least"), [(4, 2 / 70), (5, 2 / 252), (6, 2 / 64 + 2 / 924), (8, 2 / 256 + 2 / 12870)])
def test_least_reachable_p(n, least):
    assert exact_test(np.arange(n)).least == pytest.approx(least)


def test_the_weights_leave_both_tests_their_least_p():
    test = exact_test(np.arange(1, 9))
    assert test.flip_weight == pytest.approx((1 / 256) / (1 / 256 + 1 / 12870))
    assert test.p(1) == pytest.approx(1 / 256 + 1 / 12870)


def test_sampling_sd_of_a_rate():
    assert sampling_sd(np.array([0.1, 0.1]), 1.0, 99) == pytest.approx(math.sqrt(0.104 * 0.896 / 99))


def test_sampling_sd_is_positive_without_an_error():
    assert sampling_sd(np.zeros(3), 1.0, 7_680) == pytest.approx(math.sqrt(0.5) / 7_681 * 7_680**0, rel=0.01)


def test_seeds_that_agree_are_equivalent_by_counting_only():
    same = ExactTest(np.full(8, 0.01), np.full(8, 0.01), 1.0, 300, 0.025)
    assert same.p_within(0.1) == pytest.approx(1 / 256)
    assert same.p_within(0.005) > 0.05


def test_directional_holm_is_holm_where_all_differences_share_a_sign():
    worse_m, better_m = directional_holm([0.005, 0.02, 0.015], [0.995, 0.98, 0.985])
    assert worse_m == pytest.approx([0.03, 0.06, 0.06]) and better_m == pytest.approx([1, 1, 1])


def test_directional_holm_counts_each_direction_over_the_whole_family():
    worse_m, better_m = directional_holm([0.001, 0.999], [0.999, 0.02])
    assert (worse_m[0], better_m[1]) == pytest.approx((0.004, 0.08))


def test_compatible_bounds_of_a_claim_end_at_zero_while_others_are_open():
    tests = [TTest(0.02 + 0.001 * np.arange(5)), TTest(np.array([-0.01, 0.02, 0.0, 0.01, -0.02]))]
    worse_m, _ = directional_holm([test.p(1) for test in tests], [test.p(-1) for test in tests])
    low = compatible_bounds(tests, worse_m, 1, 0.05)
    assert low == pytest.approx([0.0, tests[1].bound(-1, 0.025)])


def test_compatible_bounds_of_claims_only_are_bonferronis():
    tests = [TTest(0.02 + 0.001 * np.arange(5)), TTest(0.03 + 0.001 * np.arange(5))]
    worse_m, _ = directional_holm([test.p(1) for test in tests], [test.p(-1) for test in tests])
    assert compatible_bounds(tests, worse_m, 1, 0.05) == pytest.approx([test.bound(-1, 0.0125) for test in tests])


def test_compatible_intervals_hold_together():
    """2,000 families of four t-tests, two of them different from zero: standard error of the rate 0.005."""
    rng, true_m, missed = np.random.default_rng(0), np.array([0.0, 0.0, 1.0, -3.0]), 0
    for _ in range(2_000):
        tests = [TTest(true + rng.normal(size=6)) for true in true_m]
        worse_m, better_m = directional_holm([test.p(1) for test in tests], [test.p(-1) for test in tests])
        low_m, high_m = compatible_bounds(tests, worse_m, 1, 0.05), compatible_bounds(tests, better_m, -1, 0.05)
        held = (low_m < true_m) | (low_m == np.minimum(true_m, -1e-9))
        missed += not (held & (np.array(high_m) > true_m)).all()
    assert missed / 2_000 <= 0.06


def test_skewness_is_scipys():
    values = np.random.default_rng(1).exponential(size=9)
    assert skewness(values) == pytest.approx(stats.skew(values))
    assert math.isnan(skewness([1.0, 2.0])) and math.isnan(skewness([1.0, 1.0, 1.0]))


@pytest.mark.parametrize(("n", "limit"), [(20, 0.94), (50, 0.63)])
def test_the_limit_of_skewness_is_the_tabulated_one(n, limit):
    """Two-sided 5 % points of √b₁ (Pearson and Hartley 1966, one-sided 2.5 %, interpolated)."""
    assert skewness_limit(n) == pytest.approx(limit, abs=0.12)
