"""What the ranks of runs on several devices do at the same time, and the budgets of their layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import plotly.graph_objects as go
import polars as pl

from workbench.dashboards import style
from workbench.dashboards.figures.parts import message, subplots
from workbench.dashboards.panel import Block, Cell, Column, Figure, FigurePanel, Grid, PanelConfig, Row, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.diagnostics import diagnostic_table
from workbench.dashboards.view import RunView
from workbench.formatting import UNKNOWN
from workbench.results.store import RunFolder
from workbench.status import Stage

BUDGET = "budget"
"""Name of the diagnostic: blocks per query of a layer."""
WAITING = "#d0d0d0"
"""Colour of the time in which a rank waits."""
TIMELINE_SCHEMA: dict[str, Any] = {
    "arm": pl.String,
    "run": pl.String,
    "step": pl.Int64,
    "rank": pl.Int64,
    "part": pl.String,
    "start": pl.Float64,
    "seconds": pl.Float64,
}
MEASURES = ("step_seconds", "rank_imbalance", "waiting", "budget", "coverage_lost")
"""Columns of logged points that the table by arm shows, medians over points and runs."""
COVERAGE = "coverage"
"""Name of the diagnostic: share of a layer's selection scores in the blocks that it attends. Runs without a tuner have
it as well."""


@panels.register
class Ranks(FigurePanel):
    """Do the ranks of a run work equally long, and how many blocks do the layers attend?"""

    class Config(PanelConfig):
        kind: Literal["ranks"] = "ranks"

    title = "Ranks"
    order = 87
    report = {"Ranks": {}}
    note = (
        "The newest logged step of one run of each arm: micro-batches of every rank one after another, and in grey the "
        "time for which it waits for the others. Real times: measured with all ranks running at once. Ranks that share "
        "the weights wait inside their micro-batches."
    )

    def applies(self, run: RunView) -> bool:
        last = [line.points.last for line in run.lines()]
        return any(points.get(name) is not None for points in last for name in ("step_seconds", "budget"))

    def table(self, run: Snapshot) -> pl.DataFrame:
        return timeline_table(run)

    def figure(self, run: Snapshot, table: pl.DataFrame) -> go.Figure:
        arms = [arm for arm in run.arms if arm in table["arm"]]
        if not arms:
            return message("No run of this ablation was trained on several devices.")
        styles = style.arm_styles(run)
        grid, positions = subplots(len(arms), columns=2, titles=arms, gap=0.06)
        for arm, position in zip(arms, positions):
            for row in table.filter(pl.col("arm") == arm).iter_rows(named=True):
                waits = row["part"] == "waiting"
                grid.add_bar(
                    x=[row["seconds"]],
                    y=[f"rank {row['rank']}"],
                    base=[row["start"]],
                    orientation="h",
                    marker={"color": WAITING if waits else styles[arm].colour, "line": {"color": "white", "width": 1}},
                    name=row["part"],
                    showlegend=False,
                    hovertemplate=f"{row['part']}: %{{x:.4g}} s from %{{base:.4g}} s",
                    **position,
                )
        end = (table["start"] + table["seconds"]).to_numpy().max()
        grid.update_xaxes(title_text="seconds of the step", range=[0, float(end)])
        grid.update_yaxes(type="category", autorange="reversed")
        ranks = table["rank"].n_unique()
        height = 90 + (90 + 28 * ranks) * positions[-1]["row"]
        return grid.update_layout(barmode="overlay", height=height, margin={"t": 40})

    def blocks(self, run: Snapshot) -> list[Block]:
        if run.archived:  # without steps in detail, and without diagnostics
            return [times_grid(run)]
        budgets = budget_table(run)
        note = "Mean over an arm's runs and the micro-batches of a step."
        return [
            *super().blocks(run),
            times_grid(run),
            Figure("budgets", budget_figure(run, budgets), budgets, note),
        ]


def timeline_table(run: Snapshot) -> pl.DataFrame:
    """What every rank did in the newest logged step of one run of each arm, a confirmation run where there is one.

    Columns: arm, run, step, rank, part ("micro-batch 1", …, "waiting"), start and seconds (from the step's start).
    """
    rows: list[dict[str, Any]] = []
    runs = run.runs().sort(pl.col("stage") != Stage.CONFIRMATION, maintain_order=True)
    for arm in run.arms:
        for name, folder in runs.filter(pl.col("arm") == arm).select("run", "folder").iter_rows():
            logged = [line for line in RunFolder(Path(folder)).metrics() if line.get("ranks")] if folder else []
            if not logged:
                continue
            step, times = logged[-1]["step"], logged[-1]["ranks"]
            for rank, micro_batches in enumerate(times["micro_batches"]):
                parts = [(f"micro-batch {number}", seconds) for number, seconds in enumerate(micro_batches, 1)]
                if "waiting" in times:
                    parts.append(("waiting", times["waiting"][rank]))
                start = 0.0
                for part, seconds in parts:
                    row = {"arm": arm, "run": name, "step": step, "rank": rank, "part": part}
                    rows.append({**row, "start": start, "seconds": seconds})
                    start += seconds
            break
    return pl.DataFrame(rows, schema=TIMELINE_SCHEMA, orient="row")


def times_table(run: Snapshot) -> pl.DataFrame:
    """Columns arm, ``MEASURES`` (medians over the logged points of an arm's runs) and coverage (mean over layers and
    snapshots); null where nothing was logged."""
    schema = {"arm": pl.String, **dict.fromkeys((*MEASURES, COVERAGE), pl.Float64)}
    curves = run.curves()
    known = [name for name in MEASURES if name in curves.columns]
    if not len(curves) or not known:
        return pl.DataFrame(schema=schema)
    covered = diagnostic_table(run).filter(pl.col("name") == COVERAGE).group_by("arm").agg(pl.col("value").mean())
    coverage = dict(covered.iter_rows())
    medians = curves.group_by("arm").agg(pl.col(name).median() for name in known)
    rows = {row["arm"]: row for row in medians.iter_rows(named=True) if any(row[name] is not None for name in known)}
    return pl.DataFrame(
        [{**rows[arm], COVERAGE: coverage.get(arm)} for arm in run.arms if arm in rows], schema=schema, orient="row"
    )


def times_grid(run: Snapshot) -> Grid:
    """Step time, imbalance, waiting, budget and coverage of every arm."""
    table, styles = times_table(run), style.arm_styles(run)
    rows = [
        Row(row["arm"], styles[row["arm"]].colour, [row["arm"], *(_cell(row[name]) for name in (*MEASURES, COVERAGE))])
        for row in table.iter_rows(named=True)
    ]
    titles = (
        "seconds per step",
        "imbalance of ranks (max/mean)",
        "share of time waiting",
        "blocks per query",
        "coverage lost",
        "coverage",
    )
    columns = [Column("arm"), *(Column(title, numeric=True) for title in titles)]
    return Grid("rank_times", columns, rows, table, title="Times of ranks", empty="No times of ranks were logged.")


def budget_table(run: Snapshot) -> pl.DataFrame:
    """Blocks per query by layer and step, as :func:`workbench.dashboards.tables.diagnostics.diagnostic_table`."""
    return diagnostic_table(run).filter(pl.col("name") == BUDGET)


def budget_figure(run: Snapshot, table: pl.DataFrame) -> go.Figure:
    """One heat map per arm: blocks per query, layers against training steps."""
    arms = [arm for arm in run.arms if arm in table["arm"]]
    if not arms:
        return message("No layer of this ablation has a budget that varies.")
    grid, positions = subplots(len(arms), columns=2, titles=arms, gap=0.06)
    for arm, position in zip(arms, positions):
        matrix = (
            table.filter(pl.col("arm") == arm).sort("step").pivot("step", index="layer", values="value").sort("layer")
        )
        grid.add_heatmap(
            x=matrix.columns[1:],
            y=[str(layer) for layer in matrix["layer"]],
            z=matrix.drop("layer").to_numpy().tolist(),
            coloraxis="coloraxis",
            name=style.label(arm),
            hovertemplate="%{z:.4g} blocks in layer %{y} at step %{x}",
            **position,
        )
    grid.update_xaxes(title_text="training step", type="category", nticks=8)
    grid.update_yaxes(type="category")
    grid.update_yaxes(title_text="layer", col=1)
    grid.update_layout(height=100 + 240 * positions[-1]["row"], margin={"t": 40})
    return grid.update_layout(coloraxis={"colorscale": "Cividis", "colorbar": {"title": {"text": "blocks per query"}}})


def _cell(value: float | None) -> Cell:
    return Cell(UNKNOWN if value is None else f"{value:.4g}", value)
