"""Everything about one run: what it was, how it differs from the baseline, what it recorded and measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from workbench import formatting
from workbench.ablation.folder import AblationFolder
from workbench.config import flatten
from workbench.dashboards.cells import hyperparameters, status_text, step_cell
from workbench.dashboards.snapshot import Snapshot
from workbench.dashboards.view import SingleRuns
from workbench.metric import Metric
from workbench.results.details import RunFiles, baseline_run, differences, event_rows, log_end
from workbench.results.record import RunRecord
from workbench.results.store import RunFolder
from workbench.results.tables import EVALUATION_SCHEMA, KEY_SCHEMA, Line, evaluations_of, run_row

__all__ = ["RunDetails", "run_details", "single_run_details", "value_text"]

MEASURED = [name for name in EVALUATION_SCHEMA if name not in KEY_SCHEMA]
"""Columns of :attr:`RunDetails.measured`."""


@dataclass(frozen=True)
class RunDetails:
    """One run."""

    row: dict[str, Any]
    """Its row, with the columns of :data:`workbench.results.tables.RUN_SCHEMA`."""
    metric: Metric
    record: RunRecord | None
    """None of an archived run."""
    baseline: str
    """The arm that it is compared with; "" of a run of its own."""
    compared: str
    """What ``differences`` are between, or why there are none, in a sentence."""
    differences: list[tuple[str, Any, Any]]
    """Dotted field, the baseline's value, its own; None where a configuration has no such field."""
    line: Line | None
    """Its logged points; None where an archive keeps none."""
    measured: list[dict[str, Any]]
    """The last value of everything that was measured, one row per split, suite, task and metric: step, split, suite,
    task, metric, value and n (documents or examples behind the value)."""
    files: RunFiles | None = None
    """None of an archived run."""
    events: list[tuple[float, str, str]] = field(default_factory=list)
    """Time in seconds since 1970, name, and what else is known."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Dotted name -> value, of what is known about where it ran."""
    log: str | None = None
    """The end of its log; None if there is none."""
    why_no_log: str = ""

    @property
    def title(self) -> str:
        """Arm, stage and seed."""
        row = self.row
        return (
            f"{row['arm'] or row['run']} · {row['stage']}{', chosen' if row['selected'] else ''} · seed {row['seed']}"
        )

    @property
    def last(self) -> dict[str, Any]:
        """Recorded quantity -> its last value, in the order of :data:`workbench.results.tables.POINT_SCHEMA`."""
        if self.line is None:
            return {}
        points = self.line.points
        columns = ((name, points.frame[name].drop_nulls()) for name in points.frame.columns if name in points.recorded)
        return {name: values[-1] for name, values in columns}

    @property
    def facts(self) -> dict[str, str]:
        """What the run is and what came out: name -> text."""
        row, unknown = self.row, formatting.UNKNOWN
        seeds = self.record.config.get("seeds", {}) if self.record else {}
        of_parts = formatting.setting({name: seed for name, seed in seeds.items() if seed is not None})
        facts = {
            "status": status_text(row["status"]) + (f": {row['reason']}" if row["reason"] else ""),
            f"report ({self.metric.unit})": formatting.metric(row["report_value"]),
            f"selection ({self.metric.unit})": formatting.metric(row["selection_value"]),
            "training loss (nats per token)": formatting.metric(row["loss"]),
            "tuned settings": hyperparameters(row["hyperparameters"]) or unknown,
            "seeds of components": of_parts,
            "step": step_cell(row["step"], row["steps"]).text,
            "tokens": formatting.count(row["tokens"]),
            "training time": formatting.duration(row["seconds"]),
            "speed": f"{formatting.count(row['tokens_per_second'])} tokens/s" if row["tokens_per_second"] else unknown,
            "parameters": formatting.count(row["parameters"]),
            "trained by": " · ".join(part for part in (row["code"], row["machine"]) if part) or unknown,
            "ended before as": row["earlier_outcomes"] or "",
            "failed suites": row["failed_suites"] or "",
        }
        return {what: value for what, value in facts.items() if value}

    @property
    def paths(self) -> dict[str, str]:
        """Folders that a person may want to open, as far as they exist."""
        found = {} if self.files is None else {"folder": self.files.folder, "checkpoint": self.files.checkpoint}
        return {what: str(path) for what, path in found.items() if path is not None}


