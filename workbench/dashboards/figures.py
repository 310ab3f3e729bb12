"""The figures. Each draws exactly its table in :mod:`workbench.dashboards.tables`, and says so calmly when it is empty.

The number of traces of ``loss_curves`` and ``effects`` depends on the arms alone, so that a live view only exchanges
their data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from workbench.dashboards import style
from workbench.dashboards.tables import (
    FEWEST,
    Spent,
    XAxis,
    YAxis,
    best_of_table,
    cost_table,
    curve_table,
    diagnostic_table,
    effect_table,
    failure_table,
    frontier_table,
    importance_table,
    recall_table,
    scaling_laws,
    scaling_table,
    smoothed,
    state_table,
    thinned,
    tuning_table,
)
from workbench.results.store import ENDED
from workbench.results.tables import SingleRuns

if TYPE_CHECKING:
    from workbench.dashboards.tables import Run

X_TITLES = {"tokens": "training tokens", "flops": "training compute (FLOPs)", "seconds": "training time (s)"}

COST_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "parameters": ("parameters", style.count), "non_embedding": ("without embedding", style.count),
    "active": ("active", style.count), "flops_per_token": ("forward, per token", style.flops),
    "training_flops": ("training, one run", style.flops), "cache_bytes": ("cache, one sequence", style.size),
    "memory_bytes": ("training memory", style.size), "tokens": ("tokens, one run", style.count),
    "trials": ("runs", style.count), "seconds_per_trial": ("time, one run, estimate", style.duration),
    "measured_seconds": ("time, one run, measured", style.duration),
    "spent_seconds": ("time, all runs so far", style.duration),
    "solved": ("set by the budget", lambda text: text or "–"), "residual": ("off budget", style.share), "mismatch": ("not matched", lambda text: text or "–"),
}  # fmt: skip
"""Column of the cost table -> its heading and how its numbers are written."""


def loss_curves(
    run: Run | SingleRuns, x: XAxis = "tokens", y: YAxis = "loss", *, smoothing: float = 0.0, log_x: bool = False,
    log_y: bool = False, single: Collection[str] = (),
) -> go.Figure:  # fmt: skip
    """Mean over seeds as a line, smallest to largest as a band, one colour an arm.

    Args:
        run: the run.
        x: ``tokens``, ``flops`` or ``seconds``.
        y: ``loss`` or ``selection_value``.
        smoothing: as in :func:`curve_table`.
        log_x: whether the horizontal axis is logarithmic.
        log_y: whether the vertical one is.
        single: names of runs that are drawn as thin lines of their own, too.
    """
    table, styles = curve_table(run, x, y, smoothing=smoothing), style.looks(run)
    bands, lines = [], []
    for arm, look in styles.items():
        mine = table.filter(pl.col("arm") == arm)
        place, low, high = mine[x].to_list(), mine["low"].to_list(), mine["high"].to_list()
        tuning = bool(len(mine)) and mine["stage"][0] == "tuning"
        name = style.label(arm) + (" (tuning trials)" if tuning else "")
        group = f"arm {run.arms.index(arm)}"
        bands.append(go.Scatter(
            x=place + place[::-1], y=high + low[::-1], mode="lines", fill="toself",
            fillcolor=look.faint(0.16 if len(styles) <= 8 else 0.05),
            line={"width": 0}, hoverinfo="skip", showlegend=False, legendgroup=group, name=name,
        ))  # fmt: skip
        lines.append(go.Scatter(
            x=place, y=mine["mean"].to_list(), name=name, legendgroup=group, customdata=mine["runs"].to_list(),
            mode="lines+markers" if y == "selection_value" else "lines", marker={"size": 5},
            line={"color": look.colour, "dash": look.dash, "width": 2.2 if arm == run.baseline else 1.8},
            hovertemplate="%{y:.4f} at %{x:.4s} (%{customdata} runs)", showlegend=True,
        ))  # fmt: skip
    for held in run.lines() if single else ():
        if held.run in single and held.arm in styles:
            along, up = held.points.line(x, y)
            lines.append(go.Scattergl(
                x=thinned(along), y=thinned(smoothed(up, smoothing)), mode="lines", showlegend=False, name=style.label(held.run),
                line={"color": styles[held.arm].colour, "width": 1}, legendgroup=f"arm {run.arms.index(held.arm)}",
                hovertemplate="%{y:.4f} at %{x:.4s}",
            ))  # fmt: skip
    figure = _figure([*bands, *lines], "" if len(table) else "No training step has been recorded yet.")
    figure.update_xaxes(title_text=X_TITLES[x], type="log" if log_x else "linear")
    told = f", smoothed (weight {smoothing:g})" if smoothing else ""
    figure.update_yaxes(title_text=_y_title(run, y) + told, type="log" if log_y else "linear")
    figure.update_layout(legend=_legend(run.arms), hovermode="x unified" if len(styles) <= 8 else "closest")
    return figure


def effects(run: Run) -> go.Figure:
    """Forest plot: difference of each arm to the baseline, its interval thick, the document bootstrap's thin."""
    table, styles = effect_table(run), style.looks(run)
    rows = {row["arm"]: row for row in table.iter_rows(named=True)}
    arms = [arm for arm in run.arms if arm != run.baseline]
    traces = []
    for place, arm in enumerate(arms):
        row, look = rows.get(arm), styles[arm]
        for low, high, width in (("bootstrap_low", "bootstrap_high", 1.5), ("low", "high", 7)):
            ends = [] if row is None or row[low] is None else [row[low], row[high]]
            traces.append(go.Scatter(
                x=ends, y=[place] * len(ends), mode="lines", line={"color": look.colour, "width": width},
                hoverinfo="skip", showlegend=False,
            ))  # fmt: skip
        known = row is not None and row["difference"] is not None
        size = f"  {style.bits(row['difference'], signed=True)}" if row is not None and known else ""
        said = "" if row is None else row["verdict"] + size
        traces.append(go.Scatter(
            x=[row["difference"]] if row is not None and known else [], y=[place] if known else [], mode="markers",
            hovertext=[_wrapped(row["sentence"])] if row is not None and known else [], hoverinfo="text",
            marker={"color": look.colour, "size": 13, "symbol": "diamond", "line": {"color": style.INK, "width": 1}},
            showlegend=False,
        ))  # fmt: skip
        traces.append(go.Scatter(
            x=[] if row is None else [_reach(row)[1]], y=[] if row is None else [place], mode="text",
            text=[] if row is None else [f"  {said}"], textposition="middle right", showlegend=False,
            hovertext=[] if row is None else [_wrapped(row["sentence"])], hoverinfo="text", cliponaxis=False,
        ))  # fmt: skip
    empty = "There is no second arm to compare." if not arms else (
        "" if rows else "The verdict comes when every arm has its confirmation runs."
    )  # fmt: skip
    figure = _figure(traces, empty)
    level = f"{100 * (1 - _alpha(run)):g} %"
    figure.update_xaxes(
        title_text=f"difference to {style.label(run.baseline)} in {style.label(run.metric.unit)} (left of zero is better)<br>"
        f"<span style='font-size:11px'>thick: {level} t interval over seeds · "
        f"thin: {level} bootstrap over seeds and documents</span>",
        zeroline=bool(rows), zerolinecolor=style.INK, zerolinewidth=1.5, zerolinelayer="below traces",
        range=_span(rows),
    )  # fmt: skip
    figure.update_yaxes(
        tickvals=list(range(len(arms))), ticktext=[style.label(arm) for arm in arms], title_text="arm",
        range=[len(arms) - 0.4, -0.75], showgrid=False, zeroline=False,
    )  # fmt: skip
    figure.update_layout(height=max(240, 150 + 42 * len(arms)))
    return figure


