"""Quality over model sizes."""

from __future__ import annotations

import math
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import plotly.graph_objects as go
import polars as pl

from workbench.config import ConfigError
from workbench.dashboards import style
from workbench.dashboards.figures.parts import (
    COST_TITLES,
    arm_trace,
    around,
    band,
    error_bars,
    figure_of,
    legend,
    metric_title,
)
from workbench.dashboards.panel import Block, Figure, FigurePanel, PanelConfig, Text, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.quality import confirmed_values
from workbench.dashboards.templates import note, render
from workbench.results.tables import confirmed

if TYPE_CHECKING:
    from workbench.ablation.analysis.scaling import PairedLaw, ScalingLaw

Size = Literal["non_embedding", "training_flops"]
EXTRAPOLATION = 3.0
"""A law is drawn up to this factor beyond the largest size."""


@panels.register
class Scaling(FigurePanel):
    """How does the quality of each arm change with size?"""

    class Config(PanelConfig):
        kind: Literal["scaling"] = "scaling"
        size: Size = "non_embedding"

    settings: Config
    title = "Scaling"
    order = 70
    labels = {"non_embedding": "Parameters", "training_flops": "FLOPs"}
    note = (
        "A size is a finished ablation in this folder with the same arms, data, task and metric; its values are those "
        "of confirmation runs."
    )

    def table(self, run: Snapshot) -> pl.DataFrame:
        return scaling_table(run, self.settings.size)

    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        """The fitted law of each arm with its 95 % interval over seeds from four sizes on; dashed and without interval,
        as its floor is unknown, with three; else a line through the points."""
        size, styles = self.settings.size, style.arm_styles(run)
        laws = scaling_laws(table, size)
        bands, curves, points = [], [], []
        for arm, look in styles.items():
            rows, law, trace = table.filter(pl.col("arm") == arm), laws.get(arm), arm_trace(run, arm)
            sizes: list[float] = rows[size].to_list()
            values: list[Any] = [(value, value, value) for value in rows["value"]]
            if law is not None:
                sizes = np.geomspace(min(sizes), EXTRAPOLATION * max(sizes), 60).tolist()
                values = [law.at(x) for x in sizes]
            middle, low, high = ([row[i] for row in values] for i in range(3))
            has_interval = law is not None and law.exponent_low is not None  # one seed per size shows no noise
            bands.append(band(zip(sizes, low, high) if has_interval else (), look, len(styles), **trace))
            curves.append(
                go.Scatter(
                    x=sizes,
                    y=middle,
                    mode="lines",
                    line={"color": look.colour, "dash": _dash(law, look), "width": 1.8},
                    hoverinfo="skip",
                    showlegend=False,
                    **trace,
                )
            )
            points.append(
                go.Scatter(
                    x=rows[size].to_list(),
                    y=rows["value"].to_list(),
                    mode="markers",
                    marker={"size": 9, "color": look.colour, "symbol": look.symbol},
                    error_y=error_bars(rows, "value", thickness=1.5),
                    customdata=[style.label(name) for name in rows["ablation"]],
                    showlegend=True,
                    hovertemplate="%{y:.4f} at %{x:.4s} (%{customdata})",
                    **trace,
                )
            )
        figure = figure_of([*bands, *curves, *points], "" if len(table) else "No finished confirmation runs yet.")
        span = around(table[size])
        limits = None if span is None else [math.log10(end) for end in span]
        figure.update_xaxes(title_text=COST_TITLES[size], type="log", range=limits)
        figure.update_yaxes(title_text=metric_title(run), type="log")
        return figure.update_layout(legend=legend(run.arms), height=470)

    def blocks(self, run: Snapshot) -> list[Block]:
        table = self.table(run)
        figures: list[Block] = [Figure("scaling", self.figure(run, table), table, self.note)]
        differences = difference_table(run, self.settings.size)
        if differences["size"].n_unique() > 1:
            drawn = difference_figure(run, differences, COST_TITLES[self.settings.size])
            figures.append(Figure("differences", drawn, differences.drop("arm_values", "baseline_values"), DIFFERENCES))
        if left_out := scaling_series(run, self.settings.size).left_out:
            figures.append(Text("left-out", render("left_out.html", sentences=left_out)))
        laws = scaling_laws(table, self.settings.size)
        if not laws:
            missing = "A scaling law needs confirmation runs at 3 sizes or more, its interval at four."
            return [*figures, Text("laws", note(missing))]
        x = {"non_embedding": "parameters", "training_flops": "FLOPs"}[self.settings.size]
        html = render(
            "laws.html",
            laws={arm: law.describe(x, run.metric.unit) for arm, law in laws.items()},
            styles=style.arm_styles(run),
            extrapolation=f"{EXTRAPOLATION:g}",
        )
        return [*figures, Text("laws", html, title="Scaling laws")]


class JoinedAblation(NamedTuple):
    """An ablation that is a size of a series."""

    run: Snapshot
    arms: tuple[str, ...]
    """Its arms that belong to the series."""


