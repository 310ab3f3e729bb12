"""What guards reject, on losses and norms given directly."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from workbench.guards import guards
from workbench.registry import plug_in

NORMAL = [1.0, 1.2, 0.9, 1.1, 1.0, 0.8, 1.05, 0.95, 1.1, 0.9]

PLUGIN = """
from typing import Literal
import torch
from workbench.guards import Guard, GuardConfig, guards

@guards.register
class Above(Guard):
    class Config(GuardConfig):
        kind: Literal["above"] = "above"
        limit: float = 1.0

    def initial_state(self):
        return torch.zeros(0, dtype=torch.float64)

    def rejects(self, state, loss, norm):
        return loss > self.config.limit

    def advanced(self, state, loss, norm):
        return state
"""


def rejections(setting: dict[str, Any], values: list[float], of: str = "gradient_norm") -> list[bool]:
    """Whether each value is rejected; rejected ones are not remembered."""
    config = guards.parse(setting)
    guard = guards[config.kind](config)
    state, rejected = guard.initial_state(), []
    for value in values:
        watched, other = torch.tensor(value, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
        loss, norm = (watched, other) if of == "loss" else (other, watched)
        rejected.append(bool(guard.rejects(state, loss, norm)))
        if not rejected[-1]:
            state = guard.advanced(state, loss, norm)
    return rejected


@pytest.mark.parametrize("name", guards)
def test_a_state_keeps_its_shape_and_type(name: str) -> None:
    guard = guards[name](guards[name].Config())
    state, one = guard.initial_state(), torch.tensor(1.0, dtype=torch.float64)
    after = guard.advanced(state, one, one)
    assert (after.shape, after.dtype, after.dim()) == (state.shape, torch.float64, 1)


@pytest.mark.parametrize("name", guards)
def test_ordinary_steps_are_not_rejected(name: str) -> None:
    assert not any(rejections({"kind": name}, NORMAL * 20))


def test_the_limit_of_a_spike_is_in_deviations_of_the_median() -> None:
    median = sorted(NORMAL)[(len(NORMAL) - 1) // 2]
    deviation = 1.4826 * sorted(abs(x - median) for x in NORMAL)[(len(NORMAL) - 1) // 2]
    setting = {"kind": "spike", "of": "gradient_norm", "memory": len(NORMAL), "after": len(NORMAL), "deviations": 8.0}
    for offset, expected in ((-1e-6, False), (1e-6, True)):
        assert rejections(setting, [*NORMAL, median + 8.0 * deviation + offset])[-1] is expected


def test_a_spike_is_in_the_scale_of_a_standard_deviation() -> None:
    values = (3 + 0.5 * torch.randn(2000, generator=torch.Generator().manual_seed(0))).tolist()
    median = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(x - median) for x in values)
    assert deviation == pytest.approx(0.5, rel=0.05)


def test_a_spike_needs_a_memory() -> None:
    assert rejections({"kind": "spike", "of": "gradient_norm", "after": 5}, [1.0] * 4 + [99.0])[-1] is False
    assert rejections({"kind": "spike", "of": "gradient_norm", "after": 5}, [1.0] * 5 + [99.0])[-1] is True


def test_a_spike_forgets_what_is_older_than_its_memory() -> None:
    values = [1.0] * 8 + [50.0] * 3 + [1.0] * 8
    assert (
        rejections({"kind": "spike", "of": "gradient_norm", "memory": 8, "after": 3}, values)
        == [False] * 8 + [True] * 3 + [False] * 8
    )


def test_hardly_varying_values_have_no_spike_of_a_small_change() -> None:
    setting = {"kind": "spike", "of": "gradient_norm", "after": 3, "deviations": 10.0}
    assert rejections(setting, [1.0] * 5 + [1.09])[-1] is False
    assert rejections(setting, [1.0] * 5 + [1.11])[-1] is True


def test_a_spike_of_the_loss_does_not_watch_the_norm() -> None:
    setting = {"kind": "spike", "after": 5}
    assert not any(rejections(setting, [1.0] * 9 + [99.0]))
    assert rejections(setting, [1.0] * 9 + [99.0], of="loss")[-1]


def test_a_falling_loss_has_spikes_in_the_scale_of_its_noise() -> None:
    noise = torch.randn(40, generator=torch.Generator().manual_seed(0)).mul(0.05).tolist()
    falling = [6 - 0.08 * step + error for step, error in enumerate(noise)]
    spike = {"kind": "spike"}
    assert not any(rejections(spike, falling, of="loss"))
    assert rejections(spike, [*falling, 6.0], of="loss")[-1]


def test_a_gradient_norm_that_rises_for_good_is_no_spike() -> None:
    assert not any(rejections({"kind": "spike", "of": "gradient_norm"}, [1.0 + 0.05 * step for step in range(100)]))


def test_a_ratio_is_to_the_running_mean() -> None:
    assert rejections({"kind": "ratio", "factor": 4.0}, [1.0, 3.0, 8.1]) == [False, False, True]
    assert rejections({"kind": "ratio", "factor": 4.0}, [1.0, 3.0, 7.9]) == [False, False, False]


def test_the_mean_of_a_ratio_decays() -> None:
    steps = 100  # from the 50th on the mean decays by 0.98
    guard = guards["ratio"](guards.parse({"kind": "ratio"}))
    state, one = guard.initial_state(), torch.tensor(1.0, dtype=torch.float64)
    for step in range(steps):
        state = guard.advanced(state, one, one * (2.0 if step >= 50 else 1.0))
    assert float(state[0]) == pytest.approx(2 - 0.98**50)


def test_a_guard_is_one_file(tmp_path: Any) -> None:
    (tmp_path / "above.py").write_text(PLUGIN)
    plug_in(tmp_path / "above.py")
    try:
        assert rejections({"kind": "above", "limit": 2.0}, [1.0, 3.0], of="loss") == [False, True]
    finally:
        guards.unregister("above")
