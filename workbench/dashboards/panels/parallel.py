"""Tuning trials in parallel coordinates."""

from __future__ import annotations

import math
from typing import Any, Literal

import plotly.graph_objects as go
import polars as pl

from workbench.dashboards import style
from workbench.dashboards.figures.parts import figure_of, message, nothing_tuned
from workbench.dashboards.panel import FigurePanel, PanelConfig, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.tuning import tuning_table
from workbench.formatting import distinct_ends

MAX_TICKS = 6
"""Up to this many different values each has a tick."""


@panels.register
class Parallel(FigurePanel):
    """Which combinations of hyperparameters are good?"""

    class Config(PanelConfig):
        kind: Literal["parallel"] = "parallel"

    title = "parallel"
    tab = "Tuning"
    order = 51
    note = "One line per trial, coloured by arm; drag along an axis to select a range."

    def table(self, run: Snapshot) -> pl.DataFrame:
        return tuning_table(run).filter(pl.col("selection_value").is_finite())

    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        styles = style.arm_styles(run)
        names = table["hyperparameter"].unique(maintain_order=True).to_list()
        if not names:
            return message(nothing_tuned(run, "No tuning trial has a value yet."))
        settings_of: dict[str, dict[str, Any]] = {}
        trials: dict[str, tuple[str, float]] = {}
        for row in table.iter_rows(named=True):
            trials[row["run"]] = row["arm"], row["selection_value"]
            value = row["value"] if row["value"] is not None else row["word"]
            settings_of.setdefault(row["run"], {})[row["hyperparameter"]] = value
        position = {arm: i for i, arm in enumerate(styles)}
        arm_axis = {
            "label": "arm",
            "values": [position[arm] for arm, _ in trials.values()],
            "tickvals": list(position.values()),
            "ticktext": list(style.labels(position, 16).values()),
            "range": [-0.2, max(len(position) - 0.8, 0.2)],
        }
        axes = [
            _axis(end, [settings.get(name) for settings in settings_of.values()])
            for name, end in zip(names, distinct_ends([name.split(".") for name in names], "."))
        ]
        value_axis = {"label": style.label(run.metric.short, 22), "values": [value for _, value in trials.values()]}
        last = max(len(position) - 1, 1)
        colours = [[i / last, look.colour] for i, look in enumerate(styles.values())]
        figure = figure_of(
            [
                go.Parcoords(
                    dimensions=[arm_axis, *axes, value_axis],
                    labelside="top",
                    labelfont={"size": 12},
                    tickfont={"size": 11},
                    rangefont={"size": 10},
                    line={
                        "color": arm_axis["values"],
                        "cmin": 0,
                        "cmax": last,
                        "colorscale": colours if len(colours) > 1 else [[0, colours[0][1]], [1, colours[0][1]]],
                    },
                )
            ]
        )
        return figure.update_layout(margin={"l": 90, "r": 70, "t": 64, "b": 24}, height=420)


def _axis(name: str, values: list[Any]) -> dict[str, Any]:
    label = style.label(name, 22)
    if any(not isinstance(value, int | float) for value in values):
        words = sorted({str(value) for value in values})
        return {
            "label": label,
            "values": [words.index(str(value)) for value in values],
            "tickvals": list(range(len(words))),
            "ticktext": list(style.labels(words, 16).values()),
        }
    low, high = min(values), max(values)
    if low > 0 and high / low > 5:
        distinct = sorted(set(values))
        ticks = distinct if len(distinct) <= MAX_TICKS else [low * (high / low) ** (i / 4) for i in range(5)]
        return {
            "label": label,
            "values": [math.log10(value) for value in values],
            "tickvals": [math.log10(tick) for tick in ticks],
            "ticktext": [f"{tick:.2g}" for tick in ticks],
        }
    return {"label": label, "values": values}
