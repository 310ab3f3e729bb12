"""Loss over training."""

from __future__ import annotations

from typing import Literal

import numpy as np
import plotly.graph_objects as go
import polars as pl
from pydantic import Field, field_validator

from workbench.dashboards import style
from workbench.dashboards.figures.parts import arm_trace, band, figure_of, legend, spanning
from workbench.dashboards.panel import FigurePanel, PanelConfig, panels
from workbench.dashboards.series import SERIES, recorded, series_title
from workbench.dashboards.snapshot import Snapshot
from workbench.status import Stage

FEW = 40
"""Up to so many points are marked one by one."""
MAX_POINTS = 300
"""At most this many points per curve, however long the run."""

X_TITLES = {"tokens": "training tokens", "flops": "training compute (FLOPs)", "seconds": "training time (s)"}


@panels.register
class Curves(FigurePanel):
    """How does the loss fall over tokens, FLOPs or time?"""

    class Config(PanelConfig):
        kind: Literal["curves"] = "curves"
        x: Literal["tokens", "flops", "seconds"] = "tokens"
        y: str = Field("loss", title="curve of")
        """What runs have recorded: ``loss``, nats per token on training data; ``selection_value``, the metric on the
        selection documents; any other of :data:`workbench.dashboards.series.SERIES`."""
        smoothing: float = Field(0.0, ge=0, lt=1, title="smoothing")
        """Weight of the previous points in a running mean of each run."""
        log_x: bool = Field(False, title="log x")
        log_y: bool = Field(False, title="log y")
        selected: tuple[str, ...] = ()
        """Names of runs that are also drawn as thin lines of their own."""

        @field_validator("y")
        @classmethod
        def _known(cls, name: str) -> str:
            if name not in SERIES:
                raise ValueError(f"expected one of {', '.join(SERIES)}")
            return name

    settings: Config
    title = "Curves"
    order = 30
    labels = {
        "tokens": "Tokens",
        "flops": "FLOPs",
        "seconds": "Time",
        **{name: series.label for name, series in SERIES.items()},
    }
    report = {"Training": {}, "Selection": {"y": "selection_value"}}
    report_switch = "x"
    note = (
        "One line per arm: the mean over its confirmation runs; the band spans the smallest to the largest. Where its "
        "first run ends, a line goes on thin, as the mean of the runs that remain. An arm without confirmation runs "
        "shows its tuning trials. Other thin lines are runs marked “draw” in Runs."
    )

    def choices(self, run: Snapshot) -> dict[str, list[str]]:
        return {"y": recorded(run.unfiltered.lines()) or ["loss"]}

    def table(self, run: Snapshot) -> pl.DataFrame:
        return curve_table(run, self.settings.x, self.settings.y, self.settings.smoothing)

    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        settings, styles = self.settings, style.arm_styles(run)
        bands, rests, lines = [], [], []
        for arm, look in styles.items():
            curve = table.filter(pl.col("arm") == arm)
            curve, rest = curve.filter("whole"), curve.filter(~pl.col("whole"))
            is_tuning = bool(len(curve)) and curve["stage"][0] == Stage.TUNING
            trace = arm_trace(run, arm, " (tuning trials)" if is_tuning else "")
            x = curve[settings.x].to_list()
            on = pl.concat([curve.tail(1), rest]) if len(rest) else rest
            rests.append(
                go.Scatter(
                    x=on[settings.x].to_list(),
                    y=on["mean"].to_list(),
                    customdata=on["runs"].to_list(),
                    mode="lines",
                    line={"color": look.colour, "dash": look.dash, "width": 0.8},
                    hovertemplate="%{y:.4g} at %{x:.4s} (%{customdata} runs)",
                    showlegend=False,
                    **trace,
                )
            )
            bands.append(band(zip(x, curve["low"], curve["high"]), look, len(styles), **trace))
            lines.append(
                go.Scatter(
                    x=x,
                    y=curve["mean"].to_list(),
                    customdata=curve["runs"].to_list(),
                    mode="lines+markers" if len(x) <= FEW else "lines",
                    marker={"size": 5},
                    line={"color": look.colour, "dash": look.dash, "width": 2.2 if arm == run.baseline else 1.8},
                    hovertemplate="%{y:.4g} at %{x:.4s} (%{customdata} runs)",
                    showlegend=True,
                    **trace,
                )
            )
        for line in run.lines() if settings.selected else ():
            if line.run in settings.selected and line.arm in styles:
                x_values, y_values = line.points.line(settings.x, settings.y)
                lines.append(
                    go.Scattergl(
                        x=_thin(x_values),
                        y=_thin(smooth(y_values, settings.smoothing)),
                        mode="lines",
                        showlegend=False,
                        line={"color": styles[line.arm].colour, "width": 1},
                        hovertemplate="%{y:.4g} at %{x:.4s}",
                        **{**arm_trace(run, line.arm), "name": style.label(line.run)},
                    )
                )
        figure = figure_of([*bands, *rests, *lines], "" if len(table) else self._missing(run))
        figure.update_xaxes(title_text=X_TITLES[settings.x], type="log" if settings.log_x else "linear")
        smoothing = f", smoothed (weight {settings.smoothing:g})" if settings.smoothing else ""
        title = series_title(run, settings.y) + smoothing
        title = spanning(title, "bands: smallest to largest run")
        figure.update_yaxes(title_text=title, type="log" if settings.log_y else "linear")
        hover = "x unified" if len(styles) <= 8 else "closest"
        return figure.update_layout(legend=legend(run.arms), hovermode=hover, height=470)

    def _missing(self, run: Snapshot) -> str:
        """Why there is nothing to draw."""
        if run.archived and not run.unfiltered.lines():
            return "This archive was written before archives kept curves."
        if run.unfiltered.lines() and self.settings.y not in recorded(run.unfiltered.lines()):
            return f"These runs did not record this: {SERIES[self.settings.y].label}."
        return "This ablation has no training curves." if run.finished else "No training step has been logged yet."


