"""The verdict, before everything else."""

from __future__ import annotations

from typing import Any, Literal

import plotly.graph_objects as go
import polars as pl

from workbench import formatting
from workbench.dashboards import style
from workbench.dashboards.figures.parts import figure_of
from workbench.dashboards.names import named_verdict
from workbench.dashboards.panel import Block, Figure, FigurePanel, PanelConfig, Text, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.effects import effect_table
from workbench.dashboards.templates import note, render
from workbench.dashboards.view import RunView

WAITING = "The verdict follows when the confirmation runs of every arm have ended."

NOTE = (
    "A bar agrees with the word about its arm. One that ends at zero belongs to an arm that is certainly on that side; "
    "the intervals of single comparisons are in Effects."
)


@panels.register
class VerdictPanel(FigurePanel):
    """Which arm is better, by how much, how certain is it, and what should be run next?"""

    class Config(PanelConfig):
        kind: Literal["verdict"] = "verdict"

    title = "Verdict"
    order = 5
    report = {"Verdict": {}}
    report_order = 0

    def applies(self, run: RunView) -> bool:
        return bool(run.arms) and run.launched

    def blocks(self, run: Snapshot) -> list[Block]:
        verdict = run.verdict()
        summary = None if verdict is None else run.summary(named_verdict(verdict, run.names))
        if verdict is None or summary is None:
            return [Text("headline", note(WAITING))]
        table = self.table(run)
        looks = {run.names.get(arm, arm): look for arm, look in style.arm_styles(run.unfiltered).items()}
        head = render("verdict_head.html", summary=summary, styles=looks)
        blocks: list[Block] = [Text("headline", head)]
        if table["difference"].count():
            blocks.append(Figure("verdict", self.figure(run, table), table, NOTE))
        if summary.steps:
            blocks.append(Text("steps", render("verdict_steps.html", steps=summary.steps), "What to do next"))
        renamed = [f"{arm} is shown as {name}." for arm, name in run.names.items() if name != arm]
        declared = [*renamed, *verdict.declared, *([verdict.subject.sentence()] if verdict.subject else [])]
        sentences = [row.sentence for row in verdict.rows]
        details = render("verdict_details.html", sentences=sentences, declared=declared)
        return [*blocks, Text("details", details)]

    def table(self, run: Snapshot) -> pl.DataFrame:
        return effect_table(run)

    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        """Forest plot of the interval that decides, with the equivalence margin as a band."""
        from workbench.ablation.verdict.summary import deciding_interval

        verdict, styles = run.verdict(), style.arm_styles(run)
        found = {row.arm: row for row in verdict.rows} if verdict else {}
        arms = [arm for arm in run.arms if arm != run.baseline]
        margin = verdict.margin if verdict else None
        traces: list[Any] = []
        ends = [0.0, *([-margin, margin] if margin else [])]
        for y, arm in enumerate(arms):
            row = found.get(arm)
            if row is None or row.difference is None:
                continue
            low, high = (row.difference if end is None else end for end in deciding_interval(row))
            ends += [low, high, row.difference]
            line = {"color": styles[arm].colour, "width": 7}
            fixed: dict[str, Any] = {"hoverinfo": "skip", "showlegend": False}
            traces.append(go.Scatter(x=[low, high], y=[y, y], mode="lines", line=line, **fixed))
            marker = {"color": styles[arm].colour, "size": 13, "symbol": "diamond"}
            marker["line"] = {"color": style.INK, "width": 1}
            traces.append(go.Scatter(x=[row.difference], y=[y], mode="markers", marker=marker, **fixed))
            text = f"  {row.verdict}  {formatting.metric(row.difference, signed=True)}"
            words = {"mode": "text", "text": [text], "textposition": "middle right", "cliponaxis": False}
            traces.append(go.Scatter(x=[max(high, row.difference, 0.0)], y=[y], **words, **fixed))
        figure = figure_of(traces, "" if traces else WAITING if arms else "There is no second arm to compare.")
        if margin and traces:
            figure.add_vrect(-margin, margin, fillcolor="rgba(128,128,128,0.18)", line_width=0, layer="below")
        width = (max(ends) - min(ends)) or 0.01
        band = f" · grey band: declared margin, ±{margin:g}" if margin else ""
        family = len(verdict.pairs) or len(arms) if verdict else 0
        over = f" that hold together over {family} comparisons" if family > 1 else ""
        bars = f"bars: {100 * (1 - run.alpha):g} % intervals{over}{band}"
        title = (
            f"difference to “{style.label(run.baseline)}” in {style.label(run.metric.unit)} (left of zero is better)"
        )
        figure.update_xaxes(
            title_text=f"{title}<br><span style='font-size:11px'>{bars}</span>",
            zeroline=bool(traces),
            zerolinecolor=style.INK,
            zerolinewidth=1.5,
            zerolinelayer="below traces",
            range=[min(ends) - 0.06 * width, max(ends) + 0.26 * width],
        )
        figure.update_yaxes(
            tickvals=list(range(len(arms))),
            ticktext=list(style.labels(arms).values()),
            title_text="arm",
            range=[len(arms) - 0.4, -0.6],
            showgrid=False,
            zeroline=False,
        )
        return figure.update_layout(height=max(200, 120 + 38 * len(arms)))
