"""Scores of evaluation suites as the table of a paper."""

from __future__ import annotations

from typing import Any, Literal

import polars as pl
from pydantic import Field

from workbench.dashboards import style
from workbench.dashboards.panel import Block, Cell, Column, Grid, Panel, PanelConfig, Row, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.suites import (
    NO_SCORES,
    best_cells,
    main_scores,
    plus_minus,
    suite_table,
    with_names,
)
from workbench.dashboards.view import RunView
from workbench.paper import PaperCell, PaperColumn, PaperTable


@panels.register
class SuiteScores(Panel):
    """What goes into a paper's table: every task, every arm, with the seeds' uncertainty?"""

    class Config(PanelConfig):
        kind: Literal["suite_scores"] = "suite_scores"
        rows: Literal["tasks", "arms"] = Field("tasks", title="rows")
        """What the rows are; the others are columns."""
        by_length: bool = Field(False, title="by length")
        """Whether lengths of the context are separate, where a task has several."""
        every_metric: bool = Field(False, title="every metric")
        """All metrics of a task, or the first one that its suite names."""

    settings: Config
    title = "table"
    tab = "Suites"
    order = 48
    report = {"Suites, in numbers": {}}

    def applies(self, run: RunView) -> bool:
        return run.has_suites

    def blocks(self, run: Snapshot) -> list[Block]:
        settings = self.settings
        table = with_names(suite_table(run, by_length=settings.by_length))
        table = table if settings.every_metric else main_scores(table)
        scores = table.select("name", "metric").unique(maintain_order=True).rows()
        cells = {(row["name"], row["metric"], row["arm"]): row for row in table.iter_rows(named=True)}
        by_task = settings.rows == "tasks"
        lines: list[tuple[Any, ...]] = scores if by_task else [(arm,) for arm in run.arms]
        heads = ["task", "metric"] if by_task else ["arm"]
        columns = run.arms if by_task else _names(scores)
        keys: list[tuple[Any, ...]] = [(arm,) for arm in run.arms] if by_task else scores
        found = [[cells.get((*line, *key) if by_task else (*key, *line)) for key in keys] for line in lines]
        texts = [["" if cell is None else plus_minus(cell) for cell in row] for row in found]
        styles = style.arm_styles(run)
        return [
            Grid(
                "suites",
                [*(Column(name) for name in heads), *(Column(name, numeric=True) for name in columns)],
                [
                    Row(
                        " ".join(line),
                        "" if by_task else styles[line[0]].colour,
                        [*line, *(Cell(text, cell and cell["value"]) for text, cell in zip(row, values))],
                    )
                    for line, row, values in zip(lines, texts, found)
                ],
                pl.DataFrame(
                    [[*line, *row] for line, row in zip(lines, texts)],
                    schema=dict.fromkeys([*heads, *columns], pl.String),
                    orient="row",
                ),
                empty=NO_SCORES,
                paper=self._paper(run, heads, columns, lines, found, table),
            )
        ]

    def _paper(
        self,
        run: Snapshot,
        heads: list[str],
        columns: list[str],
        lines: list[tuple[Any, ...]],
        found: list[list[dict[str, Any] | None]],
        table: pl.DataFrame,
    ) -> PaperTable:
        """The table as it is printed: the best arms of a score are bold where a difference is shown."""
        groups = found if self.settings.rows == "tasks" else list(map(list, zip(*found)))
        best = {id(cell) for group in groups for cell in best_cells([cell for cell in group if cell is not None])}
        rows = [
            [*map(PaperCell, line), *(PaperCell("" if c is None else plus_minus(c), id(c) in best) for c in row)]
            for line, row in zip(lines, found)
        ]
        caption = (
            f"Evaluation suites of {run.name}: mean over seeds ± half a {100 * (1 - run.alpha):g} % t-interval. Bold: "
            f"the best arm, with those not shown to differ from it, where the interval of a paired difference to "
            f"{run.baseline}, not adjusted for the number of scores, excludes zero."
        )
        names = [*(PaperColumn(name) for name in heads), *(PaperColumn(name, True) for name in columns)]
        return PaperTable(names, rows, table, caption, f"{run.name}-suites")


def _names(scores: list[tuple[str, str]]) -> list[str]:
    """Names of columns: that of the task, with its metric where a task has several."""
    names = [name for name, _ in scores]
    return [name if names.count(name) == 1 else f"{name}: {metric}" for name, metric in scores]
