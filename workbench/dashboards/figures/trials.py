"""What tuning tried."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
import polars as pl

from workbench.dashboards import style
from workbench.dashboards.figures.parts import figure_of, legend, panels, say, sentence, y_title
from workbench.dashboards.tables import FEWEST, best_of_table, importance_table, tuning_table
from workbench.status import ENDED

if TYPE_CHECKING:
    from workbench.dashboards.view import RunView


def tuning(run: RunView) -> go.Figure:
    """Selection loss of each trial over each hyperparameter; the chosen trial ringed, failed ones as crosses."""
    table, styles = tuning_table(run), style.looks(run)
    names = table["hyperparameter"].unique(maintain_order=True).to_list()
    if not names:
        figure = figure_of([], _nothing_tuned(run, "No tuning trial has begun."))
        figure.update_xaxes(title_text="hyperparameter")
        figure.update_yaxes(title_text=y_title(run, "selection_value"))
        return figure
    grid, places = panels(len(names), 3, gap=0.05)
    known = table.filter(pl.col("selection_value").is_finite())["selection_value"]
    lowest, highest = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)  # type: ignore[arg-type]
    rail = highest + 0.12 * ((highest - lowest) or 1.0)  # where trials that failed without a number are put
    for index, (name, at) in enumerate(zip(names, places)):
        here = table.filter(pl.col("hyperparameter") == name)
        words = here["word"].null_count() < len(here)
        for arm, look in styles.items():
            mine = here.filter(pl.col("arm") == arm)
            rows = list(mine.iter_rows(named=True))
            grid.add_scatter(
                x=[_value(row, words) for row in rows],
                name=style.label(arm),
                mode="markers",
                legendgroup=f"arm {run.arms.index(arm)}",
                y=[_height(row, rail) for row in rows],
                text=[_trial(row, run.metric.unit) for row in rows],
                hoverinfo="text",
                showlegend=index == 0,
                cliponaxis=False,
                marker={
                    "symbol": [_symbol(row["status"]) for row in rows],
                    "color": look.colour,
                    "size": 9,
                    "opacity": 0.9,
                    "line": {"width": 1.5, "color": look.colour},
                },
                **at,
            )
        chosen = [row for row in here.iter_rows(named=True) if row["selected"] and not _unknown(row["selection_value"])]
        grid.add_scatter(
            x=[_value(row, words) for row in chosen],
            y=[row["selection_value"] for row in chosen],
            name="chosen",
            mode="markers",
            hoverinfo="skip",
            showlegend=index == 0,
            cliponaxis=False,
            marker={
                "symbol": "circle-open",
                "size": 18,
                "color": [styles[row["arm"]].colour for row in chosen],
                "line": {"width": 2},
            },
            **at,
        )
        values = [value for value in here["value"].to_list() if value is not None]
        log = not words and min(values) > 0 and max(values) / min(values) > 5
        grid.update_xaxes(title_text=style.label(name), type="category" if words else "log" if log else "linear", **at)
        if log:
            grid.update_xaxes(dtick="D2" if max(values) / min(values) < 50 else 1, tickformat="~g", **at)
    grid.update_yaxes(title_text=y_title(run, "selection_value"), col=1)
    grid.update_layout(height=60 + 300 * places[-1]["row"], legend=legend(run.arms))
    if not len(known) and not table["status"].is_in(ENDED).any():
        say(grid, f"No trial has a selection {run.metric.name} yet.")
    return grid


def _nothing_tuned(run: RunView, yet: str) -> str:
    """Why there is nothing to draw: none is planned, or ``yet``."""
    if run.tuning_trials:
        return yet
    return "Nothing is tuned: every arm trains with the settings it was given."


def _unknown(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def _value(row: dict[str, Any], words: bool) -> Any:
    if not words:
        return row["value"]
    return style.label(row["word"] if row["word"] is not None else json.dumps(row["value"]))


def _height(row: dict[str, Any], rail: float) -> float | None:
    """Where a trial is drawn: at its number; on the rail when it ended without one; nowhere while it has none yet."""
    if _unknown(row["selection_value"]):
        return rail if row["status"] in ENDED else None
    return row["selection_value"]


def _symbol(status: str) -> str:
    return "circle" if status == "done" else "x" if status in ENDED else "circle-open"


def _trial(row: dict[str, Any], unit: str) -> str:
    value = row["word"] if row["value"] is None else f"{row['value']:.4g}"
    number = (
        "no number" if _unknown(row["selection_value"]) else f"{style.bits(row['selection_value'])} {style.label(unit)}"
    )
    chosen = ", chosen" if row["selected"] else ""
    return f"{style.label(row['arm'])}: {style.label(value)}<br>{number}, {row['status']}{chosen}"


def parallel(run: RunView) -> go.Figure:
    """Every tuning trial as a line through its hyperparameters and its selection value, coloured by arm."""
    table, styles = tuning_table(run).filter(pl.col("selection_value").is_finite()), style.looks(run)
    names = table["hyperparameter"].unique(maintain_order=True).to_list()
    if not names:
        return sentence(_nothing_tuned(run, "No tuning trial has a number yet."))
    trials: dict[str, dict[str, Any]] = {}
    for row in table.iter_rows(named=True):
        value = row["value"] if row["value"] is not None else row["word"]
        trials.setdefault(row["run"], {"arm": row["arm"], "value": row["selection_value"]})[
            f" {row['hyperparameter']}"
        ] = value
    rows = list(trials.values())
    place = {arm: i for i, arm in enumerate(styles)}
    short = [style.label(arm, 16) for arm in place]
    dimensions = [
        {
            "label": "arm",
            "values": [place[row["arm"]] for row in rows],
            "tickvals": list(place.values()),
            "ticktext": short,
            "range": [-0.2, max(len(place) - 0.8, 0.2)],
        }
    ]
    dimensions += [_dimension(name, [row.get(f" {name}") for row in rows]) for name in names]
    dimensions.append({"label": style.label(run.metric.short, 22), "values": [row["value"] for row in rows]})
    last = max(len(place) - 1, 1)
    colours = [[i / last, look.colour] for i, look in enumerate(styles.values())]
    figure = figure_of(
        [
            go.Parcoords(
                dimensions=dimensions,
                labelside="top",
                labelfont={"size": 12},
                tickfont={"size": 11},
                rangefont={"size": 10},
                line={
                    "color": [place[row["arm"]] for row in rows],
                    "cmin": 0,
                    "cmax": last,
                    "colorscale": colours if len(colours) > 1 else [[0, colours[0][1]], [1, colours[0][1]]],
                },
            )
        ]
    )
    return figure.update_layout(margin={"l": 90, "r": 70, "t": 64, "b": 24}, height=420)


def _dimension(name: str, values: list[Any]) -> dict[str, Any]:
    label = style.label(name.rpartition(".")[2], 22)
    if any(not isinstance(value, int | float) for value in values):
        words = sorted({str(value) for value in values})
        return {
            "label": label,
            "values": [words.index(str(value)) for value in values],
            "tickvals": list(range(len(words))),
            "ticktext": [style.label(word, 16) for word in words],
        }
    if min(values) > 0 and max(values) / min(values) > 5:
        ticks = (
            sorted(set(values))
            if len(set(values)) <= 6
            else [min(values) * (max(values) / min(values)) ** (i / 4) for i in range(5)]
        )
        return {
            "label": label,
            "values": [math.log10(value) for value in values],
            "tickvals": [math.log10(tick) for tick in ticks],
            "ticktext": [f"{tick:.2g}" for tick in ticks],
        }
    return {"label": label, "values": values}


def importances(run: RunView) -> go.Figure:
    """Share of each hyperparameter in what tuning changed, one bar an arm; error bars hold 90 % of a bootstrap."""
    table, styles = importance_table(run), style.looks(run)
    bars = []
    for arm, look in styles.items():
        mine = table.filter(pl.col("arm") == arm)
        value = mine["importance"]
        bars.append(
            go.Bar(
                y=[style.label(name) for name in mine["hyperparameter"]],
                x=value.to_list(),
                name=style.label(arm),
                orientation="h",
                marker={"color": look.colour},
                customdata=mine["trials"].to_list(),
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": (mine["high"] - value).clip(0).to_list(),
                    "arrayminus": (value - mine["low"]).clip(0).to_list(),
                    "thickness": 1,
                    "color": style.INK,
                },
                hovertemplate="%{x:.0%} of %{y} (%{customdata} trials)",
            )
        )
    figure = figure_of(
        bars, "" if len(table) else _nothing_tuned(run, f"Importances need {FEWEST} finished trials of an arm.")
    )
    figure.update_xaxes(title_text="importance (share)", tickformat=".0%", range=[0, 1.02])
    figure.update_yaxes(title_text="hyperparameter")
    return figure.update_layout(legend=legend(run.arms), barmode="group")


def best_of(run: RunView) -> go.Figure:
    """Selection value expected of the best of k trials: what an arm gains by more tuning."""
    table, styles = best_of_table(run), style.looks(run)
    lines = []
    for arm, look in styles.items():
        mine = table.filter(pl.col("arm") == arm)
        lines.append(
            go.Scatter(
                x=mine["k"].to_list(),
                y=mine["best"].to_list(),
                name=style.label(arm),
                mode="lines+markers",
                line={"color": look.colour, "dash": look.dash, "width": 2},
                hovertemplate="%{y:.4f} with %{x} trials",
            )
        )
    none = _nothing_tuned(run, "No tuning trial has ended with a number yet.")
    figure = figure_of(lines, "" if table["best"].count() else none)
    figure.update_xaxes(title_text="trials k", dtick=1 if len(table) and table["k"].max() <= 20 else None)  # type: ignore[operator]
    figure.update_yaxes(title_text=f"expected {y_title(run, 'selection_value')}")
    return figure.update_layout(legend=legend(run.arms))
