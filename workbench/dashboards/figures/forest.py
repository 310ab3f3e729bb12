"""Differences to the baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from workbench.dashboards import style
from workbench.dashboards.figures.parts import figure_of
from workbench.dashboards.tables import effect_table

if TYPE_CHECKING:
    from workbench.dashboards.view import RunView


def effects(run: RunView) -> go.Figure:
    """Forest plot: difference of each arm to the baseline, its interval thick, the document bootstrap's thin."""
    table, styles = effect_table(run), style.looks(run)
    rows = {row["arm"]: row for row in table.iter_rows(named=True)}
    arms = [arm for arm in run.arms if arm != run.baseline]
    traces = []
    for place, arm in enumerate(arms):
        row, look = rows.get(arm), styles[arm]
        for low, high, width in (("bootstrap_low", "bootstrap_high", 1.5), ("low", "high", 7)):
            ends = [] if row is None or row[low] is None else [row[low], row[high]]
            traces.append(
                go.Scatter(
                    x=ends,
                    y=[place] * len(ends),
                    mode="lines",
                    line={"color": look.colour, "width": width},
                    hoverinfo="skip",
                    showlegend=False,
                )
            )
        known = row is not None and row["difference"] is not None
        size = f"  {style.bits(row['difference'], signed=True)}" if row is not None and known else ""
        said = "" if row is None else row["verdict"] + size
        traces.append(
            go.Scatter(
                x=[row["difference"]] if row is not None and known else [],
                y=[place] if known else [],
                mode="markers",
                hovertext=[_wrapped(row["sentence"])] if row is not None and known else [],
                hoverinfo="text",
                marker={
                    "color": look.colour,
                    "size": 13,
                    "symbol": "diamond",
                    "line": {"color": style.INK, "width": 1},
                },
                showlegend=False,
            )
        )
        traces.append(
            go.Scatter(
                x=[] if row is None else [_reach(row)[1]],
                y=[] if row is None else [place],
                mode="text",
                text=[] if row is None else [f"  {said}"],
                textposition="middle right",
                showlegend=False,
                hovertext=[] if row is None else [_wrapped(row["sentence"])],
                hoverinfo="text",
                cliponaxis=False,
            )
        )
    empty = (
        "There is no second arm to compare."
        if not arms
        else ("" if rows else "The verdict comes when every arm has its confirmation runs.")
    )
    figure = figure_of(traces, empty)
    level = f"{100 * (1 - run.alpha):g} %"
    figure.update_xaxes(
        title_text=f"difference to {style.label(run.baseline)} in {style.label(run.metric.unit)} (left of zero is better)<br>"
        f"<span style='font-size:11px'>thick: {level} t interval over seeds · "
        f"thin: {level} bootstrap over seeds and documents</span>",
        zeroline=bool(rows),
        zerolinecolor=style.INK,
        zerolinewidth=1.5,
        zerolinelayer="below traces",
        range=_span(rows),
    )
    figure.update_yaxes(
        tickvals=list(range(len(arms))),
        ticktext=[style.label(arm) for arm in arms],
        title_text="arm",
        range=[len(arms) - 0.4, -0.75],
        showgrid=False,
        zeroline=False,
    )
    figure.update_layout(height=max(240, 150 + 42 * len(arms)))
    return figure


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


def _wrapped(text: str, width: int = 90) -> str:
    lines: list[str] = []
    line = ""
    for word in style.label(text, 2_000).split(" "):
        if line and len(line) + len(word) > width:
            lines, line = [*lines, line], word
        else:
            line = f"{line} {word}".strip()
    return "<br>".join([*lines, line])