def run_details(run: Snapshot, name: str) -> RunDetails | None:
    """The run ``name`` of an ablation; None if it has no such run."""
    run = run.unfiltered
    found = run.runs().filter(pl.col("run") == name)
    if not len(found):
        return None
    row = found.row(0, named=True)
    folder = RunFolder(run.folder / "runs" / name)
    compared, rows = _differences(run, row, folder)
    line = next((line for line in run.lines() if line.run == name), None)
    scores = run.scores().filter(pl.col("run") == name)
    return _details(row, run.metric, folder, line, scores, run.baseline, compared, rows, run.archived)


def single_run_details(path: str | Path) -> RunDetails:
    """A run of ``workbench train``.

    Raises:
        ConfigError: if this is not the folder of a run.
    """
    run = SingleRuns(path)
    folder, (line,) = RunFolder(path), run.lines()
    row = run_row(folder)
    compared = "A run of its own has no baseline."
    return _details(row, run.metric, folder, line, run.scores(), "", compared, [], archived=False)


def _details(
    row: dict[str, Any],
    metric: Metric,
    folder: RunFolder,
    line: Line | None,
    scores: pl.DataFrame,
    baseline: str,
    compared: str,
    rows: list[tuple[str, Any, Any]],
    archived: bool,
) -> RunDetails:
    exists = folder.exists()
    # report values of a run whose own is not shown are not shown either
    evaluations = evaluations_of(folder)
    if row["report_value"] is None:
        evaluations = evaluations.filter(pl.col("split") != "report")
    overall = scores.filter(pl.col("document").is_null()).rename({"count": "n"})
    measured = [*evaluations.iter_rows(named=True), *overall.select(MEASURED).iter_rows(named=True)]
    missing = "There is no log: the run has not started, or its folder was deleted."
    known = flatten(folder.environment()) if exists else {}
    return RunDetails(
        row=row,
        metric=metric,
        record=folder.record() if exists else None,
        baseline=baseline,
        compared=compared,
        differences=rows,
        line=line,
        measured=_last(measured),
        files=RunFiles.of(folder.path) if exists else None,
        events=event_rows(folder) if exists else [],
        environment={name: value for name, value in known.items() if value not in ({}, [], None)},
        log=log_end(folder.path),  # also of a run whose record is damaged
        why_no_log="An archive keeps no logs." if archived else missing,
    )


def _last(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of rows with one split, suite, task and metric the one with the largest step."""
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("split", "suite", "task", "metric"))
        if key not in newest or row["step"] >= newest[key]["step"]:
            newest[key] = row
    return list(newest.values())


def _differences(run: Snapshot, row: dict[str, Any], folder: RunFolder) -> tuple[str, list[tuple[str, Any, Any]]]:
    """Fields in which its configuration differs from that of a run of the baseline, and a sentence about them."""
    other = baseline_run(run.runs(), run.baseline, row["seed"])
    if other is None:
        return "The baseline has no run.", []
    if other["run"] == row["run"]:
        return "This is the run of the baseline that others are compared with.", []
    theirs = RunFolder(run.folder / "runs" / other["run"])
    if folder.exists() and theirs.exists():
        rows = differences(folder.record().config, theirs.record().config)
        note = f"Compared with the {other['stage']} run of seed {other['seed']}."
    else:
        rows = differences(_declared(run, row), _declared(run, other))
        note = "An archive keeps no configuration of single runs: declared fields of the arms, and tuned settings."
    return (note, rows) if rows else ("Nothing differs but the seed.", [])


def _declared(run: Snapshot, row: dict[str, Any]) -> dict[str, Any]:
    """Fields of an archived run as far as they are known: those of its arm, and tuned ones."""
    launched = AblationFolder(run.folder)
    arm = dict(launched.record().config.arms.get(row["arm"], {})) if launched.has_record() else {}
    return {**flatten(arm), **json.loads(row["hyperparameters"] or "{}")}


def value_text(value: Any) -> str:
    """A value of a configuration, or of an environment."""
    return formatting.UNKNOWN if value is None else value if isinstance(value, str) else json.dumps(value)