class ScalingSeries(NamedTuple):
    """The sizes of the arms of a run."""

    ablations: list[JoinedAblation]
    left_out: tuple[str, ...]
    """Ablations and arms in the folder that are no size of the run's arms, and why."""


def scaling_series(run: Snapshot, size: Size = "non_embedding") -> ScalingSeries:
    """What belongs to the series of ``run`` in its folder of results: :func:`workbench.ablation.design.series`.
    Ablations that share no name of an arm with it are not mentioned."""
    from workbench.ablation.design import Candidate, series

    runs, candidates = [], []
    for folder in [run.folder, *(folder for folder in run.neighbours.folders() if folder != run.folder)]:
        try:
            ablation = run if folder == run.folder else run.neighbours.snapshot(folder)
            if not set(ablation.all_arms) & set(run.arms):
                continue
            sizes: dict[str, Any] = {row["arm"]: row.get(size) for row in ablation.cost().iter_rows(named=True)}
        except (ConfigError, KeyError, OSError, TypeError):  # of an earlier version, or deleted this moment
            continue
        known = {arm: float(sizes[arm]) for arm in run.arms if sizes.get(arm) is not None}
        if known or ablation is run:
            runs.append(ablation)
            candidates.append(Candidate(ablation.name, ablation.design, ablation.finished, known))
    if not candidates:
        return ScalingSeries([], ())
    joined = series(candidates[0], candidates[1:])
    return ScalingSeries([JoinedAblation(each, arms) for each, arms in zip(runs, joined.arms) if arms], joined.left_out)


def scaling_table(run: Snapshot, size: Size = "non_embedding") -> pl.DataFrame:
    """The arms of ``run`` at every size of :func:`scaling_series`, from finished confirmation runs.

    Columns: arm, ablation, ``size`` under its name, value, low, high, runs (as in ``confirmed_values``), values (the
    report value of every run), seeds (of these runs).
    """
    schema: dict[str, Any] = {
        "arm": pl.String,
        "ablation": pl.String,
        size: pl.Float64,
        "value": pl.Float64,
        "low": pl.Float64,
        "high": pl.Float64,
        "runs": pl.Int64,
        "values": pl.List(pl.Float64),
        "seeds": pl.List(pl.Int64),
    }
    rows = []
    for ablation, arms in scaling_series(run, size).ablations:
        sizes = {row["arm"]: row[size] for row in ablation.cost().iter_rows(named=True)}
        measured = confirmed(ablation.runs()).drop_nulls("report_value")
        for row in confirmed_values(ablation).iter_rows(named=True):
            if row["arm"] in arms:
                own = measured.filter(pl.col("arm") == row["arm"])
                rows.append(
                    (
                        row["arm"],
                        ablation.name,
                        float(sizes[row["arm"]]),
                        *(row[name] for name in ("value", "low", "high", "runs")),
                        *(own[name].to_list() for name in ("report_value", "seed")),
                    )
                )
    order = pl.col("arm").replace_strict({arm: i for i, arm in enumerate(run.arms)}, default=None)
    return pl.DataFrame(rows, schema=schema, orient="row").sort(order, size)


def scaling_laws(table: pl.DataFrame, size: str = "non_embedding") -> dict[str, ScalingLaw]:
    """The law of each arm of a :func:`scaling_table` with losses above zero at three distinct sizes or more:
    :func:`workbench.ablation.analysis.scaling.fit_scaling_law`."""
    values_of: dict[str, dict[float, list[float]]] = {}
    for arm, x, values in table.select("arm", size, "values").iter_rows():
        finite = [value for value in values if 0 < value < math.inf]
        if x > 0 and finite:
            values_of.setdefault(arm, {}).setdefault(x, []).extend(finite)
    laws = {}
    for arm, sizes in values_of.items():
        with suppress(ValueError):  # fewer than three sizes
            laws[arm] = _fit(tuple((x, tuple(values)) for x, values in sizes.items()))
    return laws


def _dash(law: ScalingLaw | None, look: style.ArmStyle) -> str:
    return "dash" if law is not None and not law.is_floor_known else look.dash


DIFFERENCES = (
    "Paired differences to the baseline with their t-intervals over seeds. From four sizes on, the difference of two "
    "laws; its band is the 95 % prediction interval, the choice of the model included (one floor, a floor each, no "
    "floor, as far as the differences agree with them; each size left out)."
)


