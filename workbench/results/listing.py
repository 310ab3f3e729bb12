"""Runs as rows to read: one line an arm, or one a run, with a column for every hyper-parameter.

The command ``workbench table`` and the dashboard's table of runs show these rows, and filter them with
:mod:`workbench.results.filters`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import polars as pl

from workbench import formatting
from workbench.results.filters import Filter
from workbench.status import FAILED, Stage, Status

__all__ = ["arm_rows", "cell_text", "columns_of", "constants", "filtered", "run_rows", "setting_names"]

Row = dict[str, Any]

ARM_COLUMNS = ("arm", "stage", "runs", "report", "report_sd", "selection", "selection_sd")
"""Columns of :func:`arm_rows` before the settings; :data:`ARM_TAIL` follows them."""
ARM_TAIL = ("failed", "unfinished", "trials", "parameters", "seconds", "loss", "tokens", "tokens_per_second")
RUN_COLUMNS = ("arm", "stage", "seed", "report", "selection")
"""Columns of :func:`run_rows` before the settings; :data:`RUN_TAIL` follows them."""
RUN_TAIL = ("chosen", "status", "reason", "loss", "tokens", "seconds", "tokens_per_second", "step", "steps", "run")
STAGES = (Stage.CONFIRMATION, Stage.REPEAT, Stage.TUNING)


def setting_names(runs: pl.DataFrame) -> dict[str, str]:
    """Dotted field that was tuned -> the end of its name, as far as that is unique.

    Args:
        runs: rows of :data:`workbench.results.tables.RUN_SCHEMA`.
    """
    fields = dict.fromkeys(
        field for text in runs["hyperparameters"].unique().sort() for field in json.loads(text or "{}")
    )
    taken = {*ARM_COLUMNS, *ARM_TAIL, *RUN_COLUMNS, *RUN_TAIL}
    ends = formatting.distinct_ends([field.split(".") for field in fields], ".")
    return {field: field if end in taken else end for field, end in zip(fields, ends)}


def run_rows(runs: pl.DataFrame, arms: Sequence[str] = ()) -> list[Row]:
    """One row per run: confirmation runs first, by seed; tuning trials by their setting.

    Columns: arm, stage, seed, report and selection (the metric on both splits; lower is better), one column per tuned
    field, chosen (whether this tuning trial's setting is confirmed), status, reason (of a failure), loss (nats per
    token), tokens, seconds (training), tokens_per_second, step, steps (planned), run.

    Args:
        runs: rows of :data:`workbench.results.tables.RUN_SCHEMA`.
        arms: their order; others follow.
    """
    names = setting_names(runs)
    order = {arm: place for place, arm in enumerate(arms)}
    rows = []
    for run in runs.iter_rows(named=True):
        values = json.loads(run["hyperparameters"] or "{}")
        rows.append(
            {
                **{name: run[name] for name in ("arm", "stage", "seed")},
                "report": run["report_value"],
                "selection": run["selection_value"],
                **{end: values.get(field) for field, end in names.items()},
                "chosen": run["selected"],
                **{name: run[name] for name in RUN_TAIL[1:]},
            }
        )

    def place(row: Row) -> tuple[Any, ...]:
        arm, stage = row["arm"], row["stage"]
        settings = [_sortable(row[name]) for name in names.values()] if stage != Stage.CONFIRMATION else []
        return (
            order.get(arm, len(order)),
            "" if arm in order else arm,
            STAGES.index(stage) if stage in STAGES else len(STAGES),
            settings,
            row["seed"],
        )

    return sorted(rows, key=place)


def arm_rows(runs: pl.DataFrame, arms: Sequence[str] = ()) -> list[Row]:
    """One row per arm.

    Columns: arm; stage (of the runs that the numbers are of: confirmation, or tuning while no confirmation run is
    done); runs (how many of them are done); report, report_sd, selection, selection_sd (mean and standard deviation of
    the metric over them; while only tuning trials are done, the selection value of the best one); one column per tuned
    field with the chosen setting (while none is chosen, that of the best trial); failed and unfinished (runs of every
    stage); trials (tuning trials done); the median over runs of parameters, loss (nats per token), tokens, seconds
    (training) and tokens_per_second.

    Args:
        runs: rows of :data:`workbench.results.tables.RUN_SCHEMA`.
        arms: their order; others follow.
    """
    names = setting_names(runs)
    present = runs["arm"].unique(maintain_order=True).sort().to_list()
    rows = []
    for arm in [*(arm for arm in arms if arm in present), *(arm for arm in present if arm not in arms)]:
        of_arm = runs.filter(pl.col("arm") == arm)
        done = of_arm.filter(pl.col("status") == Status.DONE)
        trials = done.filter(pl.col("stage") == Stage.TUNING)
        best = trials.filter(pl.col("selected"))
        if not len(best):
            best = trials.sort("selection_value", nulls_last=True).head(1)
        measured = done.filter(pl.col("stage") == Stage.CONFIRMATION)
        tunes = bool((of_arm["stage"] == Stage.TUNING).any())
        stage = Stage.TUNING if tunes and not len(measured) else Stage.CONFIRMATION
        if not len(measured):
            measured = best
        settings = [json.loads(frame["hyperparameters"][0] or "{}") for frame in (measured, best) if len(frame)]
        values: Row = next(filter(None, settings), {})
        numbers: Row = {}
        for name in ("report", "selection"):
            column = measured[f"{name}_value"].drop_nulls()
            numbers |= {name: column.mean(), f"{name}_sd": column.std() if len(column) > 1 else None}
        rows.append(
            {
                "arm": arm,
                "stage": str(stage),
                "runs": len(done.filter(pl.col("stage") == stage)),
                **numbers,
                **{end: values.get(field) for field, end in names.items()},
                "failed": of_arm["status"].is_in(list(FAILED)).sum(),
                "unfinished": (~of_arm["status"].is_in([*FAILED, Status.DONE, Status.PRUNED])).sum(),
                "trials": len(trials),
                **{name: measured[name].median() for name in ARM_TAIL[3:]},
            }
        )
    return rows


def _sortable(value: Any) -> tuple[bool, bool, float, str]:
    """Numbers before texts before missing values."""
    is_number = isinstance(value, int | float)
    return value is None, not is_number, value if is_number else 0.0, str(value)


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The columns of rows that may have different ones, in order."""
    return list(dict.fromkeys(column for row in rows for column in row))


