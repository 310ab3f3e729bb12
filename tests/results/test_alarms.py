"""Limits of layer diagnostics."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from workbench.results.alarms import ALARMS, alarm_table, alarms_of
from workbench.results.tables import DIAGNOSTICS_SCHEMA


@pytest.mark.parametrize(
    ("value", "beyond"), [(100.0, False), (100.1, True), ([1.0, 101.0], True), ([1.0, 2.0], False), (None, True)]
)
def test_a_value_above_its_limit_raises_an_alarm(value: Any, beyond: bool) -> None:
    assert [alarm.diagnostic for alarm in alarms_of({"attention_score_max": value})] == ["attention_score_max"] * beyond


def test_other_diagnostics_have_no_limit() -> None:
    assert alarms_of({"state_norm": 1e9, "selected_distance": None}) == []


def test_a_diagnostic_has_one_limit() -> None:
    assert len({alarm.diagnostic for alarm in ALARMS}) == len(ALARMS)


def test_the_table_has_the_first_step_and_the_largest_value() -> None:
    rows = [
        ("a", "confirmation", "r", 0, step, 2, "r_g", None, value) for step, value in ((5, 0.05), (10, 0.2), (15, 0.4))
    ]
    rows += [("a", "confirmation", "r", 0, 5, 0, "activation_max", None, None)]
    table = alarm_table(pl.DataFrame(rows, schema=DIAGNOSTICS_SCHEMA, orient="row"))
    assert table.select("name", "layer", "step", "value").rows() == [
        ("activation_max", 0, 5, None),
        ("r_g", 2, 10, 0.4),
    ]


def test_no_diagnostics_no_alarms() -> None:
    assert not len(alarm_table(pl.DataFrame(schema=DIAGNOSTICS_SCHEMA)))
