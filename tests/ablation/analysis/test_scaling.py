"""Scaling laws."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize

from workbench.ablation.analysis.scaling import PairedLaw, ScalingLaw, fit_paired_law, fit_scaling_law


def true_loss(x: float) -> float:
    return 0.6 + 40 * x**-0.25


@pytest.fixture(scope="module")
def law() -> ScalingLaw:
    rng = np.random.default_rng(1)
    points = {x: list(true_loss(x) * np.exp(0.002 * rng.normal(size=8))) for x in np.geomspace(1e4, 1e8, 6)}
    return fit_scaling_law(points)


def test_the_law_is_recovered(law: ScalingLaw) -> None:
    assert law.exponent == pytest.approx(0.25, rel=0.1)
    assert law.floor == pytest.approx(0.6, rel=0.1)


def test_the_interval_of_the_exponent_covers_it(law: ScalingLaw) -> None:
    assert law.exponent_low is not None
    assert law.exponent_high is not None
    assert law.exponent_low < 0.25 < law.exponent_high


def test_the_interval_of_an_extrapolation_covers_it(law: ScalingLaw) -> None:
    value, low, high = law.at(1e9)
    assert low is not None
    assert high is not None
    assert low < true_loss(1e9) < high
    assert low < value < high


def test_fewer_than_four_points_give_a_plain_power_law() -> None:
    law = fit_scaling_law({10.0: [1.0, 1.02], 1000.0: [0.1, 0.102], 1e5: [0.01, 0.0102]})
    assert law.floor == 0
    assert law.exponent == pytest.approx(0.5, abs=0.01)


def test_fewer_than_four_points_give_no_interval() -> None:
    law = fit_scaling_law({10.0**i: [2.0 - 0.3 * i, 2.01 - 0.3 * i] for i in range(3)})
    assert not law.is_floor_known
    assert (law.exponent_low, law.exponent_high, law.at(1e5)[1]) == (None, None, None)
    assert "floor unknown and no interval" in law.describe("flops", "bits per byte")


def test_a_law_without_a_floor_is_not_shown_one() -> None:
    rng = np.random.default_rng(1)
    law = fit_scaling_law({x: list(2 * x**-0.25 * np.exp(0.002 * rng.normal(size=8))) for x in 3.0 ** np.arange(6)})
    assert not law.is_floor_shown
    assert law.exponent_low is not None and law.exponent_high is not None
    assert law.exponent_low < 0.25 < law.exponent_high


def test_a_floor_is_shown(law: ScalingLaw) -> None:
    assert law.is_floor_shown


def test_the_fit_is_that_of_nonlinear_least_squares() -> None:
    xs = 3.0 ** np.arange(5)
    losses = (0.6 + 2 * xs**-0.25) * np.exp(0.002 * np.random.default_rng(0).normal(size=5))

    def residuals(p: np.ndarray) -> np.ndarray:
        return np.asarray(np.log(p[0] + p[1] * xs ** -p[2]) - np.log(losses))

    best = optimize.least_squares(residuals, [0.5, 2, 0.2], xtol=1e-14, ftol=1e-14).x
    law = fit_scaling_law({x: [loss] for x, loss in zip(xs, losses)})
    assert [law.floor, law.scale, law.exponent] == pytest.approx(best.tolist(), rel=0.01)


@pytest.mark.parametrize("sizes", [[1.0], [1.0, 10.0], [1.0, 1.01, 10.0], [803.97e3, 804.0e3, 804.09e3, 2e6]])
def test_fewer_than_three_distinct_sizes_give_no_law(sizes: list[float]) -> None:
    with pytest.raises(ValueError, match="expected at least three"):
        fit_scaling_law({x: [1.0 / x] for x in sizes})


def test_one_seed_gives_no_interval() -> None:
    law = fit_scaling_law({10.0: [1.0], 100.0: [0.5, 0.51], 1000.0: [0.3, 0.31], 1e4: [0.2, 0.21]})
    assert law.exponent_low is None
    assert law.exponent_high is None
    assert law.at(1e4)[1:] == (None, None)
    assert "no interval because a point has one seed" in law.describe("flops", "bits per byte")


def test_noise_makes_no_loss_negative() -> None:
    values = {10.0: [1.0, 0.001], 100.0: [0.9, 0.001], 1000.0: [0.5, 0.0001], 1e4: [0.4, 0.0001]}
    law = fit_scaling_law(values, replicates=50)
    assert np.isfinite(law.replicates).all()
    assert law.exponent_low is not None


# -- the law of a paired difference ------------------------------------------------------------------------------------


def pair(x: float) -> tuple[float, float]:
    """True losses of arm and baseline."""
    return 0.6 + 2 * x**-0.28, 0.6 + 2 * x**-0.25


@pytest.fixture(scope="module")
def paired() -> PairedLaw:
    rng = np.random.default_rng(0)
    values = {}
    for x in 3.0 ** np.arange(5):
        shared = rng.normal(size=8)
        arm, baseline = (loss * np.exp(0.001 * (shared + rng.normal(size=8))) for loss in pair(x))
        values[float(x)] = arm.tolist(), baseline.tolist()
    return fit_paired_law(values)


def test_a_predicted_difference_lies_in_its_interval_with_the_truth(paired: PairedLaw) -> None:
    at = paired.at(1000.0)
    arm, baseline = pair(1000.0)
    assert at.low is not None and at.high is not None
    assert at.low <= at.value <= at.high
    assert at.low < arm - baseline < at.high


def test_every_model_lies_in_the_interval(paired: PairedLaw) -> None:
    at = paired.at(1000.0)
    assert at.low is not None and at.high is not None
    for fit in paired.fits.values():
        arm, baseline = fit[:, 0] + np.exp(fit[:, 1] - fit[:, 2] * np.log(1000.0))
        assert at.low <= arm - baseline <= at.high


def test_one_floor_is_shared(paired: PairedLaw) -> None:
    floors = paired.fits["one floor"][:, 0]
    assert floors[0] == floors[1] == pytest.approx(0.6, rel=0.1)


def test_models_that_the_differences_reject_are_left_out() -> None:
    """A constant difference is one of the floors."""
    rng, values = np.random.default_rng(0), {}
    for x in 10.0 ** np.arange(5):
        baseline = (0.5 + 2 * x**-0.3) + 0.001 * rng.normal(size=6)
        values[float(x)] = (baseline + 0.05 + 1e-4 * rng.normal(size=6)).tolist(), baseline.tolist()
    law = fit_paired_law(values)
    assert list(law.fits) == ["a floor each"]
    assert law.at(1e5).value == pytest.approx(0.05, abs=0.01)


def test_exact_losses_are_predicted_exactly() -> None:
    values: dict[float, tuple[list[float], list[float]]] = {}
    for x in 3.0 ** np.arange(5):
        arm, baseline = pair(x)
        values[float(x)] = [arm], [baseline]
    law = fit_paired_law(values)
    arm, baseline = pair(1000.0)
    assert law.at(1000.0).value == pytest.approx(arm - baseline, rel=1e-3)
    assert law.at(1000.0).low is None, "one seed shows no noise"


def test_three_sizes_give_no_law_of_a_difference() -> None:
    with pytest.raises(ValueError, match="expected at least four, positive"):
        fit_paired_law({x: ([1.0], [1.1]) for x in (1.0, 2.0, 3.0)})


def test_unpaired_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="expected pairs"):
        fit_paired_law({x: ([1.0, 1.0], [1.1]) for x in (1.0, 2.0, 3.0, 4.0)})


@pytest.mark.parametrize("floor", [0.0, 0.6])
def test_intervals_hold_the_truth(floor: float) -> None:
    """40 laws; the calibration under benchmarks/ has 1,000."""
    rng, held = np.random.default_rng(1), []
    for _ in range(40):
        points = {x: list((floor + 2 * x**-0.25) * np.exp(0.002 * rng.normal(size=4))) for x in 3.0 ** np.arange(4)}
        law = fit_scaling_law(points, replicates=100)
        assert law.exponent_low is not None and law.exponent_high is not None
        held.append(law.exponent_low <= 0.25 <= law.exponent_high)
    assert np.mean(held) > 0.86
