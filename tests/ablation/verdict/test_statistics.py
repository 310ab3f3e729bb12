"""The statistics against tables, brute force, other formulas and simulations. Every generator has a fixed seed."""

from __future__ import annotations

import doctest
import math
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from workbench.ablation.verdict import statistics
from workbench.ablation.verdict.statistics import (
    detectable_difference,
    equivalent,
    expected_best_of,
    holm,
    noise_floor,
    paired_correlation,
    paired_interval,
    ratio_of_sums,
    seeds_needed,
)

pytestmark = pytest.mark.filterwarnings("error")  # edges are decided, not stumbled over

exact = settings(max_examples=60, deadline=None, derandomize=True)
probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def test_examples():
    assert doctest.testmod(statistics).failed == 0


# --- bits per byte, the paired interval, equivalence ---------------------------------------------------------------


def test_ratio_of_sums_is_a_ratio_of_sums():
    bits_SD = np.array([[100.0, 900.0], [300.0, 300.0]])
    assert ratio_of_sums(bits_SD, [100, 400]) == pytest.approx([2.0, 1.2])  # a mean of ratios would be 1.625 and 1.875


@pytest.mark.parametrize("sizes", [[100.0], [100.0, 0.0], [100.0, math.nan]])
def test_ratio_of_sums_refuses_sizes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match="sizes_D"):
        ratio_of_sums(np.ones((2, 2)), sizes)


@exact
@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=15).filter(lambda x: len(set(x)) > 1))
def test_paired_interval_is_the_t_test(differences):
    found, reference = paired_interval(differences, alpha=0.1), stats.ttest_1samp(differences, 0)
    assert found.p == pytest.approx(reference.pvalue, abs=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(reference.confidence_interval(0.9)))


def test_paired_interval_edges():
    one = paired_interval([0.3])
    assert (one.mean, one.low, one.high, one.p, one.n) == (0.3, -math.inf, math.inf, 1.0, 1)
    assert math.isnan(one.sd)


@pytest.mark.parametrize("differences", [[0.1, 0.1, 0.1], [0.0, 0.0]])
def test_differences_without_spread_show_nothing(differences):
    same = paired_interval(differences)
    assert (same.sd, same.low, same.high, same.p) == (0.0, same.mean, same.mean, 1.0)
    assert same.mean == pytest.approx(differences[0])


def test_p_is_never_zero():
    assert 0 < paired_interval(1.0 + 1e-9 * np.arange(200)).p < 1e-300


@pytest.mark.parametrize("values", [[], [math.nan, 1.0], [math.inf], [[1.0, 2.0]]])
def test_what_is_no_list_of_numbers_is_refused(values):
    for function in (paired_interval, noise_floor, lambda x: equivalent(x, 1.0)):
        with pytest.raises(ValueError, match=r"values_S|differences_S"):
            function(values)


def test_equivalence_needs_the_90_percent_interval_inside_the_margin():
    differences = np.array([-0.002, 0.001, 0.003, 0.0, 0.001])
    reach = max(abs(bound) for bound in stats.ttest_1samp(differences, 0).confidence_interval(0.9))
    assert equivalent(differences, reach * 1.001)
    assert not equivalent(differences, reach * 0.999)
    assert not equivalent([0.0], 1.0)
    assert not equivalent([0.0, 0.0], 1e-9)
    with pytest.raises(ValueError, match="margin"):
        equivalent(differences, 0.0)


@pytest.mark.parametrize(("margin", "n"), [(1.5, 6), (2, 4), (3, 3)])
def test_equivalence_has_the_tabulated_power(margin, n):
    """n is the fewest seeds with power 0.8 where the true difference is 0; 1,500 draws: standard error 0.01."""
    draws = np.random.default_rng(0).normal(size=(1_500, n))
    assert np.mean([equivalent(row, margin) for row in draws]) > 0.8
    assert np.mean([equivalent(row[:-1], margin) for row in draws]) < 0.8


# --- sample sizes --------------------------------------------------------------------------------------------------


