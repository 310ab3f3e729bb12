"""Metrics are ratios of sums over documents."""

from __future__ import annotations

import math

import numpy as np
import pytest

from workbench.metric import ANSWER_ERRORS, ANSWER_LOSS, BITS_PER_BYTE, NATS_PER_TOKEN, Metric

COLUMNS = {
    "nll_nats": np.array([1.0, 3.0]),
    "bytes": np.array([2, 6]),
    "targets": np.array([1, 1]),
    "errors": np.array([1, 0]),
    "answers": np.array([1, 3]),
}


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        (BITS_PER_BYTE, 0.5 / math.log(2)),
        (NATS_PER_TOKEN, 2.0),
        (ANSWER_LOSS, 1 / math.log(2)),
        (ANSWER_ERRORS, 0.25),
    ],
)
def test_a_metric_is_a_ratio_of_sums(metric: Metric, value: float) -> None:
    assert metric.of(COLUMNS) == pytest.approx(value)


def test_plain_data_restores_a_metric() -> None:
    assert Metric(**ANSWER_ERRORS.plain()) == ANSWER_ERRORS


def test_a_metric_of_an_older_archive_equals_todays() -> None:
    plain = {name: value for name, value in ANSWER_ERRORS.plain().items() if name not in ("suite", "task")}
    assert Metric(**plain) == ANSWER_ERRORS


def test_the_short_unit_fits_a_heading() -> None:
    assert ANSWER_ERRORS.short == "errors/answer"
