"""Differences to the baseline."""

from __future__ import annotations

from typing import Any, Literal

import plotly.graph_objects as go
import polars as pl
from plotly.subplots import make_subplots

from workbench import formatting
from workbench.dashboards import style
from workbench.dashboards.figures.parts import figure_of
from workbench.dashboards.panel import Block, Figure, FigurePanel, PanelConfig, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.effects import effect_table, secondary_table
from workbench.dashboards.verdict import secondary_blocks, verdict_blocks

SECONDARY = (
    "Differences to the baseline; left of zero is better. Thick: interval of one comparison over seeds; thin: "
    "bootstrap over seeds and documents."
)


@panels.register
class Effects(FigurePanel):
    """How large is the paired difference of each arm to the baseline, and how certain?"""

    class Config(PanelConfig):
        kind: Literal["effects"] = "effects"

    title = "Effects"
    order = 40
    report = {"Differences to the baseline": {}}
    report_order = 1

    def blocks(self, run: Snapshot) -> list[Block]:
        figure = super().blocks(run) if len(effect_table(run)) else []
        return [*figure, *verdict_blocks(run), *self._secondary(run)]

    def _secondary(self, run: Snapshot) -> list[Block]:
        """The secondary metrics: a forest plot and a table; empty where none is declared."""
        blocks, table = secondary_blocks(run), secondary_table(run)
        if not len(table):
            return blocks
        arms = [arm for arm in run.arms if arm != run.baseline]
        parts = table.partition_by("metric", maintain_order=True)
        titles = [style.label(part["metric"][0], 100) for part in parts]
        rows = max(1, len(arms))
        height = 80 + len(parts) * (96 + 36 * rows)
        grid = make_subplots(len(parts), 1, subplot_titles=titles, vertical_spacing=68 / (height - 80))
        grid.update_layout(template=style.TEMPLATE, height=height, margin={"t": 36, "b": 44})
        styles, ticks = style.arm_styles(run), list(style.labels(arms).values())
        for number, part in enumerate(parts, 1):
            found = {row["arm"]: row for row in part.iter_rows(named=True)}
            for y, arm in enumerate(arms):
                for trace in _forest_row(found.get(arm), y, styles[arm].colour):
                    grid.add_trace(trace, row=number, col=1)
            grid.update_xaxes(
                zeroline=True,
                zerolinecolor=style.INK,
                zerolinewidth=1.5,
                zerolinelayer="below traces",
                range=_x_range({arm: row for arm, row in found.items() if arm in arms}),
                row=number,
            )
            grid.update_yaxes(
                tickvals=list(range(len(arms))),
                ticktext=ticks,
                range=[rows - 0.4, -0.6],
                showgrid=False,
                zeroline=False,
                row=number,
            )
        grid.update_annotations(font={"size": 12}, x=0, xanchor="left")
        return [blocks[0], Figure("secondary-effects", grid, table, SECONDARY), *blocks[1:]]

    def table(self, run: Snapshot) -> pl.DataFrame:
        return effect_table(run)

    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        """Forest plot: the t interval over seeds thick, the bootstrap over seeds and documents thin; dotted below them,
        the interval of a sequential design, which holds at all its looks together."""
        styles = style.arm_styles(run)
        rows = {row["arm"]: row for row in table.iter_rows(named=True)}
        arms = [arm for arm in run.arms if arm != run.baseline]
        traces = [trace for y, arm in enumerate(arms) for trace in _forest_row(rows.get(arm), y, styles[arm].colour)]
        missing = "" if rows else "The verdict follows when the confirmation runs of every arm have ended."
        figure = figure_of(traces, missing if arms else "There is no second arm to compare.")
        level = f"{100 * (1 - run.alpha):g} %"
        title = (
            f"difference to “{style.label(run.baseline)}” in {style.label(run.metric.unit)} (left of zero is better)"
        )
        bars = f"thick: {level} t interval over seeds · thin: {level} bootstrap over seeds and documents"
        if any(row["level"] is not None for row in rows.values()):
            bars += f"<br>dotted below: {level} interval over all looks of the declared design"
        figure.update_xaxes(
            title_text=f"{title}<br><span style='font-size:11px'>{bars}</span>",
            zeroline=bool(rows),
            zerolinecolor=style.INK,
            zerolinewidth=1.5,
            zerolinelayer="below traces",
            range=_x_range(rows),
        )
        figure.update_yaxes(
            tickvals=list(range(len(arms))),
            ticktext=list(style.labels(arms).values()),
            title_text="arm",
            range=[len(arms) - 0.4, -0.75],
            showgrid=False,
            zeroline=False,
        )
        return figure.update_layout(height=max(240, 150 + 42 * len(arms)))