@cache
def quantiles_of_sd(n: int) -> np.ndarray:
    return np.sqrt(special.chdtri(n - 1, (np.arange(20_000) + 0.5) / 20_000) / (n - 1))


def power_by_quadrature(n: int, effect: float, alpha: float) -> float:
    """P(|Z + effect √n| > t · s), Z normal, (n − 1) s² chi-square: the definition, integrated over quantiles of s."""
    reach = stats.t.ppf(1 - alpha / 2, n - 1) * quantiles_of_sd(n)
    centre = effect * math.sqrt(n)
    return float(np.mean(special.ndtr(centre - reach) + special.ndtr(-centre - reach)))


@pytest.mark.parametrize("alpha", [0.05, 0.0125])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 20, 100])
def test_power_is_that_of_its_definition(n, alpha):
    assert power_by_quadrature(n, detectable_difference(n, alpha), alpha) == pytest.approx(0.8, abs=1e-4)
    for effect in (0.5, 2.0, 10.0, 30.0):  # SciPy's noncentral t gives NaN in this range
        assert statistics.power_of(n, effect, alpha) == pytest.approx(power_by_quadrature(n, effect, alpha), abs=1e-4)


def test_detectable_difference_of_the_table():
    """Units of the sd of the differences, 80 % power, alpha 0.05."""
    table = {3: 3.26, 4: 2.13, 5: 1.68, 6: 1.43, 8: 1.16, 10: 1.00, 12: 0.89, 16: 0.75, 20: 0.66}
    assert {n: round(detectable_difference(n), 2) for n in table} == table
    assert detectable_difference(1) == math.inf


@pytest.mark.parametrize(
    ("difference", "needed"),
    [
        (0.0005, (73, 31, 17, 104)),
        (0.001, (20, 10, 6, 29)),
        (0.0015, (10, 6, 4, 15)),
        (0.002, (7, 5, 4, 10)),
        (0.003, (5, 4, 3, 7)),
        (0.005, (3, 3, 3, 5)),
        (0.01, (3, 3, 2, 3)),
    ],
)
def test_seeds_needed_of_the_table(difference, needed):
    """Noise sd 0.0015; columns: correlation 0.5, 0.8, 0.9 at alpha 0.05, and 0.5 at 0.0125."""
    designs = [(0.5, 0.05), (0.8, 0.05), (0.9, 0.05), (0.5, 0.0125)]
    for n, (rho, alpha) in zip(needed, designs, strict=True):
        effect = difference / (0.0015 * math.sqrt(2 * (1 - rho)))
        assert seeds_needed(effect, alpha) == seeds_needed(-effect, alpha) == n
        assert power_by_quadrature(n, effect, alpha) >= 0.8
        assert n == 2 or power_by_quadrature(n - 1, effect, alpha) < 0.8


def test_seeds_needed_far_out():
    just_below, just_above = seeds_needed(2.802e-3), seeds_needed(2.801e-3)  # about a million: exact, approximated
    assert 0 < just_above - just_below < 1_000
    assert seeds_needed(1e3) == 2
    for effect in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="effect_in_sd"):
            seeds_needed(effect)


@pytest.mark.parametrize(("alpha", "power"), [(0, 0.8), (1, 0.8), (0.05, 1), (0.05, 0.04)])
def test_rates_that_no_test_has_are_refused(alpha, power):
    with pytest.raises(ValueError, match=r"alpha|power"):
        detectable_difference(5, alpha, power)
    with pytest.raises(ValueError, match=r"alpha|power"):
        seeds_needed(1.0, alpha, power)


# --- noise floor, correlation --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "low", "high"), [(3, 0.52, 6.28), (5, 0.60, 2.87), (8, 0.66, 2.04), (10, 0.69, 1.83), (20, 0.76, 1.46)]
)
def test_noise_floor_of_the_table(n, low, high):
    values = np.random.default_rng(n).normal(size=n)
    floor = noise_floor(values)
    assert floor.sd == pytest.approx(np.std(values, ddof=1))
    assert (round(floor.low / floor.sd, 2), round(floor.high / floor.sd, 2)) == (low, high)


