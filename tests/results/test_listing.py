"""Runs as rows to read."""

from __future__ import annotations

import json
from typing import Any

import polars as pl
import pytest

from workbench.config import ConfigError
from workbench.results.listing import arm_rows, cell_text, constants, filtered, run_rows, setting_names
from workbench.results.tables import RUN_SCHEMA


def run(arm: str, stage: str, seed: int, **fields: Any) -> dict[str, Any]:
    values = fields.pop("values", {"training.learning_rate": 0.003})
    return {
        "arm": arm,
        "stage": stage,
        "seed": seed,
        "run": f"{stage}-{arm}-{seed}",
        "status": "done",
        "selected": False,
        "hyperparameters": json.dumps(values),
        **fields,
    }


def frame(*rows: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=RUN_SCHEMA, orient="row")


@pytest.fixture
def runs() -> pl.DataFrame:
    return frame(
        run("gdn", "tuning", 1000, values={"training.learning_rate": 0.01}, selection_value=2.4, status="diverged"),
        run("gdn", "tuning", 1000, values={"training.learning_rate": 0.003}, selection_value=2.3, selected=True),
        run("gdn", "confirmation", 1, selection_value=2.2, report_value=2.6),
        run("gdn", "confirmation", 0, selection_value=2.0, report_value=2.4),
        run("full", "tuning", 1000, values={"training.learning_rate": 0.01}, selection_value=2.1),
        run("full", "tuning", 1000, values={"training.learning_rate": 0.003}, selection_value=2.5),
    )


def test_an_arm_has_mean_and_standard_deviation(runs: pl.DataFrame) -> None:
    _, gdn = arm_rows(runs, ["full", "gdn"])
    assert (gdn["runs"], gdn["report"], gdn["selection"]) == (2, 2.5, pytest.approx(2.1))
    assert gdn["report_sd"] == pytest.approx(0.1414, abs=1e-4)
    assert cell_text("report", gdn) == "2.5000 ± 0.1414"
    assert (gdn["stage"], gdn["learning_rate"], gdn["failed"], gdn["trials"]) == ("confirmation", 0.003, 1, 1)


def test_an_arm_without_confirmation_shows_its_best_trial(runs: pl.DataFrame) -> None:
    full, _ = arm_rows(runs, ["full", "gdn"])
    assert (full["stage"], full["selection"], full["learning_rate"]) == ("tuning", 2.1, 0.01)
    assert full["report"] is None and cell_text("report", full) == "–"


def test_an_arm_whose_runs_all_failed_has_a_row() -> None:
    (row,) = arm_rows(frame(run("wild", "tuning", 1, status="diverged")))
    assert (row["runs"], row["failed"], row["selection"]) == (0, 1, None)


def test_runs_are_in_order(runs: pl.DataFrame) -> None:
    rows = run_rows(runs, ["full", "gdn"])
    assert [(row["arm"], row["seed"], row["learning_rate"]) for row in rows] == [
        ("full", 1000, 0.003),
        ("full", 1000, 0.01),
        ("gdn", 0, 0.003),
        ("gdn", 1, 0.003),
        ("gdn", 1000, 0.003),
        ("gdn", 1000, 0.01),
    ]


def test_settings_of_several_kinds_are_sorted() -> None:
    mixed = [{"a.norm": "pre"}, {"a.norm": 2}, {"a.norm": None}, {}]
    rows = run_rows(frame(*(run("full", "tuning", i, values=values) for i, values in enumerate(mixed))))
    assert [row["norm"] for row in rows] == [2, "pre", None, None]


def test_a_setting_does_not_take_the_name_of_a_column() -> None:
    rows = frame(run("full", "tuning", 0, values={"training.tokens": 5, "training.seed": 1}))
    assert list(setting_names(rows).values()) == ["training.tokens", "training.seed"]


def test_constant_columns_are_found(runs: pl.DataFrame) -> None:
    rows = run_rows(runs.filter(pl.col("stage") == "confirmation"))
    same = constants(rows, keep=("arm",))
    assert same["stage"] == "confirmation" and same["learning_rate"] == 0.003 and same["reason"] is None
    assert not {"arm", "seed", "report"} & set(same)


def test_a_single_row_keeps_what_it_says(runs: pl.DataFrame) -> None:
    same = constants(arm_rows(runs.filter(pl.col("arm") == "full")))
    assert {"stage", "report", "failed"} <= set(same) and not {"learning_rate", "trials"} & set(same)


def test_rows_are_filtered(runs: pl.DataFrame) -> None:
    assert [row["seed"] for row in filtered(run_rows(runs), "gdn confirmation report<2.5")] == [0]
    with pytest.raises(ConfigError, match="filter"):
        filtered(run_rows(runs), "speed>1")
