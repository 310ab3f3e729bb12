"""Counts of a step, with counters that record what they are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workbench.contract import AuxOutputs, StepCounter
from workbench.training.step_counters import StepCounters


class Recording(StepCounter):
    """Its step loss is the sum of its counts so far, times its input."""

    tap_size = 2

    def __init__(self) -> None:
        super().__init__()
        self.updates: list[tuple[list[int], float, float, float]] = []
        self.diagnosed: list[tuple[list[int], list[int], float]] = []

    def step_loss(self, counts: Tensor, loss_input: Tensor) -> Tensor:
        return counts.sum() * loss_input

    def update_state(self, counts: Tensor, lr_factor: float, remaining: float, applied: Tensor) -> None:
        self.updates.append((counts.tolist(), lr_factor, remaining, float(applied)))

    def diagnostics(
        self, counts: Tensor, recent_counts: Tensor, loss_input: Tensor, tap_gradient: Tensor
    ) -> dict[str, Tensor]:
        self.diagnosed.append((counts.tolist(), recent_counts.tolist(), float(tap_gradient.sum())))
        return {"counted": counts.sum(), "loss_input": loss_input}


@pytest.fixture
def model() -> Any:
    return nn.ModuleList([Recording(), Recording()])


def outputs(counter: StepCounter, *counts: int) -> AuxOutputs:
    return AuxOutputs(counts=[(counter, torch.tensor(counts), torch.tensor(0.5, requires_grad=True))])


def test_counts_add_up_over_micro_batches(model: Any) -> None:
    counters = StepCounters(model)
    counters.begin_step()
    counters.count([outputs(model[0], 1, 2)])
    counters.count([outputs(model[0], 3, 4)])
    assert counters.step_counts[0].tolist() == [4, 6]


def test_step_losses_see_what_has_been_counted(model: Any) -> None:
    counters, second = StepCounters(model), [outputs(model[0], 3, 4)]
    counters.begin_step()
    counters.count([outputs(model[0], 1, 2)])
    counters.count(second)
    assert [float(loss.detach()) for loss in counters.losses(second)] == [5.0]


def test_counters_that_did_not_run_have_no_loss(model: Any) -> None:
    counters = StepCounters(model)
    counters.begin_step()
    aux = [outputs(model[1], 1, 1)]
    counters.count(aux)
    assert len(counters.losses(aux)) == 1


def test_a_new_step_starts_from_nothing(model: Any) -> None:
    counters = StepCounters(model)
    counters.begin_step()
    counters.count([outputs(model[0], 1, 2)])
    counters.begin_step()
    assert counters.step_counts == {}


def test_state_is_updated_once_per_step(model: Any) -> None:
    counters = StepCounters(model)
    counters.begin_step()
    counters.count([outputs(model[0], 1, 2)])
    counters.update(0.5, 0.25, torch.tensor(1.0))
    assert model[0].updates == [([1, 2], 0.5, 0.25, 1.0)]


def test_recent_counts_reach_over_steps_until_diagnostics(model: Any) -> None:
    counters = StepCounters(model)
    for _ in range(3):
        counters.begin_step()
        counters.attach_taps(torch.device("cpu"))
        layers = [outputs(model[0], 1, 2)]
        counters.count(layers)
        counters.losses(layers)
        counters.update(1.0, 0.0, torch.tensor(1.0))
    counters.diagnostics(layers)
    assert model[0].diagnosed == [([1, 2], [3, 6], 0.0)]
    assert counters.recent_counts == {}


def test_diagnostics_get_what_the_step_has_summed(model: Any) -> None:
    counters, layers = StepCounters(model), [outputs(model[0], 1, 2)]
    counters.begin_step()
    counters.attach_taps(torch.device("cpu"))
    for _ in range(2):
        (model[0].gradient_tap.sum() / 4).backward()
        counters.count(layers)
        counters.losses(layers)
    counters.update(1.0, 0.0, torch.tensor(1.0))
    assert counters.diagnostics(layers) == [{"counted": torch.tensor(6), "loss_input": torch.tensor(1.0)}]
    assert model[0].diagnosed[0][2] == pytest.approx(2 * 2 / 4), "two micro-batches, two numbers"


def test_taps_are_removed_after_diagnostics(model: Any) -> None:
    counters = StepCounters(model)
    counters.attach_taps(torch.device("cpu"))
    counters.diagnostics([AuxOutputs()])
    assert model[0].gradient_tap is None


def test_a_model_without_such_a_loss_is_not_counted_first(model: Any) -> None:
    counters = StepCounters(model)
    assert not counters.count_first
    model[1].counts_first = True
    assert counters.count_first
