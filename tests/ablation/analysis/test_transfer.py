"""Drift of an optimum over sizes, and the loss given away, on curves with a known optimum."""

from __future__ import annotations

import math

import numpy as np
import pytest

from workbench.ablation.analysis.transfer import Curve, transfer_of
from workbench.config import ConfigError

RATES = 1e-3 * 2 ** (np.arange(9) / 2)  # a grid of ratio sqrt 2


def parabola(optimum, seeds=(0.0,), height=1.0):
    """Loss 1 + height · (distance in factors of 2)²; ``seeds`` shift the optimum in factors of 2."""
    x_G = np.log2(RATES)
    return Curve(RATES, np.stack([1 + height * (x_G - math.log2(optimum) - shift) ** 2 for shift in seeds], 1))


def test_the_optimum_between_two_values():
    assert parabola(5e-3).optimum() == pytest.approx(math.log2(5e-3))


def test_an_optimum_at_the_end_of_the_grid_is_marked():
    curve = parabola(1e-4)
    assert curve.is_at_edge and 2 ** curve.optimum() == pytest.approx(1e-3)
    assert not parabola(5e-3).is_at_edge


def test_runs_that_diverged_are_left_out_of_the_fit():
    curve = parabola(4e-3)
    curve.loss_GS[-2:] = np.inf
    assert curve.optimum() == pytest.approx(math.log2(4e-3))


def test_drift_and_loss_given_away():
    # the optimum falls by a factor of 2, two factors of sqrt 2; one factor of 2 from it costs the height
    curves = {"small": ("mup", 64.0, parabola(8e-3), [0]), "large": ("mup", 128.0, parabola(4e-3, height=0.3), [0])}
    row = transfer_of(curves, "training.learning_rate", "width", "nats").table.row(1, named=True)
    assert row["drift"] == pytest.approx(-2)
    assert row["given_away"] == pytest.approx(0.3)
    assert row["drift_low"] is None


def test_the_interval_of_a_drift_pairs_seeds():
    shifts = (0.0, 0.1, 0.2)  # of both sizes: seeds move together
    curves = {
        "small": ("mup", 64.0, parabola(8e-3, shifts), [0, 1, 2]),
        "large": ("mup", 128.0, parabola(4e-3, shifts), [0, 1, 2]),
    }
    row = transfer_of(curves, "training.learning_rate", "width", "nats").table.row(1, named=True)
    assert row["drift_low"] == pytest.approx(-2) and row["drift_high"] == pytest.approx(-2)


def test_the_interval_is_around_the_drift_of_the_mean_curves():
    shifts = (0.0, 0.3, -0.2)
    curves = {
        "small": ("mup", 64.0, parabola(8e-3, (0.0, 0.0, 0.0)), [0, 1, 2]),
        "large": ("mup", 128.0, parabola(4e-3, shifts), [0, 1, 2]),
    }
    row = transfer_of(curves, "training.learning_rate", "width", "nats").table.row(1, named=True)
    # parabolas of one height: the optimum of the mean is the mean of the optima, and the jackknife is the t-interval
    drifts = -2 + 2 * np.array(shifts)
    half = 4.302653 * drifts.std(ddof=1) / math.sqrt(3)  # t quantile of two degrees of freedom
    assert row["drift"] == pytest.approx(drifts.mean(), abs=1e-6)
    assert (row["drift_low"], row["drift_high"]) == pytest.approx(
        (drifts.mean() - half, drifts.mean() + half), rel=1e-5
    )


def test_a_rate_at_which_the_large_model_diverges_costs_everything():
    large = parabola(2e-3)
    large.loss_GS[6:] = np.inf  # from 8e-3 on
    curves = {"small": ("mup", 64.0, parabola(8e-3), [0]), "large": ("mup", 128.0, large, [0])}
    assert transfer_of(curves, "f", "width", "nats").table["given_away"][1] == math.inf


def test_one_size_is_refused():
    with pytest.raises(ConfigError, match="two sizes"):
        transfer_of({"one": ("mup", 64.0, parabola(4e-3), [0])}, "f", "width", "nats")


def test_the_report_is_a_sentence_for_each_arm():
    curves = {"small": ("mup", 64.0, parabola(8e-3), [0]), "large": ("mup", 128.0, parabola(4e-3), [0])}
    text = str(transfer_of(curves, "f", "width", "nats"))
    assert text.splitlines() == [
        "mup, width 64 (small): optimum 0.008.",
        "mup, width 128 (large): optimum 0.004; drift -2.00 factors of √2; loss given away 1.0000 nats.",
    ]
