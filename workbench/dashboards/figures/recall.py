"""Figures of accuracy on the examples of a task."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from workbench.dashboards import style
from workbench.dashboards.figures.parts import figure_of, legend, spanning, subplots
from workbench.dashboards.snapshot import Snapshot


def accuracy_row(run: Snapshot, titles: Sequence[str]) -> go.Figure:
    """Plots of accuracy side by side."""
    grid, _ = subplots(len(titles), len(titles), titles if any(titles) else ())
    grid.update_layout(template=style.TEMPLATE, height=380, legend=legend(run.arms))
    grid.update_yaxes(range=[-0.03, 1.05], tickformat=".0%")
    return grid.update_yaxes(title_text=spanning("right answers", "bars: smallest to largest run"), col=1)


def no_examples(x: str, y: str) -> go.Figure:
    """What is shown while no confirmation run with the wanted labels is done."""
    figure = figure_of([], "No confirmation run with such examples has ended.")
    figure.update_xaxes(title_text=style.label(x))
    return figure.update_yaxes(title_text=style.label(y))
