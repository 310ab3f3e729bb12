"""Scores of evaluation suites as a map of tasks and arms."""

from __future__ import annotations

from typing import Any, Literal

import plotly.graph_objects as go
import polars as pl
from pydantic import Field

from workbench.dashboards import style
from workbench.dashboards.figures.parts import figure_of, message
from workbench.dashboards.panel import FigurePanel, PanelConfig, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.suites import NO_SCORES, main_scores, number, suite_table, with_names
from workbench.dashboards.view import RunView

ALL = "all suites"
SEQUENTIAL = "Cividis"
DIVERGING = ["#b35806", "#e08214", "#fdb863", "#d8d8d8", "#92b4d8", "#4393c3", "#2166ac"]
"""Worse to better: orange and blue, which colour-blind readers can distinguish."""


@panels.register
class SuiteMap(FigurePanel):
    """How well does each arm do on each task of the suites?"""

    class Config(PanelConfig):
        kind: Literal["suite_map"] = "suite_map"
        suite: str = Field(ALL, title="suite")
        """Name of a suite."""
        shown: Literal["value", "difference"] = Field("value", title="shown")
        """Mean over seeds, or its paired difference to the baseline."""
        every_metric: bool = Field(False, title="every metric")
        """All metrics of a task, or the first one that its suite names."""

    settings: Config
    title = "tasks"
    tab = "Suites"
    order = 46
    labels = {"value": "value", "difference": "difference to the baseline"}
    report = {"Suites": {}}
    report_switch = "shown"
    note = (
        "Means over confirmation runs, in the published unit of each task; hover for intervals. Colours span the range "
        "of a rate; scores without a range are grey. Only declared secondary metrics are judged."
    )

    def applies(self, run: RunView) -> bool:
        return run.has_suites

    def choices(self, run: Snapshot) -> dict[str, list[str]]:
        return {"suite": [ALL, *run.scores()["suite"].unique().sort()]}

    def table(self, run: Snapshot) -> pl.DataFrame:
        """Rows of :func:`workbench.dashboards.tables.suites.suite_table`."""
        table = suite_table(run)
        if self.settings.suite != ALL:
            table = table.filter(pl.col("suite") == self.settings.suite)
        return table if self.settings.every_metric else main_scores(table)

    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        """A row per task, a column per arm. Colours go from worse to better: of a rate over its whole range; of a
        difference up to the largest one of its unit, or of all rates."""
        is_gap = self.settings.shown == "difference"
        arms = [arm for arm in run.arms if not (is_gap and arm == run.baseline)]
        if not len(table) or not arms:
            return message(NO_SCORES if arms else "There is no second arm to compare.")
        named = with_names(table)
        tasks = named.select("name", "metric").unique(maintain_order=True).rows()
        cells = {(row["name"], row["metric"], row["arm"]): row for row in named.iter_rows(named=True)}
        rows = [[cells.get((*task, arm)) for arm in arms] for task in tasks]
        figure = figure_of(
            [
                go.Heatmap(
                    x=list(style.labels(arms).values()),
                    y=list(style.labels(f"{name} · {metric}" for name, metric in tasks).values()),
                    z=[_gains(row, table) if is_gap else [_level(cell) for cell in row] for row in rows],
                    text=[[_cell(cell, is_gap) for cell in row] for row in rows],
                    hovertext=[[_hover(cell, run) for cell in row] for row in rows],
                    texttemplate="%{text}",
                    hoverinfo="text",
                    hoverlabel={"align": "left"},
                    coloraxis="coloraxis",
                    xgap=2,
                    ygap=2,
                )
            ]
        )
        bar = {"title": {"text": ""}, "tickvals": [-1, 0, 1] if is_gap else [0, 1], "thickness": 12}
        bar["ticktext"] = ["worse", "equal", "better"] if is_gap else ["worse", "better"]
        scale = {"colorscale": DIVERGING if is_gap else SEQUENTIAL, "cmin": -1 if is_gap else 0, "cmax": 1}
        figure.update_xaxes(side="top", type="category", showgrid=False, ticks="")
        figure.update_yaxes(type="category", autorange="reversed", showgrid=False, ticks="")
        height = 110 + max(2, len(tasks)) * 34
        return figure.update_layout(height=height, margin={"t": 48, "b": 24}, coloraxis={**scale, "colorbar": bar})


def _level(cell: dict[str, Any] | None) -> float | None:
    """Shade from 0, the worst value of a rate, to 1; in the middle for a score without a range."""
    if cell is None or cell["upper"] is None:
        return None if cell is None else 0.5
    share = float(cell["value"] / cell["upper"])
    return share if cell["higher_is_better"] else 1 - share


def _gains(row: list[dict[str, Any] | None], table: pl.DataFrame) -> list[float | None]:
    """Shades from −1 to 1, a share of the largest difference of the same unit: of all rates together."""
    first = next((cell for cell in row if cell is not None), None)
    if first is None:
        return [None] * len(row)
    alike = pl.col("upper").is_not_null() if first["upper"] is not None else pl.col("metric") == first["metric"]
    largest = table.filter(alike)["difference"].abs().max() or 1.0
    shades: list[float | None] = []
    for cell in row:
        gap = None if cell is None else cell["difference"]
        sign = 1 if cell is not None and cell["higher_is_better"] else -1
        shades.append(None if gap is None else sign * gap / largest)
    return shades


def _cell(cell: dict[str, Any] | None, is_gap: bool) -> str:
    """The number in a cell."""
    if cell is None:
        return ""
    return number(cell["difference" if is_gap else "value"], cell["places"], signed=is_gap)


def _hover(cell: dict[str, Any] | None, run: Snapshot) -> str:
    """A cell in words."""
    if cell is None:
        return ""
    value, low, high, gap, gap_low, gap_high = (
        number(cell[name], cell["places"], signed=name.startswith("difference"))
        for name in ("value", "low", "high", "difference", "difference_low", "difference_high")
    )
    level = f"{100 * (1 - run.alpha):g} %"
    lines = [f"<b>{style.label(cell['arm'])}</b>: {value} {style.label(cell['metric'])}"]
    if cell["low"] is not None:
        lines.append(f"{level} interval over seeds: {low} to {high}")
    if cell["difference"] is not None:
        interval = "" if cell["difference_low"] is None else f" ({gap_low} to {gap_high})"
        lines.append(f"difference to “{style.label(run.baseline)}”: {gap}{interval}")
    documents = "" if cell["documents"] is None else f", {cell['documents']:,} documents"
    seeds = f"{cell['seeds']} seed{'s' * (cell['seeds'] > 1)}"
    lines.append(f"{seeds}{documents}; {'higher' if cell['higher_is_better'] else 'lower'} is better")
    return "<br>".join(lines)
