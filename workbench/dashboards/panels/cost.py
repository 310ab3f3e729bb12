"""What each arm costs, and what the data hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

import polars as pl
from markupsafe import Markup

from workbench import formatting
from workbench.ablation.cost.printed import unmatched
from workbench.ablation.spec.protocol import seeds_caution
from workbench.dashboards import style
from workbench.dashboards.panel import Block, Cell, Column, Grid, Panel, PanelConfig, Row, Text, panels
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.tables.quality import cost_table
from workbench.dashboards.templates import note, render
from workbench.results.data_card import repetition, times, warnings

QUANTITIES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "parameters": ("parameters", formatting.count),
    "non_embedding": ("without embedding", formatting.count),
    "active": ("active", formatting.count),
    "flops_per_token": ("forward, per token", formatting.flops),
    "training_flops": ("training, one run", formatting.flops),
    "cache_bytes": ("cache, one sequence", formatting.size),
    "memory_bytes": ("training memory", formatting.size),
    "tokens": ("tokens, one run", formatting.count),
    "epochs": ("its text is read", lambda epochs: formatting.UNKNOWN if epochs is None else times(epochs)),
    "token_imbalance": (
        "tokens of ranks, max/mean",
        lambda ratio: formatting.UNKNOWN if ratio is None else f"{ratio:.2f}",
    ),
    "seconds_imbalance": (
        "predicted seconds of ranks, max/mean",
        lambda ratio: formatting.UNKNOWN if ratio is None else f"{ratio:.2f}",
    ),
    "tuned": ("tuned fields", formatting.count),
    "searched": ("tuning trials", formatting.count),
    "trials": ("runs", formatting.count),
    "seconds_per_trial": ("training, one run, estimate", formatting.duration),
    "measured_seconds": ("training, one run, measured", formatting.duration),
    "spent_seconds": ("training, all runs so far", formatting.duration),
    "startup_seconds": ("start-up, one run, estimate", formatting.duration),
    "evaluation_seconds": ("evaluations while training, estimate", formatting.duration),
    "report_seconds": ("report documents, one run, estimate", formatting.duration),
    "seconds_total": ("all runs, one worker, estimate", formatting.duration),
    "solved": ("set by the budget", lambda text: text or formatting.UNKNOWN),
    "residual": ("off budget", formatting.share),
}
"""Column of the cost table -> its label and format."""
MAX_ARM_COLUMNS = 6
"""Up to this many arms the table has one column per arm, above one row per arm."""


@panels.register
class Cost(Panel):
    """What does each arm cost, is it matched, and what do the data hold?"""

    class Config(PanelConfig):
        kind: Literal["cost"] = "cost"

    title = "Cost"
    order = 20
    report = {"Cost": {}}
    report_order = 89

    def blocks(self, run: Snapshot) -> list[Block]:
        table = cost_table(run)
        if not len(table):
            return [Text("cost", note("No cost card was computed before launch.")), *_data_blocks(run)]
        epochs = {row["arm"]: row.get("epochs") for row in table.iter_rows(named=True)}
        repeated = [Text(f"epochs-{i}", note(line)) for i, line in enumerate(repetition(epochs))]
        few = "" if run.finished or run.components or not run.seeds else seeds_caution(len(run.seeds))
        caution = [Text("seeds", note(few))] if few else []
        return [
            _cost_grid(run, table),
            *caution,
            Text("matching", _matching(run, table)),
            *repeated,
            *_data_blocks(run),
        ]


def _cost_grid(run: Snapshot, table: pl.DataFrame) -> Grid:
    """One row per quantity and one column per arm; for many arms transposed."""
    styles = style.arm_styles(run)
    shown = {name: how for name, how in QUANTITIES.items() if name in table.columns}
    if "startup_seconds" not in shown:  # a card of an earlier version, whose total is that of training alone
        shown.pop("seconds_total", None)
    cells = {name: [Cell(text(value), value) for value in table[name]] for name, (_, text) in shown.items()}
    arms = table["arm"].to_list()
    if len(arms) <= MAX_ARM_COLUMNS:
        columns = [Column(""), *(Column(arm, numeric=True, colour=styles[arm].colour) for arm in arms)]
        rows = [Row(name, "", [title, *cells[name]]) for name, (title, _) in shown.items()]
        return Grid("cost", columns, rows, table, sortable=False)
    columns = [Column("arm"), *(Column(title, numeric=True) for title, _ in shown.values())]
    rows = [
        Row(f"arm {arm}", styles[arm].colour, [arm, *(cells[name][i] for name in shown)]) for i, arm in enumerate(arms)
    ]
    return Grid("cost", columns, rows, table)


def _matching(run: Snapshot, table: pl.DataFrame) -> Markup:
    texts: list[str] = table["mismatch"].to_list() if "mismatch" in table.columns else []
    mismatches = [(arm, unmatched(text)) for arm, text in zip(table["arm"], texts) if text]
    return render("matching.html", mismatches=mismatches, styles=style.arm_styles(run), reason=run.allow_mismatch)


def _data_blocks(run: Snapshot) -> list[Block]:
    """One table per data card; arms with the same data share one."""
    arms_of: dict[str, list[str]] = {}
    for arm, card in run.data_cards.items():
        if arm in run.arms:
            arms_of.setdefault(json.dumps(card, sort_keys=True), []).append(arm)
    blocks: list[Block] = []
    for number, (text, arms) in enumerate(arms_of.items()):
        card = json.loads(text)
        splits = {name: {k: v for k, v in split.items() if k != "shards"} for name, split in card["splits"].items()}
        names = list(dict.fromkeys(key for split in splits.values() for key in split))
        columns = [Column("split"), *(Column(name.replace("_", " "), numeric=True) for name in names)]
        rows = [
            Row(name, "", [name, *(_number(split.get(column)) for column in names)]) for name, split in splits.items()
        ]
        table = pl.DataFrame(
            [{"split": name, **split} for name, split in splits.items()], infer_schema_length=None, strict=False
        )
        suffix = f"-{number + 1}" if number else ""
        title = f"Data of {', '.join(arms)}" if len(arms_of) > 1 else "Data"
        blocks.append(Grid(f"data{suffix}", columns, rows, table, title=title, sortable=False))
        if compared := card.get("training_examples_compared"):
            meaning = f"examples that equal one of the first {compared:,} training examples of seed 0."
        else:
            meaning = "13-token shingles of the measured text that are also in the training text."
        if "overlap" in names:
            blocks.append(Text(f"overlap{suffix}", note(f"Overlap: share of {meaning}")))
        blocks += [Text(f"caution{suffix}-{i}", note(line)) for i, line in enumerate(warnings(card))]
    return blocks or [Text("data", note("No data has been prepared."), title="Data")]


def _number(value: Any) -> Cell:
    if value is None:
        return Cell(formatting.UNKNOWN)
    return Cell(f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value))
