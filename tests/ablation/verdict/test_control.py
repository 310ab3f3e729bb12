"""The control variate: right values by hand, no bias, the declared error rate, and what it gains."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from workbench.ablation.verdict.control import ControlRuns, ControlVariate, control_variate
from workbench.ablation.verdict.statistics import paired_interval


def intervals(
    rho: float, seeds: int, pilot: int, noise: str = "normal", count: int = 1_200, shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """(count, 2), means and p-values of adjusted intervals of simulated ablations without any difference.

    Args:
        rho: correlation of report (or pilot) and selection differences.
        shift: mean of the selection differences, which nobody knows.
    """
    random = np.random.default_rng([7, seeds, pilot])
    total = seeds + pilot
    common, own, other = (
        random.standard_t(3, (count, total)) if noise == "t3" else random.normal(size=(count, total)) for _ in range(3)
    )
    measured = np.sqrt(rho) * common + np.sqrt(1 - rho) * own
    selection = shift + np.sqrt(rho) * common + np.sqrt(1 - rho) * other
    results = []
    for x, d in zip(selection, measured):
        interval = ControlVariate(x[:seeds], x[seeds:], d[seeds:]).interval(d[:seeds])
        results.append((interval.mean, interval.p))
    means, p_values = np.array(results).T
    return means, p_values


def test_values_by_hand() -> None:
    # pilot: β = 2, so γ = 2 · 4 / (2 + 4) = 4/3; mean (1 + 2 − 4/3 · (0 + 1)) / 2 + 4/3 · 1.5 = 17/6
    variate = ControlVariate(np.array([0.0, 1.0]), np.arange(4.0), 2 * np.arange(4.0) + 5)
    assert variate.slope == pytest.approx(4 / 3)
    assert variate.interval([1.0, 2.0]).mean == pytest.approx(17 / 6)


def test_the_statistic_is_welchs() -> None:
    random = np.random.default_rng(0)
    x_S, x_P, d_S, d_P = random.normal(size=(4, 6))
    variate = ControlVariate(x_S, x_P, d_P)
    welch = stats.ttest_ind(d_S - variate.slope * x_S, -variate.slope * x_P, equal_var=False)
    interval = variate.interval(d_S)
    assert interval.p == pytest.approx(2 * stats.t.sf(abs(welch.statistic), 5))
    assert (interval.high - interval.low) / 2 == pytest.approx(
        stats.t.ppf(0.975, 5) * abs(interval.mean / welch.statistic)
    )


def test_without_correlation_in_the_pilot_it_is_the_paired_interval() -> None:
    variate = ControlVariate(np.array([3.0, 1.0, 2.0]), np.ones(4), np.arange(4.0))
    differences = [0.1, 0.4, 0.2]
    plain, adjusted = paired_interval(differences), variate.interval(differences)
    assert (adjusted.mean, adjusted.low, adjusted.p) == pytest.approx((plain.mean, plain.low, plain.p))


@pytest.mark.parametrize("noise", ["normal", "t3"])
@pytest.mark.parametrize(("seeds", "pilot"), [(4, 4), (5, 8)])
@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_false_positives_keep_alpha(rho: float, seeds: int, pilot: int, noise: str) -> None:
    _, p_values = intervals(rho, seeds, pilot, noise)
    error = np.sqrt(0.05 * 0.95 / len(p_values))
    assert (p_values < 0.05).mean() < 0.05 + 3 * error


def test_the_unknown_mean_of_the_selection_difference_does_not_matter() -> None:
    (means, _), (shifted, _) = intervals(0.8, 5, 8), intervals(0.8, 5, 8, shift=100.0)
    assert shifted == pytest.approx(means, abs=1e-9)


def test_it_halves_the_variance_where_splits_agree() -> None:
    means, _ = intervals(0.95, 5, 8)
    plain = 1 / 5
    # least possible: 1 − ρ² P / (S + P) = 0.44; an estimated slope costs a little
    assert 0.40 < means.var() / plain < 0.55


def test_few_shared_seeds_give_no_control_variate() -> None:
    values = {seed: 1.0 * seed for seed in range(3)}
    runs = ControlRuns(setting={}, data="", selection=values, measured=values)
    assert control_variate(runs, runs, {10: 1.0, 11: 2.0}, {10: 1.0, 11: 1.0}) is None