def _forest_row(row: dict[str, Any] | None, y: int, colour: str) -> list[go.Scatter]:
    """The intervals, the marker and the words of one arm; empty traces while there is no verdict."""
    dotted = {"color": colour, "width": 2, "dash": "dot"}
    tick = {"symbol": "line-ns", "size": 9, "line": {"color": colour, "width": 2}}
    ends = [] if row is None or row["repeated_low"] is None else [row["repeated_low"], row["repeated_high"]]
    below = [y + 0.24] * len(ends)
    traces = [
        go.Scatter(x=ends, y=below, mode="lines+markers", line=dotted, marker=tick, hoverinfo="skip", showlegend=False)
    ]
    for low, high, width in (("bootstrap_low", "bootstrap_high", 1.5), ("low", "high", 7)):
        ends = [] if row is None or row[low] is None else [row[low], row[high]]
        line = {"color": colour, "width": width}
        traces.append(
            go.Scatter(x=ends, y=[y] * len(ends), mode="lines", line=line, hoverinfo="skip", showlegend=False)
        )
    difference = None if row is None else row["difference"]
    sentence = [] if row is None else [_wrap(row["sentence"])]
    is_known = difference is not None
    traces.append(
        go.Scatter(
            x=[difference] if is_known else [],
            y=[y] if is_known else [],
            mode="markers",
            hovertext=sentence if is_known else [],
            hoverinfo="text",
            marker={"color": colour, "size": 13, "symbol": "diamond", "line": {"color": style.INK, "width": 1}},
            showlegend=False,
        )
    )
    number = f"  {formatting.metric(difference, signed=True)}" if is_known else ""
    traces.append(
        go.Scatter(
            x=[] if row is None else [max(0.0, _ends(row)[1])],
            y=[] if row is None else [y],
            mode="text",
            text=[] if row is None else [f"  {row['verdict']}{number}"],
            textposition="middle right",
            showlegend=False,
            hovertext=sentence,
            hoverinfo="text",
            cliponaxis=False,
        )
    )
    return traces


def _ends(row: dict[str, Any]) -> tuple[float, float]:
    """The smallest and the largest number drawn for an arm; zeros where there is none."""
    names = ("difference", "low", "high", "bootstrap_low", "bootstrap_high", "repeated_low", "repeated_high")
    values = [row[name] for name in names]
    numbers = [value for value in values if value is not None] or [0.0]
    return min(numbers), max(numbers)


def _x_range(rows: dict[str, dict[str, Any]]) -> list[float]:
    """Every interval and zero, with space for the words on the right."""
    ends = [0.0, *(end for row in rows.values() for end in _ends(row))]
    low, high = min(ends), max(ends)
    width = (high - low) or 0.01
    return [low - 0.06 * width, high + 0.24 * width]


def _wrap(text: str, width: int = 90) -> str:
    lines: list[str] = []
    line = ""
    for word in style.label(text, 2_000).split(" "):
        if line and len(line) + len(word) > width:
            lines, line = [*lines, line], word
        else:
            line = f"{line} {word}".strip()
    return "<br>".join([*lines, line])
