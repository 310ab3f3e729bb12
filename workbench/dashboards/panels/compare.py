"""Arms of several ablations in one figure, and what differs between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import plotly.graph_objects as go
import polars as pl
from pydantic import Field

from workbench import formatting
from workbench.config import ConfigError, flatten, require
from workbench.dashboards import style
from workbench.dashboards.figures.parts import COST_TITLES, around, band, error_bars, figure_of, legend
from workbench.dashboards.panel import (
    Block,
    Cell,
    Column,
    Figure,
    FigurePanel,
    Grid,
    PanelConfig,
    Row,
    Text,
    panels,
)
from workbench.dashboards.panels.curves import X_TITLES, curve_table
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.quality import confirmed_values, cost_table
from workbench.dashboards.templates import note
from workbench.dashboards.view import RunView
from workbench.formatting import UNKNOWN
from workbench.results.views import ComparedX, ComparedY, View, delete_view, read_view, read_views, save_view

COSTS = {"tokens": "tokens", "flops": "training_flops", "seconds": "measured_seconds", "cache_bytes": "cache_bytes"}
"""Axis -> column of the cost table with its value at the end of training."""


@panels.register
class Compare(FigurePanel):
    """How do arms of several ablations compare, and what differs between them?"""

    class Config(PanelConfig):
        kind: Literal["compare"] = "compare"
        x: ComparedX = "tokens"
        y: ComparedY = "loss"
        """``loss``: nats per token on training data; ``selection_value``: the metric on the selection documents;
        ``report_value``: the metric on the report documents, at the end."""
        view: str = Field(UNKNOWN, title="view")
        """A saved view: arms and axes."""
        save_as: str = Field("", title="save as")
        """Name under which *Save view* keeps the drawn arms and the axes in the folder of results."""
        selected: tuple[str, ...] = ()
        """What is drawn, each as folder/arm. Default: the arms of the open ablation."""

    settings: Config
    title = "Compare"
    order = 67
    labels = {
        "tokens": "Tokens",
        "flops": "FLOPs",
        "seconds": "Time",
        "cache_bytes": "Cache",
        "loss": "Training loss",
        "selection_value": "Selection",
        "report_value": "Report",
    }
    actions = {
        "Save view": "Keep the drawn arms and the axes under the name in “save as”",
        "Delete view": "Remove the chosen view; results stay",
    }
    note = "One line per arm: the mean over its confirmation runs, the band from the smallest to the largest."

    def names(self, run: RunView) -> Mapping[str, str]:
        return {}  # arms of other ablations may have the name of an arm of the open one

    def applies(self, run: RunView) -> bool:
        return run.launched or not run.arms

    def choices(self, run: Snapshot) -> dict[str, list[str]]:
        return {"view": [UNKNOWN, *read_views(run.results)]}

    def follow(self, settings: Any, field: str, run: Snapshot) -> Any:
        if field != "view" or settings.view in ("", UNKNOWN):
            return settings
        view = read_view(run.results, settings.view)
        return settings.changed(x=view.x, y=view.y, selected=view.arms)

    def act(self, label: str, run: Snapshot) -> str:
        if label == "Delete view":
            name = self.settings.view
            delete_view(run.results, name)
            self.settings = self.settings.changed(view=UNKNOWN)
            return f"Removed the view {name}."
        name = self.settings.save_as.strip()
        require(name and name != UNKNOWN, "save as", got=name or "nothing", expected="a name for the view")
        settings = self._chosen(run)
        arms = [key for key, _, _ in _found(run, settings)]
        require(arms, "view", got="no arm", expected="at least one", do="Mark arms in the table (draw).")
        save_view(run.results, View(name=name, arms=tuple(arms), x=settings.x, y=settings.y))
        self.settings = self.settings.changed(save_as="", view=name)
        return f"Saved the view {name}: {len(arms)} arms."

    def _chosen(self, run: Snapshot) -> Any:
        """The settings, with what a saved view names where nothing else is marked."""
        settings = self.settings
        if settings.view in ("", UNKNOWN) or settings.selected:
            return settings
        view = read_view(run.results, settings.view)
        return settings.changed(x=view.x, y=view.y, selected=view.arms)

    def table(self, run: Snapshot) -> pl.DataFrame:
        settings = self._chosen(run)
        return compare_table(run, settings.x, settings.y, _found(run, settings))

    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        settings, found = self._chosen(run), _found(run, self._chosen(run))
        looks, names = style.styles_of([key for key, _, _ in found]), style.labels([key for key, _, _ in found])
        points = is_points(settings.x, settings.y)
        bands, lines = [], []
        for key, _, _ in found:
            curve, look = table.filter(pl.col("arm") == key), looks[key]
            x, group = curve[settings.x].to_list(), {"name": names[key], "legendgroup": key}
            if not points:
                bands.append(band(zip(x, curve["low"], curve["high"]), look, len(found), **group))
            lines.append(
                go.Scatter(
                    x=x,
                    y=curve["mean"].to_list(),
                    mode="markers" if points else "lines",
                    marker={"size": 11, "color": look.colour, "symbol": look.symbol},
                    line={"color": look.colour, "dash": look.dash, "width": 2},
                    error_y=error_bars(curve, "mean") if points else None,
                    customdata=curve["runs"].to_list(),
                    hovertemplate="%{y:.4f} at %{x:.4s} (%{customdata} runs)",
                    showlegend=True,
                    **group,
                )
            )
        empty = "Nothing of these arms was measured on both axes." if found else "Mark arms in the table below (draw)."
        figure = figure_of([*bands, *lines], "" if len(table) else empty)
        title = X_TITLES.get(settings.x) or COST_TITLES["cache_bytes"]
        units = {part.metric.unit: part.metric.name for _, part, _ in found}
        unit, name = next(iter(units.items()), ("", ""))
        loss = "training loss (nats per token)"
        split = "selection" if settings.y == "selection_value" else "report"
        figure.update_xaxes(title_text=title, minexponent=3, range=around(table[settings.x]) if points else None)
        figure.update_yaxes(title_text=loss if settings.y == "loss" else style.label(f"{split} {name} ({unit})"))
        return figure.update_layout(legend=legend([key for key, _, _ in found]), height=470)

    def blocks(self, run: Snapshot) -> list[Block]:
        run = run.unfiltered
        settings = self._chosen(run)
        found, table = _found(run, settings), self.table(run)
        how = "Bars span the runs." if is_points(settings.x, settings.y) else self.note
        missing = sorted({*settings.selected} - {key for key, _, _ in found})
        missing = [key for key in missing if "/" in key]
        left_out = [f"Not drawn, measured otherwise or deleted: {', '.join(missing)}."] if missing and found else []
        cautions = [Text(f"caution-{i}", note(line)) for i, line in enumerate([*left_out, *_cautions(found)])]
        blocks: list[Block] = [Figure("compare", self.figure(run, table), table, how), *cautions]
        if len(found) > 1:
            blocks.append(_difference(found))
        return [*blocks, _arms_grid(run, [key for key, _, _ in found])]


Found = list[tuple[str, Snapshot, str]]
"""Key, its ablation and the name of the arm in it."""


def _found(run: Snapshot, settings: Any) -> Found:
    """The arms that are drawn. Those of deleted ablations are left out, and those in another unit than the first."""
    keys = [key for key in settings.selected if "/" in key]
    if not keys and run.launched:
        keys = [f"{run.folder.name}/{arm}" for arm in run.all_arms]
    found: Found = []
    for key in keys:
        name, _, arm = key.partition("/")
        folder = run.results / name
        if folder not in run.neighbours.folders():
            continue
        try:
            part = run.neighbours.snapshot(folder)
        except ConfigError:
            continue
        if arm in part.all_arms and (settings.y == "loss" or not found or part.metric == found[0][1].metric):
            found.append((key, part, arm))
    return found


def is_points(x: str, y: str) -> bool:
    """Whether there is one value per arm, not a curve."""
    return x == "cache_bytes" or y == "report_value"


def compare_table(run: Snapshot, x: str, y: str, found: Found) -> pl.DataFrame:
    """Mean, smallest and largest ``y`` over the runs of each arm along ``x``; for the cache and for report values one
    row per arm, at the end of training.

    Columns: arm (folder/arm), ``x`` under its name, mean, low, high, runs.
    """
    schema = {
        "arm": pl.String,
        x: pl.Float64,
        "mean": pl.Float64,
        "low": pl.Float64,
        "high": pl.Float64,
        "runs": pl.Int64,
    }
    frames = []
    for key, part, arm in found:
        shown = part.filtered([arm])
        if y == "report_value":
            values = confirmed_values(shown).rename({"value": "mean"}).select("mean", "low", "high", "runs")
        else:
            along = "tokens" if x == "cache_bytes" else x
            values = curve_table(shown, along, y).select(along, "mean", "low", "high", "runs")
            values = values.tail(1).drop(along) if x == "cache_bytes" else values
        if x not in values.columns:
            costs = cost_table(shown).filter(pl.col("arm") == arm)
            at = costs[COSTS[x]][0] if len(costs) and COSTS[x] in costs.columns else None
            values = values.with_columns(pl.lit(at, pl.Float64).alias(x)).drop_nulls(x)
        frames.append(values.select(pl.lit(key).alias("arm"), x, "mean", "low", "high", "runs"))
    frames = [frame for frame in frames if len(frame)]
    return pl.concat([frame.cast(schema) for frame in frames]) if frames else pl.DataFrame(schema=schema)  # type: ignore[arg-type]


def _cautions(found: Found) -> list[str]:
    """What makes values of the drawn arms no values of one quantity, by :meth:`Design.unlike`."""
    if not found:
        return []
    first, part, arm = found[0]
    reasons: dict[str, list[str]] = {}
    for key, other, other_arm in found[1:]:
        if part.design is None or other.design is None:
            continue
        if unlike := part.design.unlike(arm, other.design, other_arm):
            reasons.setdefault(unlike, []).append(key)
    return [f"Not comparable with {first}: {', '.join(keys)} – {reason}." for reason, keys in reasons.items()]


def _difference(found: Found) -> Grid:
    """Fields in which the drawn arms differ."""
    from workbench.ablation.analysis.against import description
    from workbench.ablation.run import AblationRun

    runs = {part.folder: AblationRun(part.folder) for _, part, _ in found}
    fields = {key: flatten(description(runs[part.folder], arm)) for key, part, arm in found}
    paths = sorted({path for values in fields.values() for path in values})
    unset = "unset"
    differing = {
        path: [str(values.get(path, unset)) for values in fields.values()]
        for path in paths
        if len({str(values.get(path, unset)) for values in fields.values()}) > 1
    }
    looks = style.styles_of(list(fields))
    columns = [Column("field"), *(Column(key, colour=looks[key].colour) for key in fields)]
    rows = [Row(path, "", [path, *values]) for path, values in differing.items()]
    table = pl.DataFrame(
        [[path, *values] for path, values in differing.items()],
        schema=dict.fromkeys(["field", *fields], pl.String),
        orient="row",
    )
    empty = "The descriptions do not differ."
    return Grid("difference", columns, rows, table, "What differs", sortable=False, empty=empty)


def _arms_grid(run: Snapshot, drawn: Sequence[str]) -> Grid:
    """Every arm of every ablation in the folder."""
    looks = style.styles_of(drawn)
    columns = [
        Column("ablation"),
        Column("arm"),
        Column("value", numeric=True),
        Column("unit"),
        Column("seeds", numeric=True),
        Column("tokens", numeric=True),
        Column("training", numeric=True),
        Column("cache", numeric=True),
    ]
    rows, data = [], []
    for folder in run.neighbours.folders():
        try:
            part = run.neighbours.snapshot(folder)
            values = {row["arm"]: row for row in confirmed_values(part).iter_rows(named=True)}
            costs = {row["arm"]: row for row in cost_table(part).iter_rows(named=True)}
        except (ConfigError, KeyError, OSError, TypeError):  # listed under Ablations, with the reason
            continue
        for arm in part.all_arms:
            key, value, cost = f"{folder.name}/{arm}", values.get(arm, {}), costs.get(arm, {})
            numbers = [value.get("value"), value.get("runs"), *(cost.get(COSTS[x]) for x in ("tokens", "flops"))]
            numbers.append(cost.get("cache_bytes"))
            mean, runs, tokens, flops, cache = numbers
            cells: list[Cell | str] = [
                folder.name,
                part.names.get(arm, arm),
                Cell(formatting.metric(mean), mean),
                part.metric.short,
                Cell(formatting.count(runs), runs),
                Cell(formatting.count(tokens), tokens),
                Cell(formatting.flops(flops), flops),
                Cell(formatting.size(cache), cache),
            ]
            rows.append(Row(key, looks[key].colour if key in looks else "", cells))
            data.append([folder.name, arm, mean, part.metric.unit, runs, tokens, flops, cache])
    schema: dict[str, Any] = {
        "ablation": pl.String,
        "arm": pl.String,
        "value": pl.Float64,
        "unit": pl.String,
        "seeds": pl.Int64,
        "tokens": pl.Float64,
        "training_flops": pl.Float64,
        "cache_bytes": pl.Float64,
    }
    table = pl.DataFrame(data, schema=schema, orient="row", strict=False)
    return Grid("arms", columns, rows, table, "Arms", marks=("selected",), empty="No ablation in this folder.")


def saved_view(name: str, results: str | Path = "results") -> go.Figure:
    """The figure of a saved view, as the panel Compare draws it.

    Args:
        name: of the view.
        results: folder of all results.

    Raises:
        ConfigError: if there is no such view.
    """
    from workbench.dashboards.panel import figure
    from workbench.dashboards.view import ResultsFolder

    read_view(results, name)
    return figure(ResultsFolder(Path(results).resolve()), "compare", view=name)