def test_noise_floor_edges():
    sd, low, high = noise_floor([1.0])
    assert math.isnan(sd) and (low, high) == (0.0, math.inf)
    assert noise_floor([0.1, 0.1, 0.1]) == (0.0, 0.0, 0.0)


def test_paired_correlation():
    rng = np.random.default_rng(0)
    shared, own, base = rng.normal(size=(3, 4_000))
    assert paired_correlation(shared + own, shared + base) == pytest.approx(0.5, abs=0.04)
    assert paired_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert math.isnan(paired_correlation([1, 2], [1, 2])) and math.isnan(paired_correlation([1, 1, 1], [1, 2, 3]))
    with pytest.raises(ValueError, match="seeds"):
        paired_correlation([1, 2, 3], [1, 2])


# --- Holm ----------------------------------------------------------------------------------------------------------


def test_holm_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 = 0.02, 0.03, 0.06, 0.04; the last may not fall below the third.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02]) == pytest.approx([0.02])
    assert holm([]).shape == (0,)
    assert holm([0.02, 1.0]) == pytest.approx([0.04, 1.0])  # a failed arm counts


@exact
@given(probabilities)
def test_holm_keeps_the_order_and_never_helps(p_values):
    adjusted = holm(p_values)
    assert (adjusted >= p_values).all() and (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p_values, kind="stable")]) >= 0).all()
    assert holm(p_values[::-1]).tolist() == adjusted[::-1].tolist()


@exact
@given(probabilities)
def test_holm_rejects_what_stepping_down_rejects(p_values):
    alpha, rejected = 0.05, set()
    for i, index in enumerate(np.argsort(p_values, kind="stable")):
        if not p_values[index] * (len(p_values) - i) < alpha:
            break
        rejected.add(int(index))
    assert set(np.flatnonzero(holm(p_values) < alpha).tolist()) == rejected


@exact
@given(probabilities, st.data())
def test_holm_is_monotone_in_every_p(p_values, data):
    raised = [data.draw(st.floats(p, 1)) for p in p_values]
    assert (holm(raised) >= holm(p_values)).all()


@pytest.mark.parametrize("p_values", [[math.nan], [-0.1], [1.1], [[0.1]]])
def test_holm_refuses_what_is_no_probability(p_values):
    with pytest.raises(ValueError, match="p_values"):
        holm(p_values)


# --- best of k -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0, 5.0, 4.0, 9.0, 0.5], [1.0, 1.0, 2.0, 2.0, 2.0], [4.0]])
def test_expected_best_of_is_the_mean_over_all_subsets(values):
    for k in range(1, len(values) + 1):
        subsets = list(combinations(values, k))
        assert expected_best_of(values, k) == pytest.approx(np.mean([min(subset) for subset in subsets]))
        assert expected_best_of(values, k, minimise=False) == pytest.approx(
            np.mean([max(subset) for subset in subsets])
        )


def test_expected_best_of_counts_failures_and_long_searches():
    assert [expected_best_of([2.0, math.inf, 1.0], k) for k in (1, 2, 3)] == [math.inf, pytest.approx(4 / 3), 1.0]
    assert expected_best_of([2.0, -math.inf], 1, minimise=False) == -math.inf
    normal = stats.norm.ppf((np.arange(5_000) + 0.5) / 5_000)
    known = {2: -0.56, 4: -1.03, 8: -1.42, 20: -1.87, 100: -2.51}  # expected minimum of k standard normal draws
    assert {k: round(expected_best_of(normal, k), 2) for k in known} == known
    assert expected_best_of(normal, 2_500) == pytest.approx(normal[:12] @ 0.5 ** np.arange(1, 13), abs=2e-3)


@pytest.mark.parametrize(("values", "k"), [([1.0], 0), ([1.0], 2), ([], 1), ([math.nan], 1), ([-math.inf], 1)])
def test_expected_best_of_refuses_what_has_no_best(values, k):
    with pytest.raises(ValueError, match=r"k:|values:"):
        expected_best_of(values, k)
