"""Tuning trials."""

from __future__ import annotations

import json

import polars as pl

from workbench.dashboards.snapshot import Snapshot
from workbench.status import Stage


def tuning_table(run: Snapshot) -> pl.DataFrame:
    """One row per trial and hyperparameter.

    Columns: arm, run, hyperparameter, value (numbers), word (other values as text), selection_value, status, selected.
    """
    schema = {
        "arm": pl.String,
        "run": pl.String,
        "hyperparameter": pl.String,
        "value": pl.Float64,
        "word": pl.String,
        "selection_value": pl.Float64,
        "status": pl.String,
        "selected": pl.Boolean,
    }
    rows = []
    for trial in run.runs().filter(pl.col("stage") == Stage.TUNING).iter_rows(named=True):
        for name, value in json.loads(trial["hyperparameters"] or "{}").items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            rows.append(
                {
                    **{key: trial[key] for key in ("arm", "run", "selection_value", "status", "selected")},
                    "hyperparameter": name,
                    "value": float(value) if is_number else None,
                    "word": None if is_number else value if isinstance(value, str) else json.dumps(value),
                }
            )
    return pl.DataFrame(rows, schema=schema, orient="row")
