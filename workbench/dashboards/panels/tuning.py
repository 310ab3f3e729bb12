"""Tuning trials over each hyperparameter."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

import plotly.graph_objects as go
import polars as pl

from workbench import formatting
from workbench.dashboards import style
from workbench.dashboards.figures.parts import (
    annotate,
    arm_trace,
    figure_of,
    legend,
    loss_title,
    nothing_tuned,
    subplots,
)
from workbench.dashboards.panel import FigurePanel, PanelConfig, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.tuning import tuning_table
from workbench.status import ENDED, Status


@panels.register
class TuningSlices(FigurePanel):
    """Which values of each hyperparameter were tried, and how good were they?"""

    class Config(PanelConfig):
        kind: Literal["tuning"] = "tuning"

    title = "slices"
    tab = "Tuning"
    order = 50
    report = {"Tuning": {}}
    note = "Selection value of each trial. The chosen trial is circled; a cross marks one that was stopped or failed."

    def table(self, run: Snapshot) -> pl.DataFrame:
        return tuning_table(run)

    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        names = table["hyperparameter"].unique(maintain_order=True).to_list()
        if not names:
            figure = figure_of([], nothing_tuned(run, "No tuning trial has started."))
            figure.update_xaxes(title_text="hyperparameter")
            return figure.update_yaxes(title_text=loss_title(run, "selection_value"))
        grid, positions = subplots(len(names), 3, gap=0.05)
        finite = table.filter(pl.col("selection_value").is_finite())["selection_value"].to_list()
        lowest, highest = (min(finite), max(finite)) if finite else (0.0, 1.0)
        failed_y = highest + 0.12 * ((highest - lowest) or 1.0)  # where trials that failed without a value are drawn
        for number, (name, position) in enumerate(zip(names, positions)):
            trials = table.filter(pl.col("hyperparameter") == name)
            _draw_trials(grid, run, trials, position, failed_y, showlegend=number == 0)
            _set_axis(grid, trials, name, position)
        grid.update_yaxes(title_text=loss_title(run, "selection_value"), col=1)
        grid.update_layout(height=60 + 300 * positions[-1]["row"], legend=legend(run.arms))
        if not finite and not table["status"].is_in(ENDED).any():
            annotate(grid, f"No trial has a selection {run.metric.name} yet.")
        return grid


def _draw_trials(
    grid: go.Figure, run: Snapshot, trials: pl.DataFrame, position: Any, failed_y: float, showlegend: bool
) -> None:
    """One trace per arm, and a circle around the chosen trials."""
    styles, categorical = style.arm_styles(run), _is_categorical(trials)
    for arm, look in styles.items():
        rows = list(trials.filter(pl.col("arm") == arm).iter_rows(named=True))
        grid.add_scatter(
            x=[_x(row, categorical) for row in rows],
            mode="markers",
            y=[_y(row, failed_y) for row in rows],
            text=[_hover(row, run.metric.unit) for row in rows],
            hoverinfo="text",
            showlegend=showlegend,
            cliponaxis=False,
            marker={
                "symbol": [_symbol(row["status"], look.symbol) for row in rows],
                "color": look.colour,
                "size": 9,
                "opacity": 0.9,
                "line": {"width": 1.5, "color": look.colour},
            },
            **arm_trace(run, arm),
            **position,
        )
    chosen = [row for row in trials.iter_rows(named=True) if row["selected"] and _is_finite(row["selection_value"])]
    grid.add_scatter(
        x=[_x(row, categorical) for row in chosen],
        y=[row["selection_value"] for row in chosen],
        name="chosen",
        mode="markers",
        hoverinfo="skip",
        showlegend=showlegend,
        cliponaxis=False,
        marker={
            "symbol": "circle-open",
            "size": 18,
            "color": [styles[row["arm"]].colour for row in chosen],
            "line": {"width": 2},
        },
        **position,
    )


def _set_axis(grid: go.Figure, trials: pl.DataFrame, name: str, position: Any) -> None:
    values = trials["value"].drop_nulls().to_list()
    categorical = _is_categorical(trials)
    log = not categorical and min(values) > 0 and max(values) / min(values) > 5
    kind = "category" if categorical else "log" if log else "linear"
    grid.update_xaxes(title_text=style.label(name), type=kind, **position)
    if log:
        grid.update_xaxes(dtick="D2" if max(values) / min(values) < 50 else 1, tickformat="~g", **position)


def _is_categorical(trials: pl.DataFrame) -> bool:
    return trials["word"].null_count() < len(trials)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _x(row: dict[str, Any], categorical: bool) -> Any:
    if not categorical:
        return row["value"]
    return style.label(row["word"] if row["word"] is not None else json.dumps(row["value"]))


def _y(row: dict[str, Any], failed_y: float) -> float | None:
    """A trial's value; ``failed_y`` where it ended without one; nothing while it has none yet."""
    if _is_finite(row["selection_value"]):
        return row["selection_value"]
    return failed_y if row["status"] in ENDED else None


def _symbol(status: str, done: str) -> str:
    return done if status == Status.DONE else "x" if status in ENDED else f"{done}-open"


def _hover(row: dict[str, Any], unit: str) -> str:
    setting = row["word"] if row["value"] is None else f"{row['value']:.4g}"
    value = "no value"
    if _is_finite(row["selection_value"]):
        value = f"{formatting.metric(row['selection_value'])} {style.label(unit)}"
    chosen = ", chosen" if row["selected"] else ""
    return f"{style.label(row['arm'])}: {style.label(setting)}<br>{value}, {row['status']}{chosen}"