def curve_table(run: Snapshot, x: str, y: str, smoothing: float = 0.0) -> pl.DataFrame:
    """Mean, smallest and largest ``y`` over the runs of each arm, along ``x``.

    Columns: arm; stage (``tuning`` where an arm has no confirmation points yet: its trials, with different
    hyperparameters, are shown instead); ``x`` under its name; mean, low, high; runs (how many reach this point); whole
    (whether none of the arm's runs has ended before this point). Logged
    points are used as they are where they are few, else interpolated linearly on at most 300 points.
    """
    schema = {
        "arm": pl.String,
        "stage": pl.String,
        x: pl.Float64,
        "mean": pl.Float64,
        "low": pl.Float64,
        "high": pl.Float64,
        "runs": pl.Int64,
        "whole": pl.Boolean,
    }
    curves: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    for line in run.lines():
        x_values, y_values = line.points.line(x, y)
        if len(x_values):
            curves.setdefault((line.arm, line.stage), []).append((x_values, smooth(y_values, smoothing)))
    frames = []
    for arm in run.arms:
        stage = Stage.CONFIRMATION if (arm, Stage.CONFIRMATION) in curves else Stage.TUNING
        if (arm, stage) in curves:
            statistics = _over_runs(curves[arm, stage], x)
            frames.append(statistics.select(pl.lit(arm).alias("arm"), pl.lit(str(stage)).alias("stage"), pl.all()))
    return pl.concat(frames).cast(schema) if frames else pl.DataFrame(schema=schema)  # type: ignore[arg-type]


def smooth(values: np.ndarray, weight: float) -> np.ndarray:
    """Running mean in which each value counts ``weight`` times as much as the one after it."""
    if not weight:
        return values
    from scipy.signal import lfilter

    return lfilter([1 - weight], [1, -weight], values) / (1 - weight ** np.arange(1, len(values) + 1))


def _thin(values: np.ndarray) -> np.ndarray:
    """At most :data:`MAX_POINTS` of the values, evenly spaced, with the first and the last."""
    if len(values) <= MAX_POINTS:
        return values
    return values[np.linspace(0, len(values) - 1, MAX_POINTS).round().astype(int)]


def _over_runs(curves: list[tuple[np.ndarray, np.ndarray]], x: str) -> pl.DataFrame:
    """Mean, smallest and largest value of several curves on a common grid."""
    grid = np.linspace(min(xs[0] for xs, _ in curves), max(xs[-1] for xs, _ in curves), MAX_POINTS)
    if all(len(xs) <= MAX_POINTS for xs, _ in curves):
        points = np.unique(np.concatenate([xs for xs, _ in curves]))
        grid = points if len(points) <= MAX_POINTS else grid
    values = np.stack([np.interp(grid, xs, ys, left=np.nan, right=np.nan) for xs, ys in curves])
    runs = np.isfinite(values).sum(0)
    grid, values, runs = grid[runs > 0], values[:, runs > 0], runs[runs > 0]
    return pl.DataFrame(
        {
            x: grid,
            "mean": np.nanmean(values, 0),
            "low": np.nanmin(values, 0),
            "high": np.nanmax(values, 0),
            "runs": runs,
            "whole": grid <= min(xs[-1] for xs, _ in curves),
        }
    )
