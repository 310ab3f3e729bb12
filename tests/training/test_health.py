"""Divergence and rejected steps, on losses and norms given directly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from workbench.guards import guards
from workbench.training.health import (
    FIELDS,
    RISING_STEPS,
    ROLL_BACKS_IN_A_ROW,
    SKIPS_IN_A_ROW,
    Diverged,
    Health,
    gradient_rms_summary,
)

RATIO = {"kind": "ratio", "factor": 10.0}


def health_with(*settings: dict[str, Any]) -> Health:
    return Health([guards.parse(setting) for setting in settings])


def run(health: Health, losses: list[float], norms: list[float] | None = None) -> list[float | None]:
    """Whether each of the steps with these losses and gradient norms is skipped."""
    skips = []
    for step, (loss, norm) in enumerate(zip(losses, norms or [1.0] * len(losses)), start=1):
        skips.append(health.judge(torch.tensor(loss), torch.tensor(norm)))
        health.record_step(step, torch.tensor(loss), torch.tensor(norm))
    return [None if skip is None else float(skip) for skip in skips]


def after(losses: list[float], norms: list[float] | None = None, *settings: dict[str, Any]) -> dict[str, float]:
    """The state after steps with these losses and gradient norms."""
    health = health_with(*settings)
    run(health, losses, norms)
    return dict(zip(FIELDS, health.state.tolist()))


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


def test_a_guard_that_only_counts_stops_no_divergence() -> None:
    with pytest.raises(Diverged, match="not finite at step 2"):
        Health.check(after([3.0, math.nan], None, {"kind": "not_finite", "action": "count"}))


def test_a_loss_above_its_start_for_long_diverges() -> None:
    with pytest.raises(Diverged, match=f"for {RISING_STEPS} steps at step {RISING_STEPS + 1}"):
        Health.check(after([1.0] + [2.0] * RISING_STEPS))


def test_a_loss_that_returns_in_time_is_healthy() -> None:
    Health.check(after([1.0] + [2.0] * (RISING_STEPS - 1) + [0.5, 2.0]))


def test_no_step_is_judged_without_guards() -> None:
    assert run(health_with(), [1.0, 1.0], [1.0, math.inf]) == [None, None]


def test_rejected_steps_are_skipped() -> None:
    assert run(health_with(RATIO), [1.0] * 4, [1.0, 1.0, 11.0, 1.0]) == [0.0, 0.0, 1.0, 0.0]


def test_a_step_that_is_not_finite_is_skipped_even_first() -> None:
    assert run(health_with(RATIO), [1.0, 1.0], [math.nan, 1.0]) == [1.0, 0.0]


def test_a_guard_that_only_counts_skips_nothing() -> None:
    health = health_with({**RATIO, "action": "count"}, {"kind": "not_finite"})
    assert run(health, [1.0] * 3, [1.0, 11.0, 1.0]) == [0.0] * 3


def test_rejections_are_known_by_step_and_guard() -> None:
    health = health_with({**RATIO, "action": "count"}, {"kind": "not_finite"})
    run(health, [1.0] * 3, [1.0, 11.0, math.nan])
    assert health.take_rejections().tolist() == [0, 0, 1, 0, 1, 1]
    assert not len(health.take_rejections())


def test_guards_remember_the_steps_that_are_made() -> None:
    health = health_with(RATIO)
    run(health, [1.0] * 3, [1.0, 50.0, 1.0])
    assert health.guard_states[0].tolist() == [1.0, 2.0]


def test_guards_remember_a_step_that_is_only_counted() -> None:
    health = health_with({**RATIO, "action": "count"})
    run(health, [1.0] * 2, [1.0, 50.0])
    assert health.guard_states[0][1] == 2


def test_only_its_own_guards_roll_back() -> None:
    health = health_with(RATIO, {"kind": "not_finite", "action": "roll_back"})
    wanted = []
    for norm in (1.0, 50.0, math.nan):
        health.judge(torch.tensor(1.0), torch.tensor(norm))
        wanted.append(float(health.wants_roll_back))
    assert wanted == [0.0, 0.0, 1.0]


def test_skips_in_a_row_diverge() -> None:
    norms = [1.0] + [math.inf] * SKIPS_IN_A_ROW
    with pytest.raises(Diverged, match=f"{SKIPS_IN_A_ROW} steps in a row were skipped"):
        Health.check(after([1.0] * len(norms), norms, RATIO))


def test_steps_that_are_rolled_back_are_no_skips_in_a_row() -> None:
    norms = [1.0] + [math.inf] * SKIPS_IN_A_ROW
    Health.check(after([1.0] * len(norms), norms, {**RATIO, "action": "roll_back"}))


def test_windows_rolled_back_in_a_row_diverge() -> None:
    health = health_with({**RATIO, "action": "roll_back"})
    for window in range(1, ROLL_BACKS_IN_A_ROW + 1):
        Health.check(dict(zip(FIELDS, health.state.tolist())))
        health.record_window(10 * window, torch.tensor(10.0))
    with pytest.raises(Diverged, match=f"{ROLL_BACKS_IN_A_ROW} windows in a row were rolled back at step 50"):
        Health.check(dict(zip(FIELDS, health.state.tolist())))


def test_a_window_that_stays_ends_the_row() -> None:
    health = health_with({**RATIO, "action": "roll_back"})
    for undone in (10.0, 0.0, 10.0):
        health.record_window(1, torch.tensor(undone))
    state = dict(zip(FIELDS, health.state.tolist()))
    assert (state["rolled_back"], state["rolled_back_in_a_row"], state["undone"]) == (2, 1, 20)


def test_a_loaded_state_continues() -> None:
    whole, first, second = (health_with(RATIO, {"kind": "spike"}) for _ in range(3))
    norms = [1.0, 2.0, 40.0, 1.0, math.nan, 2.0]
    run(whole, [1.0] * 6, norms)
    run(first, [1.0] * 3, norms[:3])
    second.load_state_dict(first.state_dict())
    run(second, [1.0] * 3, norms[3:])
    assert second.take_rejections().tolist() == whole.take_rejections().tolist()
    assert all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(second.guard_states, whole.guard_states))


def test_the_smallest_gradient_rms_ignores_zeros() -> None:
    summary = gradient_rms_summary(torch.tensor([0.0, 3.0, 1.0]))
    assert {name: float(value) for name, value in summary.items()} == {
        "gradient_rms_min": 1.0,
        "gradient_rms_median": 1.0,
        "gradient_rms_max": 3.0,
    }
