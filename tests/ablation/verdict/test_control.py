"""The control variate: right values by hand, no bias, the declared error rate, and what it gains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats

from workbench.ablation.ablation import Ablation
from workbench.ablation.execution.plan import Plan
from workbench.ablation.folder import ControlRuns
from workbench.ablation.run import AblationRun
from workbench.ablation.verdict.control import AdjustedTTest, ControlVariate, control_variate
from workbench.ablation.verdict.hypotheses import TTest
from workbench.config import ConfigError
from workbench.status import Stage, Status


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
        test = adjusted(d[:seeds], ControlVariate(dict(enumerate(x[:seeds])), x[seeds:], d[seeds:]))
        results.append((test.mean, 2 * min(test.p(-1), test.p(1))))
    means, p_values = np.array(results).T
    return means, p_values


def adjusted(differences: np.ndarray | list[float], control: ControlVariate) -> AdjustedTTest:
    return AdjustedTTest(dict(enumerate(map(float, differences))), control)


def test_values_by_hand() -> None:
    # β = 2, so γ = 2 · 4 / (4 + 4) = 1; mean over (1, 2, 3, 4) − (0, 1, 0, 1) is 2, plus γ · 1.5
    control = ControlVariate({0: 0.0, 1: 1.0, 2: 0.0, 3: 1.0}, np.arange(4.0), 2 * np.arange(4.0) + 5)
    assert control.slope(4) == pytest.approx(1)
    assert adjusted([1.0, 2.0, 3.0, 4.0], control).mean == pytest.approx(3.5)


def test_the_statistic_is_welchs() -> None:
    random = np.random.default_rng(0)
    x_S, x_P, d_S, d_P = random.normal(size=(4, 6))
    control = ControlVariate(dict(enumerate(x_S)), x_P, d_P)
    slope = control.slope(6)
    welch = stats.ttest_ind(d_S - slope * x_S, -slope * x_P, equal_var=False)
    test = adjusted(d_S, control)
    assert test.p(1) == pytest.approx(stats.t.sf(welch.statistic, 5))
    assert test.bound(1, 0.025) == pytest.approx(test.mean * (1 + stats.t.ppf(0.975, 5) / welch.statistic))


def test_without_spread_in_the_earlier_runs_it_is_the_paired_test() -> None:
    control = ControlVariate(dict.fromkeys(range(4), 3.0), np.ones(4), np.arange(4.0))
    differences = [0.1, 0.4, 0.2, 0.3]
    plain, test = TTest(differences), adjusted(differences, control)
    assert (test.mean, test.p(1), test.bound(1, 0.1)) == pytest.approx((plain.mean, plain.p(1), plain.bound(1, 0.1)))


def test_fewer_than_four_seeds_claim_nothing() -> None:
    control = ControlVariate(dict.fromkeys(range(3), 1.0), np.arange(4.0), np.arange(4.0))
    assert adjusted([1.0, 2.0, 3.0], control).p(1) == 1


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


# -- an ablation that declares one -----------------------------------------------------------------------------------

FIXED: dict[str, Any] = {"tuning": {"trials": 0}, "confirmation": {"seeds": [0, 1, 2, 3]}}
DECLARED: dict[str, Any] = {**FIXED, "protocol": {"control_variate": "test-pilot"}}
Make = Callable[..., Ablation]


def finish(ablation: Ablation, noise: float = 0.01) -> AblationRun:
    """Let every run end without training, with values whose seed noise both splits share."""
    run = ablation.create()
    random = np.random.default_rng(len(run.name))
    plan = Plan(run.files)
    for folder in [plan.create_run(arm, Stage.CONFIRMATION, s, {}) for arm in run.arms for s in run.seeds]:
        value = float(2 + random.normal(0, noise))
        sizes = np.full(3, 100.0)
        bits = {run.metric.numerator: value * sizes / run.metric.scale, run.metric.denominator: sizes}
        folder.write_report(pl.DataFrame(bits))
        folder.finish(Status.DONE, None, selection_value=value + 1, report_value=value)
    run.files.mark_finished(True)
    return run


def test_the_verdict_is_adjusted_by_the_pilot(ablation: Make) -> None:
    finish(ablation(**FIXED).pilot(8))
    adjusted_verdict, plain = finish(ablation(**DECLARED)).verdict(), finish(ablation("plain", **FIXED)).verdict()
    assert adjusted_verdict is not None and plain is not None
    row = adjusted_verdict.rows[1]
    assert row.low is not None and row.high is not None and row.difference is not None
    assert row.low < row.difference < row.high
    assert any("adjusted by the selection differences of 8 earlier pairs" in line for line in adjusted_verdict.declared)
    assert not any("adjusted" in line for line in plain.declared)


def test_another_setting_than_the_pilots_is_not_adjusted(ablation: Make) -> None:
    finish(ablation(**FIXED).pilot(8))
    changed = ablation(**DECLARED, base={"training": {"learning_rate": 1e-3}})
    verdict = finish(changed).verdict()
    assert verdict is not None and any("not adjusted" in line for line in verdict.declared)


def test_one_that_is_withdrawn_after_launch_adjusts_nothing(ablation: Make) -> None:
    finish(ablation(**FIXED).pilot(8))
    finish(ablation(**DECLARED))
    run = ablation(**FIXED, deviation="other code").create()
    verdict = run.verdict()
    assert verdict is not None and "other code" in str(verdict.exploratory)
    differences = [row.difference for row in verdict.rows[1:]]
    values = {run.arms[i]: row.value for i, row in enumerate(verdict.rows)}
    assert differences == pytest.approx([values[arm] - values[run.baseline] for arm in run.arms[1:]])  # type: ignore[operator]


def test_a_missing_pilot_is_a_clear_error(ablation: Make) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        ablation(**DECLARED).create()


def test_a_pilot_of_three_pairs_is_refused(ablation: Make) -> None:
    finish(ablation(**FIXED).pilot(3))
    with pytest.raises(ConfigError, match="4 shared seeds"):
        ablation(**DECLARED).create()


def test_sequential_looks_exclude_a_control_variate(ablation: Make) -> None:
    finish(ablation(**FIXED).pilot(8))
    protocol = {"control_variate": "test-pilot", "stopping": {"anytime": True}}
    with pytest.raises(ConfigError, match="fixed number of seeds"):
        ablation(**FIXED, protocol=protocol).create()
