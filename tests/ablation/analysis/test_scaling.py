"""Scaling laws."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.ablation.analysis.scaling import ScalingLaw, fit_scaling_law


def true_loss(x: float) -> float:
    return 0.6 + 40 * x**-0.25


@pytest.fixture(scope="module")
def law() -> ScalingLaw:
    rng = np.random.default_rng(0)
    points = {x: list(true_loss(x) * np.exp(0.002 * rng.normal(size=8))) for x in np.geomspace(1e4, 1e8, 6)}
    return fit_scaling_law(points, replicates=100)


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


def test_two_points_give_a_plain_power_law() -> None:
    law = fit_scaling_law({10.0: [1.0, 1.02], 1000.0: [0.1, 0.102]})
    assert law.floor == 0
    assert law.exponent == pytest.approx(0.5, abs=0.01)


def test_one_point_gives_no_law() -> None:
    with pytest.raises(ValueError, match="two positive x"):
        fit_scaling_law({1.0: [1.0]})


def test_one_seed_gives_no_interval() -> None:
    law = fit_scaling_law({10.0: [1.0], 1000.0: [0.1, 0.102]})
    assert law.exponent_low is None
    assert law.exponent_high is None
    assert law.at(1e4)[1:] == (None, None)
    assert "no interval because a point has one seed" in law.describe("flops", "bits per byte")


def test_noise_makes_no_loss_negative() -> None:
    law = fit_scaling_law({10.0: [1.0, 0.001], 1000.0: [0.5, 0.0001]}, replicates=50)
    assert np.isfinite(law.replicates).all()
    assert law.exponent_low is not None
