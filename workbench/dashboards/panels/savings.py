"""What each arm is worth in training."""

from __future__ import annotations

import math
from typing import Any, Literal

import plotly.graph_objects as go
import polars as pl

from workbench.dashboards import style
from workbench.dashboards.figures.parts import figure_of
from workbench.dashboards.panel import FigurePanel, PanelConfig, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.view import RunView

SYMBOLS = {"flops": "diamond", "tokens": "circle", "seconds": "square"}
LABELS = {"flops": "FLOPs", "tokens": "tokens", "seconds": "training time"}
TICKS = [0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.5, 2, 3, 5, 10]


@panels.register
class Savings(FigurePanel):
    """How much training is each arm worth at equal loss?"""

    class Config(PanelConfig):
        kind: Literal["savings"] = "savings"

    title = "Savings"
    order = 45
    report = {"What the difference is worth": {}}
    note = (
        "What the baseline needs for the loss that both reach, over what the arm needs: right of 1 the arm saves "
        "training. Read from the evaluations during training of runs with the same seed; bars are t-intervals over "
        "seeds. Runs whose schedule ended at that point would have a lower loss, so ratios of finished runs lie "
        "further from 1. An open marker is a bound."
    )

    def applies(self, run: RunView) -> bool:
        return len(run.arms) > 1

    def table(self, run: Snapshot) -> pl.DataFrame:
        """Columns: those of :func:`workbench.ablation.analysis.savings.savings`; no row while there is no verdict."""
        from workbench.ablation.analysis.savings import savings

        table = savings(run.unfiltered)
        return table.filter(pl.col("arm").is_in(run.arms)) if run.verdict() is not None else table.clear()

    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        """One row per arm and measure: the ratio on a log axis with its interval."""
        styles = style.arm_styles(run)
        arms = [arm for arm in run.arms if arm != run.baseline]
        rows = {(row["arm"], row["measure"]): row for row in table.iter_rows(named=True)}
        colours = [styles[arm].colour for arm in arms]
        traces = [
            trace
            for measure, offset in zip(SYMBOLS, (-0.25, 0.0, 0.25))
            for trace in _traces(rows, arms, measure, colours, offset)
        ]
        waiting = "The verdict follows when the confirmation runs of every arm have ended."
        missing = waiting if run.verdict() is None else "No evaluations during training to read the savings from."
        figure = figure_of(traces, "" if rows else missing)
        low, high = _range(table)
        against = f"“{style.label(run.baseline)}”"
        figure.update_xaxes(
            title_text=f"worth, as a multiple of the training of {against} (right of 1 is better)",
            type="log",
            range=[math.log10(low), math.log10(high)],
            tickvals=[tick for tick in TICKS if low <= tick <= high],
            ticktext=[f"{tick:g}×" for tick in TICKS if low <= tick <= high],
        )
        figure.add_vline(x=1, line={"color": style.INK, "width": 1.5}, layer="below")
        figure.update_yaxes(
            tickvals=list(range(len(arms))),
            ticktext=list(style.labels(arms).values()),
            title_text="arm",
            range=[len(arms) - 0.4, -0.6],
            showgrid=False,
            zeroline=False,
        )
        return figure.update_layout(height=max(280, 170 + 66 * len(arms)))


def _traces(rows: dict[Any, Any], arms: list[str], measure: str, colours: list[str], offset: float) -> list[Any]:
    """The ratios of one measure with their intervals, and the numbers beside them."""
    known = [y for y, arm in enumerate(arms) if (arm, measure) in rows]
    drawn, heights = [rows[arms[y], measure] for y in known], [y + offset for y in known]
    high, low = ([row["ratio"] if row[end] is None else row[end] for row in drawn] for end in ("high", "low"))
    points = go.Scatter(
        x=[row["ratio"] for row in drawn],
        y=heights,
        mode="markers",
        marker={
            "size": 11,
            "symbol": [SYMBOLS[measure] + "-open" * bool(row["bound"]) for row in drawn],
            "color": [colours[y] for y in known],
            "line": {"color": style.INK, "width": 1},
        },
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [end - row["ratio"] for end, row in zip(high, drawn)],
            "arrayminus": [row["ratio"] - end for end, row in zip(low, drawn)],
            "thickness": 2,
            "color": style.INK,
        },
        name=LABELS[measure],
        hovertemplate=f"%{{x:.3f}}× {LABELS[measure]}<extra></extra>",
    )
    numbers = go.Scatter(
        x=high,
        y=heights,
        mode="text",
        text=[f"   {row['bound']} {row['ratio']:.2f}×" for row in drawn],
        textposition="middle right",
        textfont={"size": 12},
        hoverinfo="skip",
        showlegend=False,
        cliponaxis=False,
    )
    return [points, numbers]


def _range(table: pl.DataFrame) -> tuple[float, float]:
    """Every interval and 1, with space for the numbers on the right."""
    ends = [1.0, *(value for name in ("ratio", "low", "high") for value in table[name].drop_nulls())]
    width = 1.1 * max(ends) / min(ends)
    return max(min(ends) / width**0.08, 1e-3), min(max(ends) * width**0.2, 1e3)
