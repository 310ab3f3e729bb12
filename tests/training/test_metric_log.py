"""Lines of metrics.jsonl, written one late from values given directly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench.results import RunFolder
from workbench.training.config import RunConfig
from workbench.training.health import FIELDS, Diverged
from workbench.training.metric_log import HostCopy, MetricLog


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def log_in(folder: RunFolder, on_row: Any = None, **training: Any) -> MetricLog:
    return MetricLog(folder, RunConfig.parse({"training": training}), on_row)


def stage(
    log: MetricLog,
    step: int,
    *,
    losses: tuple[float, float] = (6.0, 2.0),
    rejections: Sequence[Sequence[float]] = (),
    **extra: float,
) -> None:
    """Stage a line: sum and number of losses, a gradient norm of 5, a healthy state unless ``bad_step`` is given, the
    guards' rejections by step."""
    state = [extra.pop(field, 0.0) for field in FIELDS]
    flags = [flag for step_flags in rejections for flag in step_flags]
    values = torch.tensor([*losses, 5.0, *state, *extra.values(), *flags], dtype=torch.float64)
    log.stage({"step": step}, HostCopy(values), list(extra))


def test_a_staged_line_is_not_written_yet(folder: RunFolder) -> None:
    stage(log_in(folder), 1)
    assert folder.metrics() == []


def test_flush_writes_the_staged_line(folder: RunFolder) -> None:
    log = log_in(folder)
    stage(log, 1)
    log.flush()
    assert folder.metrics() == [{"step": 1, "loss": 3.0, "gradient_norm": 5.0}]


def test_flush_without_a_staged_line_writes_nothing(folder: RunFolder) -> None:
    log_in(folder).flush()
    assert folder.metrics() == []


def test_further_values_are_named(folder: RunFolder) -> None:
    log = log_in(folder)
    stage(log, 1, mtp_loss=0.5)
    assert log.complete()["mtp_loss"] == 0.5


def test_a_window_without_finite_losses_has_no_loss(folder: RunFolder) -> None:
    log = log_in(folder)
    stage(log, 1, losses=(0.0, 0.0))
    assert math.isnan(log.complete()["loss"])


def test_a_diverged_line_is_raised_not_written(folder: RunFolder) -> None:
    log = log_in(folder)
    stage(log, 9, bad_step=7.0)
    with pytest.raises(Diverged, match="step 7"):
        log.flush()
    assert folder.metrics() == []


def test_skipped_steps_are_logged_where_steps_may_be_skipped(folder: RunFolder) -> None:
    log = log_in(folder, guards=[{"kind": "ratio"}])
    stage(log, 1, skipped=2.0)
    assert log.complete()["skipped"] == 2


def test_rejected_steps_are_logged_by_guard(folder: RunFolder) -> None:
    log = log_in(folder, guards=[{"kind": "ratio"}, {"kind": "spike", "of": "loss"}])
    stage(log, 10, rejections=[[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # of steps 8, 9, 10
    assert log.complete()["rejected"] == {"ratio": [10], "loss_spike": [9, 10]}


def test_on_row_gets_every_line(folder: RunFolder) -> None:
    rows: list[dict[str, Any]] = []
    log = log_in(folder, rows.append)
    stage(log, 1)
    log.flush()
    assert rows == folder.metrics()


def test_snapshots_are_written_with_the_line_of_their_step(folder: RunFolder) -> None:
    log = log_in(folder)
    log.add_diagnostics(2, {0: {"entropy": torch.tensor(1.5)}})
    stage(log, 1)
    log.flush()
    assert folder.diagnostics() == []
    stage(log, 2)
    log.flush()
    assert folder.diagnostics() == [{"step": 2, "layer": 0, "values": {"entropy": 1.5}}]


def test_snapshots_hold_vectors_and_null_where_not_finite(folder: RunFolder) -> None:
    log = log_in(folder)
    log.add_diagnostics(1, {3: {"load": torch.tensor([1.0, math.nan])}})
    stage(log, 1)
    log.flush()
    assert folder.diagnostics()[0]["values"] == {"load": [1.0, None]}


@pytest.mark.parametrize(("epsilon", "warnings"), [(1e-15, 0), (1e-2, 1)])
def test_an_epsilon_near_the_gradients_is_reported_once(
    epsilon: float, warnings: int, folder: RunFolder, events: Callable[..., list[Any]]
) -> None:
    log = log_in(folder, optimiser={"epsilon": epsilon})
    folder.event("started")
    for step in (1, 2):
        stage(log, step, gradient_rms_min=1e-3)
        log.flush()
    raised = events(folder, "alarm")
    assert [(alarm["of"], alarm["step"]) for alarm in raised] == [("gradient_rms_min", 1)] * warnings


def test_a_diagnostic_beyond_its_limit_raises_an_alarm_once(
    folder: RunFolder, events: Callable[..., list[Any]]
) -> None:
    log = log_in(folder)
    folder.event("started")
    for step, largest in ((1, [3.0, 99.0]), (2, [3.0, 101.0]), (3, [3.0, 200.0])):
        log.add_diagnostics(step, {4: {"attention_score_max": torch.tensor(largest)}})
        stage(log, step)
        log.flush()
    (alarm,) = events(folder, "alarm")
    assert (alarm["of"], alarm["step"], alarm["layer"], alarm["limit"]) == ("attention_score_max", 2, 4, 100.0)
