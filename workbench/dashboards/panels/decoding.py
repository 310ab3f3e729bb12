"""What decoding policies read: quality against tokens kept, choices over steps, bytes and time of a step."""

from __future__ import annotations

from typing import Any, Literal

import plotly.graph_objects as go
import polars as pl
from pydantic import Field

from workbench.dashboards import style
from workbench.dashboards.figures.parts import arm_trace, error_bars, figure_of, legend, message, metric_title
from workbench.dashboards.panel import FigurePanel, PanelConfig, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.quality import confirmed_values
from workbench.dashboards.view import RunView
from workbench.results.scores import READS

NOTHING = "No confirmation run has decoded through a policy."
BYTES = {"bytes": "read on the device", "host_bytes": "copied from the host"}
PASSES = ("prompt", "step")


@panels.register
class Decoding(FigurePanel):
    """What does a decoding policy cost, and what does it read?"""

    class Config(PanelConfig):
        kind: Literal["decoding"] = "decoding"
        show: Literal["quality", "overlap", "hit_rate", "bytes", "milliseconds"] = Field("quality", title="show")
        """Quality against the tokens that a step keeps; the share of a step's choice that the step before made, or that
        was on the device, over steps; bytes of a step; milliseconds of a pass over prompts and of a step."""

    settings: Config
    title = "policies"
    tab = "Decoding"
    order = 49
    report = {"Decoding policies": {}, "Decoding: bytes of a step": {"show": "bytes"}}
    note = "Means over confirmation runs and layers; bars span the runs."
    labels = {"hit_rate": "hit rate", "bytes": "bytes of a step"}

    def applies(self, run: RunView) -> bool:
        return run.has_suites and READS in run.scores()["suite"]

    def table(self, run: Snapshot) -> pl.DataFrame:
        """Quality: arm, tokens (null where everything is read), value, low, high, runs. Over steps: arm, position,
        value. Bytes and milliseconds: arm, part, value."""
        show = self.settings.show
        scores = run.scores()
        reads = scores.filter((pl.col("suite") == READS) & (pl.col("split") != "selection"))
        whole = reads.filter(pl.col("document").is_null())
        if show == "quality":
            values = confirmed_values(run)
            tokens = (
                whole.filter(pl.col("metric") == "tokens").group_by("arm").agg(pl.col("value").mean().alias("tokens"))
            )
            return values.join(tokens, on="arm", how="left").select("arm", "tokens", "value", "low", "high", "runs")
        if show in ("overlap", "hit_rate"):
            steps = reads.filter((pl.col("metric") == show) & pl.col("document").is_not_null())
            if not len(steps):
                return pl.DataFrame(schema={"arm": pl.String, "position": pl.Int64, "value": pl.Float64})
            weighted = (pl.col("value") * pl.col("count")).sum() / pl.col("count").sum()
            return steps.group_by("arm", "position").agg(weighted.alias("value")).sort("arm", "position")
        names = list(BYTES) if show == "bytes" else [f"milliseconds per {name}" for name in PASSES]
        parts = whole.filter(pl.col("metric").is_in(names)).group_by("arm", "metric").agg(pl.col("value").mean())
        return parts.rename({"metric": "part"}).sort("arm", "part")

    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        if not len(table):
            return message(NOTHING)
        show = self.settings.show
        if show == "quality":
            return self._quality(run, table)
        if show in ("overlap", "hit_rate"):
            return self._steps(run, table)
        return self._bars(run, table)

    def _quality(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        points = []
        for arm, look in style.arm_styles(run).items():
            row = table.filter(pl.col("arm") == arm).drop_nulls("tokens")
            points.append(
                go.Scatter(
                    x=row["tokens"].to_list(),
                    y=row["value"].to_list(),
                    mode="markers",
                    marker={"color": look.colour, "size": 12, "symbol": look.symbol},
                    error_y=error_bars(row, "value", thickness=1.5, color=look.colour),
                    customdata=row["runs"].to_list(),
                    hovertemplate="%{y:.4f} with %{x:.0f} tokens (%{customdata} runs)",
                    **arm_trace(run, arm),
                )
            )
        figure = figure_of(points)
        for whole in table.filter(pl.col("tokens").is_null() & pl.col("value").is_not_null()).iter_rows(named=True):
            line = {"color": style.arm_styles(run)[whole["arm"]].colour, "dash": "dot", "width": 1.5}
            figure.add_hline(whole["value"], line=line, annotation_text=f"{whole['arm']} (everything)")
        figure.update_xaxes(title_text="tokens that a step attends to, per group of heads", rangemode="tozero")
        figure.update_yaxes(title_text=metric_title(run))
        return figure.update_layout(legend=legend(run.arms), height=470)

    def _steps(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        lines = []
        for arm, look in style.arm_styles(run).items():
            rows = table.filter(pl.col("arm") == arm)
            line = {"color": look.colour, "dash": look.dash, "width": 2}
            points: dict[str, Any] = {"x": rows["position"].to_list(), "y": rows["value"].to_list()}
            lines.append(go.Scatter(**points, mode="lines", line=line, **arm_trace(run, arm)))
        figure = figure_of(lines)
        figure.update_xaxes(title_text="step after the prompt")
        words = "chosen in the step before" if self.settings.show == "overlap" else "on the device before the step"
        figure.update_yaxes(title_text=f"share of the choice {words}", range=[-0.03, 1.03])
        return figure.update_layout(legend=legend(run.arms), height=470)

    def _bars(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        bars = []
        for part in table["part"].unique().sort():
            rows = table.filter(pl.col("part") == part)
            values = dict(zip(rows["arm"], rows["value"]))
            bars.append(go.Bar(x=list(run.arms), y=[values.get(arm) for arm in run.arms], name=BYTES.get(part, part)))
        figure = figure_of(bars)
        figure.update_yaxes(
            title_text="bytes of a layer's step, per sequence" if self.settings.show == "bytes" else "ms"
        )
        return figure.update_layout(barmode="group", height=470)
