"""Divergence and gradient spikes, on losses and norms given directly."""

from __future__ import annotations

import math

import pytest
import torch

from workbench.training.health import (
    FIELDS,
    RISING_STEPS,
    SKIPS_IN_A_ROW,
    Diverged,
    Health,
    gradient_rms_summary,
)


def after(losses: list[float], norms: list[float] | None = None, spike_factor: float | None = None) -> dict[str, float]:
    """The state after steps with these losses and gradient norms."""
    health = Health(spike_factor)
    for step, (loss, norm) in enumerate(zip(losses, norms or [1.0] * len(losses)), start=1):
        health.judge_gradient(torch.tensor(norm))
        health.record_step(step, torch.tensor(loss), torch.tensor(norm))
    return dict(zip(FIELDS, health.state.tolist()))


def skips(norms: list[float], spike_factor: float | None = 10.0) -> list[float | None]:
    health = Health(spike_factor)
    verdicts = [health.judge_gradient(torch.tensor(norm)) for norm in norms]
    return [None if skip is None else float(skip) for skip in verdicts]


def test_falling_losses_are_healthy() -> None:
    Health.check(after([3.0, 2.0, 1.0]))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_diverges_at_its_step(loss: float) -> None:
    with pytest.raises(Diverged, match="not finite at step 2") as raised:
        Health.check(after([3.0, loss, 2.0]))
    assert raised.value.step == 2


def test_a_gradient_that_is_not_finite_diverges() -> None:
    with pytest.raises(Diverged, match="not finite at step 2"):
        Health.check(after([3.0, 2.0], [1.0, math.nan]))


def test_a_loss_above_its_start_for_long_diverges() -> None:
    with pytest.raises(Diverged, match=f"for {RISING_STEPS} steps at step {RISING_STEPS + 1}"):
        Health.check(after([1.0] + [2.0] * RISING_STEPS))


def test_a_loss_that_returns_in_time_is_healthy() -> None:
    Health.check(after([1.0] + [2.0] * (RISING_STEPS - 1) + [0.5, 2.0]))


def test_no_step_is_judged_without_a_spike_factor() -> None:
    assert skips([1.0, math.inf], spike_factor=None) == [None, None]


def test_a_norm_far_above_its_mean_is_skipped() -> None:
    assert skips([1.0, 1.0, 11.0, 1.0]) == [0.0, 0.0, 1.0, 0.0]


def test_a_norm_that_is_not_finite_is_skipped_even_first() -> None:
    assert skips([math.nan, 1.0]) == [1.0, 0.0]


def test_skipped_norms_do_not_enter_the_mean() -> None:
    assert after([1.0] * 3, [1.0, 50.0, 1.0], spike_factor=10.0)["norm_mean"] == 1.0


def test_skips_in_a_row_diverge() -> None:
    norms = [1.0] + [math.inf] * SKIPS_IN_A_ROW
    with pytest.raises(Diverged, match=f"{SKIPS_IN_A_ROW} steps in a row were skipped"):
        Health.check(after([1.0] * len(norms), norms, spike_factor=10.0))


def test_the_smallest_gradient_rms_ignores_zeros() -> None:
    summary = gradient_rms_summary(torch.tensor([0.0, 3.0, 1.0]))
    assert {name: float(value) for name, value in summary.items()} == {
        "gradient_rms_min": 1.0,
        "gradient_rms_median": 1.0,
        "gradient_rms_max": 3.0,
    }