def filtered(rows: Sequence[Row], where: str) -> list[Row]:
    """The rows that satisfy a filter (:mod:`workbench.results.filters`).

    Raises:
        ConfigError: for a mistake in the filter.
    """
    found = Filter.parse(where, columns_of(rows))
    return [row for row in rows if found.matches(row)]


def constants(rows: Sequence[Mapping[str, Any]], keep: Collection[str] = ()) -> dict[str, Any]:
    """Columns that tell no row from another -> their value.

    Args:
        rows: the rows; of a single one only missing values, zeros and the stage are constant.
        keep: columns that are never constant.
    """
    same = {}
    for column in columns_of(rows):
        values = [row.get(column) for row in rows]
        several = len(rows) > 1 or not values[0] or column == "stage"
        if column not in keep and several and all(value == values[0] for value in values):
            same[column] = values[0]
    return same


def cell_text(column: str, row: Mapping[str, Any]) -> str:
    """A value as people read it; a mean with its standard deviation."""
    value = row.get(column)
    if value is None:
        return formatting.UNKNOWN
    if column in ("report", "selection", "loss"):
        return formatting.spread(value, row.get(f"{column}_sd"))
    if column in ("report_sd", "selection_sd"):
        return formatting.metric(value)
    if column in ("tokens", "tokens_per_second", "parameters"):
        return formatting.count(value)
    if column == "seconds":
        return formatting.duration(value)
    if isinstance(value, bool):
        return "yes" if value else ""
    if column == "status":
        return str(value).replace("_", " ")
    return f"{value:.3g}" if isinstance(value, float) else str(value)
