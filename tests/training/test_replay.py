"""Replayed ranks train as one process with all micro-batches does, and a step takes as long as its slowest rank."""

from __future__ import annotations

import time
from typing import Any, Literal

import numpy as np
import pytest
import torch

from workbench.contract import Budget
from workbench.data import BatchPlanConfig, RowStream, batch_plans
from workbench.data.batching.contiguous import Contiguous
from workbench.model import LanguageModel
from workbench.training.budgets import BudgetConfig, BudgetTuner, budget_tuners
from workbench.training.config import RunConfig
from workbench.training.replay import ReplayedStep, _Clock, replay

RUN: dict[str, Any] = {
    "model": {"width": 32, "depth": 2, "vocabulary": 300, "pattern": "moba", "mixers": {"moba": {"block": 4}}},
    "training": {"tokens": 3 * 8 * 32, "batch_size": 4, "accumulate": 2, "context": 32, "compile": False},
}


class Rows(RowStream):
    """Random rows of one document each."""

    def row(self, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        tokens = np.random.default_rng(r).integers(300, size=33)
        return tokens[:-1], tokens[1:], np.zeros(32, dtype=np.int32), np.full(32, r)


def weights(ranks: int) -> tuple[dict[str, torch.Tensor], list[ReplayedStep]]:
    run = RunConfig.parse(RUN)
    model = LanguageModel(run.model, seed=0)
    steps = list(replay(run, Rows(), ranks, 3, model))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, steps


def test_ranks_that_run_one_after_another_train_as_one_process_does() -> None:
    (alone, _), (replayed, steps) = weights(1), weights(2)
    for name, value in alone.items():
        assert torch.allclose(replayed[name], value, atol=1e-5), name
    assert [step.seconds_RA.shape for step in steps] == [(2, 2)] * 3
    assert all((step.seconds_RA > 0).all() for step in steps)
    assert [len(documents) for of_rank in steps[0].lengths for documents in of_rank] == [2] * 4, "two rows each"
    assert steps[0].blocks_RAL.shape == (2, 2, 2) and np.isnan(steps[0].blocks_RAL).all(), "no budgets"


def test_a_step_takes_as_long_as_its_slowest_rank() -> None:
    step = ReplayedStep(np.array([[1.0, 2.0], [4.0, 1.0]]), [], np.empty(0), np.empty(0))
    assert step.seconds == pytest.approx(5)
    assert step._replace(ranks="sharded").seconds == pytest.approx(4 + 2), "ranks wait in every micro-batch"


def test_a_pass_that_counts_belongs_to_its_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches, counted in 1 and 2 s, trained in 10 and 20 s."""
    now = iter([0, 1, 1, 3, 3, 13, 13, 33, 33])
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    clock = _Clock(torch.device("cpu"))
    clock.begin_step()
    for phase in ("count", "count", "forward", "backward", "forward", "backward", "update"):
        clock.on_phase(phase)
    assert clock.seconds.tolist() == [11, 22]


def test_layers_that_count_first_are_replayed() -> None:
    moe = {
        "feedforward": "moe",
        "feedforwards": {"moe": {"experts": 4, "top_k": 2, "balance_over": "step", "balance_weight": 0.1}},
    }
    fields = {"model": {**RUN["model"], **moe}, "training": {**RUN["training"], "ranks": "replicated"}}
    (step,) = replay(RunConfig.parse(fields), Rows(), 2, 1)
    assert step.seconds_RA.shape == (2, 2) and step.seconds == step.seconds_RA.sum(1).max()


def test_plans_learn_the_budgets_of_every_rank() -> None:
    """Budgets by rank and micro-batch, as of a run whose ranks run at once."""
    fields = {**RUN, "training": {**RUN["training"], "batch_plan": "learning", "budgets": "falling"}}
    learned: list[dict[str, Any]] = []

    @batch_plans.register
    class Learning(Contiguous):
        learns = True

        class Config(BatchPlanConfig):
            kind: Literal["learning"] = "learning"

        def learn(self, state: Any, measurements: Any) -> Any:
            learned.append(measurements)

    @budget_tuners.register
    class Falling(BudgetTuner):
        class Config(BudgetConfig):
            kind: Literal["falling"] = "falling"

        def budgets(self, lengths: Any, rank: int) -> Any:
            numbers = torch.arange(8, 0, -1, dtype=torch.int32)
            return [[Budget(8, numbers[index])] * 2 for index in range(len(lengths[rank]))]

    try:
        list(replay(RunConfig.parse(fields), Rows(), 2, 1))
    finally:
        batch_plans.unregister("learning")
        budget_tuners.unregister("falling")
    assert learned[0]["budgets"] == [[[8, 8], [7, 7]], [[6, 6], [5, 5]]]