def difference_table(run: Snapshot, size: Size = "non_embedding") -> pl.DataFrame:
    """The paired difference of each arm to the baseline at every size of :func:`scaling_table`, over the seeds that
    both confirmed.

    Columns: arm, ablation, size (the baseline's), difference, low, high (t-interval at level 1 − alpha; null with one
    seed), seeds, arm_values, baseline_values (report values of these seeds).
    """
    from workbench.ablation.verdict.statistics import paired_interval

    table, rows = scaling_table(run.unfiltered, size), []
    groups = table.partition_by("ablation", maintain_order=True)
    for group in groups:
        measured = {row["arm"]: row for row in group.iter_rows(named=True)}
        base = measured.get(run.baseline)
        for arm in run.arms:
            row = measured.get(arm)
            if arm == run.baseline or row is None or base is None:
                continue
            one, other = (dict(zip(each["seeds"], each["values"])) for each in (row, base))
            shared = [seed for seed in one if seed in other and math.isfinite(one[seed]) and math.isfinite(other[seed])]
            if not shared:
                continue
            interval = paired_interval([one[seed] - other[seed] for seed in shared], run.alpha)
            ends = (interval.low, interval.high) if interval.n > 1 else (None, None)
            values = [one[seed] for seed in shared], [other[seed] for seed in shared]
            rows.append((arm, row["ablation"], base[size], interval.mean, *ends, interval.n, *values))
    schema: dict[str, Any] = {
        "arm": pl.String,
        "ablation": pl.String,
        "size": pl.Float64,
        "difference": pl.Float64,
        "low": pl.Float64,
        "high": pl.Float64,
        "seeds": pl.Int64,
        "arm_values": pl.List(pl.Float64),
        "baseline_values": pl.List(pl.Float64),
    }
    order = pl.col("arm").replace_strict({arm: i for i, arm in enumerate(run.arms)}, default=None)
    return pl.DataFrame(rows, schema=schema, orient="row").sort(order, "size")


def difference_figure(run: Snapshot, table: pl.DataFrame, title: str) -> go.Figure:
    """Paired differences over sizes, with the law of each arm's difference where there is one.

    Args:
        run: the run.
        table: of :func:`difference_table`.
        title: of the horizontal axis.
    """
    bands, curves, points = [], [], []
    styles = style.arm_styles(run)
    for arm in run.arms:
        rows, look, trace = table.filter(pl.col("arm") == arm), styles[arm], arm_trace(run, arm)
        if arm == run.baseline or not len(rows):
            continue
        sizes: list[float] = rows["size"].to_list()
        law = _paired_law(rows)
        xs = sizes if law is None else np.geomspace(min(sizes), EXTRAPOLATION * max(sizes), 60).tolist()
        predicted = [] if law is None else [law.at(x) for x in xs]
        edges = [(x, at.low, at.high) for x, at in zip(xs, predicted) if at.low is not None]
        bands.append(band(edges, look, len(styles), **trace))
        curves.append(
            go.Scatter(
                x=xs,
                y=[at.value for at in predicted] if law is not None else rows["difference"].to_list(),
                mode="lines",
                line={"color": look.colour, "dash": look.dash if law is not None else "dot", "width": 1.8},
                hoverinfo="skip",
                showlegend=False,
                **trace,
            )
        )
        points.append(
            go.Scatter(
                x=sizes,
                y=rows["difference"].to_list(),
                mode="markers",
                marker={"size": 9, "color": look.colour, "symbol": look.symbol},
                error_y=error_bars(
                    rows.with_columns(pl.col("low", "high").fill_null(pl.col("difference"))), "difference"
                ),
                customdata=[style.label(name) for name in rows["ablation"]],
                hovertemplate="%{y:+.4f} at %{x:.4s} (%{customdata})",
                **trace,
            )
        )
    figure = figure_of([*bands, *curves, *points])
    figure.add_hline(y=0, line={"color": style.INK, "width": 1.5}, layer="below")
    figure.update_xaxes(title_text=title, type="log")
    unit = style.label(run.metric.unit)
    figure.update_yaxes(title_text=f"difference to “{style.label(run.baseline)}” ({unit})")
    return figure.update_layout(legend=legend(run.arms), height=420)


def _paired_law(rows: pl.DataFrame) -> PairedLaw | None:
    """The law of an arm's difference; None with fewer than four sizes, or a loss of zero."""
    sizes: dict[float, tuple[list[float], list[float]]] = {}
    for x, one, other in rows.select("size", "arm_values", "baseline_values").iter_rows():
        both = sizes.setdefault(x, ([], []))
        both[0].extend(one)
        both[1].extend(other)
    try:
        return _fit_paired(tuple((x, tuple(one), tuple(other)) for x, (one, other) in sizes.items()))
    except ValueError:
        return None


@lru_cache(maxsize=256)
def _fit_paired(sizes: tuple[tuple[float, tuple[float, ...], tuple[float, ...]], ...]) -> PairedLaw:
    """Cached, like :func:`_fit`."""
    from workbench.ablation.analysis.scaling import fit_paired_law

    return fit_paired_law({x: (one, other) for x, one, other in sizes})


@lru_cache(maxsize=256)
def _fit(sizes: tuple[tuple[float, tuple[float, ...]], ...]) -> ScalingLaw:
    """Cached: a live view asks repeatedly, and a fit takes hundreds of bootstrap replicates."""
    from workbench.ablation.analysis.scaling import fit_scaling_law

    return fit_scaling_law(dict(sizes))