def tuning(run: Run) -> go.Figure:
    """Selection loss of each trial over each hyperparameter; the chosen trial ringed, failed ones as crosses."""
    table, styles = tuning_table(run), style.looks(run)
    names = table["hyperparameter"].unique(maintain_order=True).to_list()
    if not names:
        figure = _figure([], "No tuning trial has begun, or nothing is tuned.")
        figure.update_xaxes(title_text="hyperparameter")
        figure.update_yaxes(title_text=_y_title(run, "selection_value"))
        return figure
    columns = min(len(names), 3)
    lines = math.ceil(len(names) / columns)
    grid = make_subplots(
        lines, columns, shared_yaxes=True, horizontal_spacing=0.05, vertical_spacing=min(0.2, 0.6 / lines)
    )
    grid.update_layout(template=style.TEMPLATE)
    known = table.filter(pl.col("selection_value").is_finite())["selection_value"]
    lowest, highest = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)  # type: ignore[arg-type]
    rail = highest + 0.12 * ((highest - lowest) or 1.0)  # where trials that failed without a number are put
    for index, name in enumerate(names):
        at = {"row": index // columns + 1, "col": index % columns + 1}
        here = table.filter(pl.col("hyperparameter") == name)
        words = here["word"].null_count() < len(here)
        for arm, look in styles.items():
            mine = here.filter(pl.col("arm") == arm)
            rows = list(mine.iter_rows(named=True))
            grid.add_scatter(
                x=[_value(row, words) for row in rows], name=style.label(arm), mode="markers",
                legendgroup=f"arm {run.arms.index(arm)}",
                y=[_height(row, rail) for row in rows],
                text=[_trial(row, run.metric.unit) for row in rows], hoverinfo="text", showlegend=index == 0, cliponaxis=False,
                marker={"symbol": [_symbol(row["status"]) for row in rows], "color": look.colour, "size": 9,
                        "opacity": 0.9, "line": {"width": 1.5, "color": look.colour}},
                **at,
            )  # fmt: skip
        chosen = [row for row in here.iter_rows(named=True) if row["selected"] and not _unknown(row["selection_value"])]
        grid.add_scatter(
            x=[_value(row, words) for row in chosen], y=[row["selection_value"] for row in chosen], name="chosen",
            mode="markers", hoverinfo="skip", showlegend=index == 0, cliponaxis=False,
            marker={"symbol": "circle-open", "size": 18, "color": [styles[row["arm"]].colour for row in chosen],
                    "line": {"width": 2}},
            **at,
        )  # fmt: skip
        values = [value for value in here["value"].to_list() if value is not None]
        log = not words and min(values) > 0 and max(values) / min(values) > 5
        grid.update_xaxes(title_text=style.label(name), type="category" if words else "log" if log else "linear", **at)
        if log:
            grid.update_xaxes(dtick="D2" if max(values) / min(values) < 50 else 1, tickformat="~g", **at)
    grid.update_yaxes(title_text=_y_title(run, "selection_value"), col=1)
    grid.update_layout(height=60 + 300 * lines, legend=_legend(run.arms))
    if not len(known) and not table["status"].is_in(ENDED).any():
        _say(grid, f"No trial has a selection {run.metric.name} yet.")
    return grid


def parallel(run: Run) -> go.Figure:
    """Every tuning trial as a line through its hyperparameters and its selection value, coloured by arm."""
    table, styles = tuning_table(run).filter(pl.col("selection_value").is_finite()), style.looks(run)
    names = table["hyperparameter"].unique(maintain_order=True).to_list()
    if not names:
        return _sentence("No tuning trial has a number yet, or nothing is tuned.")
    trials: dict[str, dict[str, Any]] = {}
    for row in table.iter_rows(named=True):
        value = row["value"] if row["value"] is not None else row["word"]
        trials.setdefault(row["run"], {"arm": row["arm"], "value": row["selection_value"]})[
            f" {row['hyperparameter']}"
        ] = value
    rows = list(trials.values())
    place = {arm: i for i, arm in enumerate(styles)}
    short = [style.label(arm, 16) for arm in place]
    dimensions = [{"label": "arm", "values": [place[row["arm"]] for row in rows], "tickvals": list(place.values()),
                   "ticktext": short, "range": [-0.2, max(len(place) - 0.8, 0.2)]}]  # fmt: skip
    dimensions += [_dimension(name, [row.get(f" {name}") for row in rows]) for name in names]
    dimensions.append({"label": style.label(run.metric.short, 22), "values": [row["value"] for row in rows]})
    last = max(len(place) - 1, 1)
    colours = [[i / last, look.colour] for i, look in enumerate(styles.values())]
    figure = _figure([go.Parcoords(
        dimensions=dimensions, labelside="top", labelfont={"size": 12}, tickfont={"size": 11}, rangefont={"size": 10},
        line={"color": [place[row["arm"]] for row in rows], "cmin": 0, "cmax": last,
              "colorscale": colours if len(colours) > 1 else [[0, colours[0][1]], [1, colours[0][1]]]},
    )])  # fmt: skip
    return figure.update_layout(margin={"l": 90, "r": 70, "t": 64, "b": 24}, height=420)


def _dimension(name: str, values: list[Any]) -> dict[str, Any]:
    label = style.label(name.rpartition(".")[2], 22)
    if any(not isinstance(value, int | float) for value in values):
        words = sorted({str(value) for value in values})
        return {"label": label, "values": [words.index(str(value)) for value in values],
                "tickvals": list(range(len(words))), "ticktext": [style.label(word, 16) for word in words]}  # fmt: skip
    if min(values) > 0 and max(values) / min(values) > 5:
        ticks = (
            sorted(set(values))
            if len(set(values)) <= 6
            else [min(values) * (max(values) / min(values)) ** (i / 4) for i in range(5)]
        )
        return {"label": label, "values": [math.log10(value) for value in values],
                "tickvals": [math.log10(tick) for tick in ticks], "ticktext": [f"{tick:.2g}" for tick in ticks]}  # fmt: skip
    return {"label": label, "values": values}


def importances(run: Run) -> go.Figure:
    """Share of each hyperparameter in what tuning changed, one bar an arm; error bars hold 90 % of a bootstrap."""
    table, styles = importance_table(run), style.looks(run)
    bars = []
    for arm, look in styles.items():
        mine = table.filter(pl.col("arm") == arm)
        value = mine["importance"]
        bars.append(go.Bar(
            y=[style.label(name) for name in mine["hyperparameter"]], x=value.to_list(), name=style.label(arm), orientation="h",
            marker={"color": look.colour}, customdata=mine["trials"].to_list(),
            error_x={"type": "data", "symmetric": False, "array": (mine["high"] - value).clip(0).to_list(),
                     "arrayminus": (value - mine["low"]).clip(0).to_list(), "thickness": 1, "color": style.INK},
            hovertemplate="%{x:.0%} of %{y} (%{customdata} trials)",
        ))  # fmt: skip
    figure = _figure(
        bars, "" if len(table) else f"Importances need {FEWEST} finished trials of an arm and something tuned."
    )
    figure.update_xaxes(title_text="importance (share)", tickformat=".0%", range=[0, 1.02])
    figure.update_yaxes(title_text="hyperparameter")
    return figure.update_layout(legend=_legend(run.arms), barmode="group")


def best_of(run: Run) -> go.Figure:
    """Selection value expected of the best of k trials: what an arm gains by more tuning."""
    table, styles = best_of_table(run), style.looks(run)
    lines = []
    for arm, look in styles.items():
        mine = table.filter(pl.col("arm") == arm)
        lines.append(go.Scatter(
            x=mine["k"].to_list(), y=mine["best"].to_list(), name=style.label(arm), mode="lines+markers",
            line={"color": look.colour, "dash": look.dash, "width": 2}, hovertemplate="%{y:.4f} with %{x} trials",
        ))  # fmt: skip
    figure = _figure(lines, "" if table["best"].count() else "No tuning trial has ended with a number yet.")
    figure.update_xaxes(title_text="trials k", dtick=1 if len(table) and table["k"].max() <= 20 else None)  # type: ignore[operator]
    figure.update_yaxes(title_text=f"expected {_y_title(run, 'selection_value')}")
    return figure.update_layout(legend=_legend(run.arms))


SPENT_TITLES = {
    "training_flops": "training compute of one run (FLOPs)", "non_embedding": "parameters without embedding",
    "active": "active parameters", "cache_bytes": "decode state of one sequence (bytes)",
    "measured_rate": "training speed (tokens a second)",
}  # fmt: skip


def frontier(run: Run, x: Spent = "training_flops") -> go.Figure:
    """Quality against what it costs: one point an arm with its range over seeds; the line joins arms that no other beats
    on both."""
    table, styles = frontier_table(run, x), style.looks(run)
    best = table.filter("best").sort(x)
    front = go.Scatter(
        x=best[x].to_list(), y=best["value"].to_list(), mode="lines", line={"color": style.INK, "width": 1.5, "dash": "dot"},
        name="Pareto front", hoverinfo="skip", showlegend=len(best) > 1,
    )  # fmt: skip
    points = []
    for arm, look in styles.items():
        mine = table.filter(pl.col("arm") == arm)
        tuning = bool(len(mine)) and mine["stage"][0] == "tuning"
        name = style.label(arm) + (" (tuning)" if tuning else "")
        points.append(go.Scatter(
            x=mine[x].to_list(), y=mine["value"].to_list(), name=name, mode="markers",
            marker={"color": look.colour, "size": 12, "symbol": "circle-open" if tuning else "circle", "line": {"width": 2}},
            error_y={"type": "data", "symmetric": False, "array": (mine["high"] - mine["value"]).to_list(),
                     "arrayminus": (mine["value"] - mine["low"]).to_list(), "thickness": 1.5, "color": look.colour},
            customdata=mine["runs"].to_list(), hovertemplate="%{y:.4f} at %{x:.4s} (%{customdata} runs)",
        ))  # fmt: skip
    empty = "" if len(table) else "No arm has both a number and this cost yet."
    figure = _figure([front, *points], empty)
    wide = len(table) > 1 and table[x].min() > 0 and table[x].max() / table[x].min() > 5  # type: ignore[operator]
    figure.update_xaxes(title_text=SPENT_TITLES[x], type="log" if wide else "linear")
    figure.update_yaxes(title_text=_quality_title(run))
    return figure.update_layout(legend=_legend(run.arms))


BEYOND = 3.0
"""How far past the largest size, as a factor, a fitted law is drawn."""


def scaling(run: Run, x: Literal["non_embedding", "training_flops"] = "non_embedding") -> go.Figure:
    """Quality of each arm over the sizes that have been run: this ablation and those beside it with arms of these names.

    Where there are sizes enough (:func:`scaling_laws`), the line is the arm's fitted law with its 95 % interval over seeds,
    carried on to :data:`BEYOND` times the largest size; where not, it joins the points.
    """
    table, styles = scaling_table(run, x), style.looks(run)
    laws = scaling_laws(table, x)
    bands, curves, points = [], [], []
    for arm, look in styles.items():
        mine, law = table.filter(pl.col("arm") == arm), laws.get(arm)
        group = {"name": style.label(arm), "legendgroup": f"arm {run.arms.index(arm)}"}
        places, reached = mine[x].to_list(), list(zip(mine["value"], mine["value"], mine["value"]))
        if law is not None:
            places = np.geomspace(min(places), BEYOND * max(places), 60).tolist()
            reached = [law.at(place) for place in places]
        value, low, high = ([row[i] for row in reached] for i in range(3))
        banded = law is not None and law.exponent_low is not None  # one seed a place tells nothing of the noise
        bands.append(go.Scatter(
            x=places + places[::-1] if banded else [], y=high + low[::-1] if banded else [], mode="lines", fill="toself",
            fillcolor=look.faint(0.16 if len(styles) <= 8 else 0.05), line={"width": 0}, hoverinfo="skip", showlegend=False,
            **group,
        ))  # fmt: skip
        curves.append(go.Scatter(
            x=places, y=value, mode="lines", line={"color": look.colour, "dash": look.dash, "width": 1.8}, hoverinfo="skip",
            showlegend=False, **group,
        ))  # fmt: skip
        points.append(go.Scatter(
            x=mine[x].to_list(), y=mine["value"].to_list(), mode="markers", marker={"size": 9, "color": look.colour},
            error_y={"type": "data", "symmetric": False, "array": (mine["high"] - mine["value"]).to_list(),
                     "arrayminus": (mine["value"] - mine["low"]).to_list(), "thickness": 1.5},
            customdata=[style.label(name) for name in mine["ablation"]], showlegend=True,
            hovertemplate="%{y:.4f} at %{x:.4s} (%{customdata})", **group,
        ))  # fmt: skip
    figure = _figure([*bands, *curves, *points], "" if len(table) else "No arm has a number yet.")
    figure.update_xaxes(title_text=SPENT_TITLES[x], type="log")
    figure.update_yaxes(title_text=_quality_title(run), type="log")
    return figure.update_layout(legend=_legend(run.arms))


UNITS = {
    "half_life": "tokens", "selected_distance": "tokens", "norm": "length", "violation": "share of an even load",
    "entropy": "nats", "gate": "share", "experts": "experts per token",
}  # fmt: skip
"""Part of a diagnostic's name -> its unit; others are plain numbers."""


def _diagnostic_title(name: str) -> str:
    unit = next((unit for part, unit in UNITS.items() if part in name), "value")
    return f"{style.label(name.replace('_', ' '))} ({unit})"


def diagnostic_curves(run: Run, name: str) -> go.Figure:
    """One diagnostic over training: the mean over layers as a line, smallest to largest layer as a band. Of a vector (the
    load of every expert) its largest number is drawn."""
    table, styles = diagnostic_table(run).filter(pl.col("name") == name), style.looks(run)
    vector = table["index"].count() > 0
    table = table.group_by("arm", "step", "layer").agg(pl.col("value").max())
    bands, lines = [], []
    for arm, look in styles.items():
        mine = table.filter(pl.col("arm") == arm).group_by("step").agg(
            mean=pl.col("value").mean(), low=pl.col("value").min(), high=pl.col("value").max()).sort("step")  # fmt: skip
        steps = mine["step"].to_list()
        bands.append(go.Scatter(
            x=steps + steps[::-1], y=mine["high"].to_list() + mine["low"].to_list()[::-1], mode="lines", fill="toself",
            fillcolor=look.faint(), line={"width": 0}, hoverinfo="skip", showlegend=False, legendgroup=f"arm {arm}",
        ))  # fmt: skip
        lines.append(go.Scatter(
            x=steps, y=mine["mean"].to_list(), name=style.label(arm), mode="lines+markers", marker={"size": 4},
            line={"color": look.colour, "dash": look.dash, "width": 2}, showlegend=bool(steps), legendgroup=f"arm {arm}",
            hovertemplate="%{y:.4g} at step %{x}",
        ))  # fmt: skip
    figure = _figure([*bands, *lines], "" if len(table) else "No run has stored this.")
    figure.update_xaxes(title_text="training step")
    figure.update_yaxes(title_text=f"largest {_diagnostic_title(name)}" if vector else _diagnostic_title(name))
    return figure.update_layout(legend=_legend(run.arms))


def diagnostic_map(run: Run, name: str) -> go.Figure:
    """One diagnostic as a heat map over layers and training steps, one an arm that has it; of a vector (the load of every
    expert) over layers and places in it, at the last step."""
    table = diagnostic_table(run).filter(pl.col("name") == name)
    across = "index" if table["index"].count() else "step"
    if across == "index":
        table = table.filter(pl.col("step") == pl.col("step").max().over("arm"))
    arms = [arm for arm in run.arms if arm in table["arm"]]
    if not arms:
        return _sentence("No run has stored this.")
    columns = min(len(arms), 4)
    lines = math.ceil(len(arms) / columns)
    grid = make_subplots(lines, columns, shared_yaxes=True, horizontal_spacing=0.03, vertical_spacing=min(0.25, 0.6 / lines),
                         subplot_titles=[style.label(arm) for arm in arms])  # fmt: skip
    grid.update_layout(template=style.TEMPLATE, height=100 + 240 * lines, margin={"t": 40})
    for index, arm in enumerate(arms):
        mine = table.filter(pl.col("arm") == arm)
        wide = mine.sort(across).pivot(across, index="layer", values="value").sort("layer")
        at = {"row": index // columns + 1, "col": index % columns + 1}
        grid.add_heatmap(
            x=wide.columns[1:], y=[str(layer) for layer in wide["layer"]], z=wide.drop("layer").to_numpy().tolist(),
            coloraxis="coloraxis", name=style.label(arm), hovertemplate=f"%{{z:.4g}} in layer %{{y}} at {across} %{{x}}", **at,
        )  # fmt: skip
        title = "training step" if across == "step" else "place in the vector (expert)"
        grid.update_xaxes(title_text=title, type="category", nticks=8, **at)
    grid.update_yaxes(type="category")
    grid.update_yaxes(title_text="layer", col=1)
    bar = {"title": {"text": _diagnostic_title(name).replace(" (", "<br>(")}}
    return grid.update_layout(coloraxis={"colorscale": "Cividis", "colorbar": bar})


def recall_state(run: Run) -> go.Figure:
    """Share of right answers against what decoding keeps, one point an arm and number of pairs."""
    table, styles = state_table(run), style.looks(run)
    if not len(table):
        return _nothing_recalled("decode state of one sequence (bytes)", "right answers")
    panels = table["pairs"].unique().sort().to_list()
    grid = make_subplots(1, len(panels), shared_yaxes=True, horizontal_spacing=0.03,
                         subplot_titles=[f"{value:g} pairs" for value in panels])  # fmt: skip
    grid.update_layout(template=style.TEMPLATE, height=380, legend={**_legend(run.arms), "y": 1.1}, margin={"t": 60})
    for column, value in enumerate(panels, start=1):
        for arm, look in styles.items():
            mine = table.filter((pl.col("arm") == arm) & (pl.col("pairs") == value))
            grid.add_scatter(
                x=mine["cache_bytes"].to_list(), y=mine["accuracy"].to_list(), name=style.label(arm), mode="markers",
                legendgroup=f"arm {arm}", showlegend=column == 1, row=1, col=column,
                marker={"color": look.colour, "size": 11}, hovertemplate="%{y:.1%} with %{x:.3s}B",
            )  # fmt: skip
        grid.update_xaxes(title_text="decode state (bytes)", type="log", row=1, col=column)
    grid.update_yaxes(range=[-0.03, 1.05], tickformat=".0%")
    return grid.update_yaxes(title_text="right answers", col=1)


def recall_curves(run: Run, x: str = "pairs", panel: str = "length") -> go.Figure:
    """Share of right answers along one label of the report examples, one panel a value of another; mean over seeds as a
    line, smallest to largest as error bars.

    Args:
        run: the run.
        x: label along the horizontal axis.
        panel: label that tells the panels apart.
    """
    table, styles = recall_table(run, x, panel), style.looks(run)
    if not len(table):
        return _nothing_recalled(x, "accuracy")
    panels = table[panel].unique().sort().to_list()
    grid = make_subplots(1, len(panels), shared_yaxes=True, horizontal_spacing=0.03,
                         subplot_titles=[f"{style.label(panel)} {value:g}" for value in panels])  # fmt: skip
    grid.update_layout(template=style.TEMPLATE, height=380, legend={**_legend(run.arms), "y": 1.1}, margin={"t": 60})
    for column, value in enumerate(panels, start=1):
        for arm, look in styles.items():
            mine = table.filter((pl.col("arm") == arm) & (pl.col(panel) == value))
            accuracy = mine["accuracy"]
            grid.add_scatter(
                x=mine[x].to_list(), y=accuracy.to_list(), name=style.label(arm), mode="lines+markers", row=1, col=column,
                legendgroup=f"arm {run.arms.index(arm)}", showlegend=column == 1, customdata=mine["runs"].to_list(),
                error_y={"type": "data", "symmetric": False, "array": (mine["high"] - accuracy).to_list(),
                         "arrayminus": (accuracy - mine["low"]).to_list(), "thickness": 1, "width": 3},
                line={"color": look.colour, "dash": look.dash, "width": 2},
                hovertemplate="%{y:.1%} at %{x:g} (%{customdata} runs)",
            )  # fmt: skip
        ticks = table.filter(pl.col(panel) == value)[x].unique().sort().to_list()
        grid.update_xaxes(title_text=style.label(x), type="log", tickvals=ticks, row=1, col=column)
    grid.update_yaxes(range=[-0.03, 1.05], tickformat=".0%")
    grid.update_yaxes(title_text="right answers", col=1)
    return grid


def recall_map(run: Run, x: str = "length", y: str = "depth") -> go.Figure:
    """Share of right answers over two labels of the report examples as a heat map, one an arm.

    Args:
        run: the run.
        x: label along the horizontal axis.
        y: label along the vertical axis, growing downwards (a depth).
    """
    table = recall_table(run, x, y)
    if not len(table):
        return _nothing_recalled(x, y)
    arms = [arm for arm in run.arms if arm in table["arm"]]
    columns = min(len(arms), 4)
    lines = math.ceil(len(arms) / columns)
    grid = make_subplots(lines, columns, shared_yaxes=True, horizontal_spacing=0.03, vertical_spacing=min(0.2, 0.6 / lines),
                         subplot_titles=[style.label(arm) for arm in arms])  # fmt: skip
    grid.update_layout(template=style.TEMPLATE, height=100 + 280 * lines, margin={"t": 40})
    across, down = ([f"{value:g}" for value in table[name].unique().sort()] for name in (x, y))
    for index, arm in enumerate(arms):
        rows = table.filter(pl.col("arm") == arm).iter_rows(named=True)
        held = {(f"{row[x]:g}", f"{row[y]:g}"): row["accuracy"] for row in rows}
        at = {"row": index // columns + 1, "col": index % columns + 1}
        grid.add_heatmap(
            x=across, y=down, z=[[held.get((a, d)) for a in across] for d in down], zmin=0, zmax=1, name=style.label(arm),
            coloraxis="coloraxis", texttemplate="%{z:.0%}", xgap=1, ygap=1,
            hovertemplate="%{z:.1%} at " + f"{style.label(x)} %{{x}}, {style.label(y)} %{{y}}", **at,
        )  # fmt: skip
        grid.update_xaxes(title_text=style.label(x), type="category", **at)
    grid.update_yaxes(type="category", autorange="reversed")
    grid.update_yaxes(title_text=style.label(y), col=1)
    bar = {"title": {"text": "right<br>answers"}, "tickformat": ".0%"}
    return grid.update_layout(coloraxis={"colorscale": "Cividis", "cmin": 0, "cmax": 1, "colorbar": bar})


def _nothing_recalled(x: str, y: str) -> go.Figure:
    figure = _figure([], "No confirmation run with such examples has ended.")
    figure.update_xaxes(title_text=style.label(x))
    return figure.update_yaxes(title_text=style.label(y))


def cost(run: Run) -> go.Figure:
    """What each arm costs, as a table with human numbers."""
    table = cost_table(run)
    if not len(table):
        return _sentence("No cost was worked out before launch.")
    heads, columns = ["arm"], [[style.label(arm) for arm in table["arm"]]]
    for name, (head, written) in COST_COLUMNS.items():
        if name in table.columns:
            heads.append(head)
            columns.append([style.label(written(value), 200) for value in table[name]])
    return _table(heads, columns)


def failures(run: Run) -> go.Figure:
    """Runs that failed, with the reason."""
    table = failure_table(run)
    if not len(table):
        return _sentence("No run has failed.")
    shown = ["arm", "stage", "seed", "status", "step", "reason"]
    columns = [["–" if v is None else style.label(str(v), 400) for v in table[name]] for name in shown]
    return _table(shown, columns)


# -- parts ---------------------------------------------------------------------------------------------------------


def _figure(traces: list[Any], empty: str = "") -> go.Figure:
    figure = go.Figure(traces)
    figure.update_layout(template=style.TEMPLATE, height=400)
    if empty:
        _say(figure, empty)
    return figure


def _say(figure: go.Figure, text: str) -> None:
    figure.add_annotation(text=text, x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False, font={"size": 15})


def _sentence(text: str) -> go.Figure:
    figure = _figure([], text)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure.update_layout(height=160)


def _table(heads: list[str], columns: list[list[str]]) -> go.Figure:
    plain = {"fill": {"color": "rgba(0,0,0,0)"}, "line": {"color": style.FAINT}, "align": "left"}
    widths = [min(max(len(text) for text in [head, *column]), 40) + 3 for head, column in zip(heads, columns)]
    figure = _figure([go.Table(
        header={"values": [f"<b>{head}</b>" for head in heads], **plain, "font": {"color": style.INK}},
        cells={"values": columns, "height": 26, **plain, "font": {"color": style.INK}}, columnwidth=widths,
    )])  # fmt: skip
    return figure.update_layout(height=min(120 + 40 * len(columns[0]), 640), margin={"l": 8, "r": 8, "t": 8, "b": 8})


def _legend(arms: list[str]) -> dict[str, Any]:
    """Above the plot for few arms; beside it, where it scrolls, for many."""
    if len(arms) <= 8:
        return {}
    return {"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top", "font": {"size": 11}}


def _y_title(run: Run | SingleRuns, y: str) -> str:
    if y == "loss":
        return "training loss (nats per token)"
    return style.label(f"selection {run.metric.name} ({run.metric.unit})")


def _quality_title(run: Run) -> str:
    return style.label(f"{run.metric.name} ({run.metric.unit})")


def _alpha(run: Run) -> float:
    return run.about["config"]["alpha"]


def _reach(row: dict[str, Any]) -> tuple[float, float]:
    """From the leftmost to the rightmost number that a row of the forest plot draws; zero where there is none."""
    drawn = [row[name] for name in ("difference", "low", "high", "bootstrap_low", "bootstrap_high")]
    drawn = [value for value in drawn if value is not None] or [0.0]
    return min(drawn), max(drawn)


def _span(rows: dict[str, dict[str, Any]]) -> list[float]:
    """The forest plot's horizontal range: every interval and zero, with room for the words on the right."""
    ends = [0.0, *(end for row in rows.values() for end in _reach(row))]
    low, high = min(ends), max(ends)
    width = (high - low) or 0.01
    return [low - 0.06 * width, high + 0.24 * width]


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


def _wrapped(text: str, width: int = 90) -> str:
    lines: list[str] = []
    line = ""
    for word in style.label(text, 2_000).split(" "):
        if line and len(line) + len(word) > width:
            lines, line = [*lines, line], word
        else:
            line = f"{line} {word}".strip()
    return "<br>".join([*lines, line])
