"""The tables behind the figures: what a figure shows can be read, sorted and exported as numbers.

Each takes a run (:class:`workbench.ablation.run.AblationRun`) or a :class:`Snapshot` of it, and returns a frame with
the same columns whether or not there is anything to show yet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import polars as pl

from workbench.results.store import ENDED
from workbench.results.tables import SingleRuns

if TYPE_CHECKING:
    from workbench.ablation.run import AblationRun
    from workbench.ablation.verdict import Verdict

XAxis: TypeAlias = Literal["tokens", "flops", "seconds"]
YAxis: TypeAlias = Literal["loss", "selection_value"]

POINTS = 300
"""At most this many points a curve, however long the run."""

FAILED = ("diverged", "out_of_memory", "crashed", "killed")
"""Statuses that are listed as failures; a pruned trial is none."""


class Snapshot:
    """A run as it was at one moment: every file is read once, so that figures drawn from it agree with one another.

    Args:
        run: the run.
        before: an earlier snapshot of it; its verdict is kept where no confirmation run has changed since.
    """

    _run: AblationRun

    def __init__(self, run: AblationRun | Snapshot, before: Snapshot | None = None):
        source = run._run if isinstance(run, Snapshot) else run
        self._run, self._before = source, before
        self.name, self.question, self.arms, self.baseline = source.name, source.question, source.arms, source.baseline
        self.seeds, self.total, self.folder, self.about = source.seeds, source.total, source.folder, source.about
        self.metric = source.metric
        self.finished = source.finished  # read first: a finished run does not change any more
        self._runs, self._curves = source.runs(), source.curves()

    def runs(self) -> pl.DataFrame:
        """See :meth:`workbench.ablation.run.AblationRun.runs`."""
        return self._runs

    def curves(self) -> pl.DataFrame:
        """See :meth:`workbench.ablation.run.AblationRun.curves`."""
        return self._curves

    def cost(self) -> pl.DataFrame:
        """See :meth:`workbench.ablation.run.AblationRun.cost`."""
        return self._run.cost()

    def failures(self) -> dict[str, str]:
        """See :meth:`workbench.ablation.run.AblationRun.failures`."""
        return self._run.failures()

    def provenance(self) -> dict[str, str]:
        """See :meth:`workbench.ablation.run.AblationRun.provenance`."""
        return self._run.provenance()

    def workers(self) -> list[int]:
        """See :meth:`workbench.ablation.run.AblationRun.workers`."""
        return self._run.workers()

    def verdict(self) -> Verdict | None:
        """See :meth:`workbench.ablation.run.AblationRun.verdict`; worked out once."""
        return self._verdict

    @cached_property
    def _verdict(self) -> Verdict | None:
        before, self._before = self._before, None  # no chain of snapshots is kept alive
        if before is not None and "_verdict" in before.__dict__ and before._confirmed == self._confirmed:
            return before._verdict
        return self._run.verdict()

    @cached_property
    def _confirmed(self) -> tuple[Any, ...]:
        held = self._runs.filter(pl.col("stage") == "confirmation")
        return self.finished, *held.select("run", "status").rows(), *self.failures().items()


Run: TypeAlias = "AblationRun | Snapshot"


def curve_table(
    run: Run | SingleRuns,
    x: XAxis = "tokens",
    y: YAxis = "loss",
    stage: Literal["confirmation", "tuning"] = "confirmation",
) -> pl.DataFrame:
    """Per arm the mean of ``y`` and its smallest and largest value over runs, along ``x``.

    Columns: arm; stage (``tuning`` where an arm has no confirmation points yet, its trials with different
    hyperparameters then stand in); ``x`` under its name; mean, low, high; runs (how many reach this point). Recorded
    points are kept where they are few, else interpolated linearly on at most 300 points.

    Args:
        run: the run.
        x: ``tokens``, ``flops`` or ``seconds`` of training.
        y: ``loss`` (nats per token, training) or ``selection_value`` (the metric, selection documents).
        stage: which runs.
    """
    schema = {"arm": pl.String, "stage": pl.String, x: pl.Float64, "mean": pl.Float64, "low": pl.Float64,
              "high": pl.Float64, "runs": pl.Int64}  # fmt: skip
    held = run.curves().select("arm", "stage", "run", pl.col(x, y).cast(pl.Float64))
    held = held.filter(pl.col(x).is_finite() & pl.col(y).is_finite())  # null and NaN points are no points
    frames = []
    for arm in run.arms:
        points = held.filter(pl.col("arm") == arm)
        shown = stage if stage in points["stage"] else "tuning"
        points = points.filter(pl.col("stage") == shown)
        if len(points):
            frames.append(_band(points, x, y).select(pl.lit(arm).alias("arm"), pl.lit(shown).alias("stage"), pl.all()))
    return pl.concat(frames).cast(schema) if frames else pl.DataFrame(schema=schema)  # type: ignore[arg-type]


def _band(points: pl.DataFrame, x: str, y: str) -> pl.DataFrame:
    """Mean, smallest and largest ``y`` over runs on a common grid."""
    grid = np.unique(points[x].to_numpy())
    if len(grid) > POINTS:
        grid = np.linspace(grid[0], grid[-1], POINTS)
    lines = []
    for _, part in points.group_by("run", maintain_order=True):
        line = part.unique(x, keep="last").sort(x)
        lines.append(np.interp(grid, line[x].to_numpy(), line[y].to_numpy(), left=np.nan, right=np.nan))
    values = np.stack(lines)
    runs = np.isfinite(values).sum(0)
    grid, values, runs = grid[runs > 0], values[:, runs > 0], runs[runs > 0]
    return pl.DataFrame({x: grid, "mean": np.nanmean(values, 0), "low": np.nanmin(values, 0),
                         "high": np.nanmax(values, 0), "runs": runs})  # fmt: skip


def effect_table(run: Run) -> pl.DataFrame:
    """The verdict, one row an arm, or no row while there is none.

    Columns: the fields of :class:`workbench.ablation.verdict.ArmVerdict`.
    """
    from workbench.ablation.verdict import Verdict

    return (run.verdict() or Verdict(run.baseline, (), None, 0.05, None, None)).table()


def recall_table(run: Run, *labels: str) -> pl.DataFrame:
    """How many of the report examples' answers are right, by what the examples are labelled with.

    Columns: arm; the ``labels`` under their names; accuracy (1 − Σ errors / Σ answers, the mean over confirmation runs),
    low and high (the smallest and the largest of a run); runs; answers (in one run). No row where no confirmation run has
    ended, or where examples carry no such labels.

    Args:
        run: the run.
        labels: columns of the runs' report.parquet, such as ``pairs``, ``length`` or ``depth`` (per cent).
    """
    schema: dict[str, Any] = {"arm": pl.String, **dict.fromkeys(labels, pl.Float64), "accuracy": pl.Float64, "low": pl.Float64,
                              "high": pl.Float64, "runs": pl.Int64, "answers": pl.Int64}  # fmt: skip
    frames = []
    done = (pl.col("stage") == "confirmation") & (pl.col("status") == "done")
    for row in run.runs().filter(done).iter_rows(named=True):
        path = Path(row["folder"]) / "report.parquet"
        if not path.exists() or not {"errors", "answers", *labels} <= set(pl.read_parquet_schema(path)):
            continue
        frame = pl.read_parquet(path, columns=["errors", "answers", *labels])
        sums = frame.group_by(*labels, maintain_order=True).agg(pl.col("errors", "answers").sum())
        frames.append(sums.select(arm=pl.lit(row["arm"]), answers="answers", accuracy=1 - pl.col("errors") / pl.col("answers"),
                                  **{label: pl.col(label).cast(pl.Float64) for label in labels}))  # fmt: skip
    if not frames:
        return pl.DataFrame(schema=schema)
    accuracy = pl.col("accuracy")
    table = pl.concat(frames).group_by("arm", *labels, maintain_order=True).agg(
        accuracy=accuracy.mean(), low=accuracy.min(), high=accuracy.max(), runs=pl.len(), answers=pl.col("answers").first()
    )  # fmt: skip
    order = pl.col("arm").replace_strict({arm: i for i, arm in enumerate(run.arms)}, default=None)
    return table.sort(order, *labels).select(*schema).cast(schema)  # type: ignore[arg-type]


def tuning_table(run: Run) -> pl.DataFrame:
    """One row a trial and hyperparameter.

    Columns: arm, run, hyperparameter, value (numbers), word (other values as text), selection_value, status, selected.
    """
    schema = {"arm": pl.String, "run": pl.String, "hyperparameter": pl.String, "value": pl.Float64, "word": pl.String,
              "selection_value": pl.Float64, "status": pl.String, "selected": pl.Boolean}  # fmt: skip
    rows = []
    for trial in run.runs().filter(pl.col("stage") == "tuning").iter_rows(named=True):
        for name, value in json.loads(trial["hyperparameters"] or "{}").items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            rows.append({
                **{key: trial[key] for key in ("arm", "run", "selection_value", "status", "selected")},
                "hyperparameter": name, "value": float(value) if number else None,
                "word": None if number else value if isinstance(value, str) else json.dumps(value),
            })  # fmt: skip
    return pl.DataFrame(rows, schema=schema, orient="row")


def cost_table(run: Run) -> pl.DataFrame:
    """What each arm was said to cost before launch, and what it took.

    The columns of ``run.cost()``, then: measured_seconds (median training time of a finished run), measured_rate
    (median of its last tokens a second), spent_seconds and spent_flops (all runs, failed ones included).
    """
    done = pl.col("status") == "done"
    took = run.runs().group_by("arm").agg(
        measured_seconds=pl.col("seconds").filter(done).median(),
        measured_rate=pl.col("tokens_per_second").filter(done).median(),
        spent_seconds=pl.col("seconds").sum(),
        spent_flops=pl.col("flops").sum(),
    )  # fmt: skip
    said = run.cost()
    return said.join(took, on="arm", how="left", maintain_order="left") if "arm" in said.columns else took


def failure_table(run: Run) -> pl.DataFrame:
    """Runs that failed, with the reason, and arms that therefore were not confirmed.

    Columns: arm, stage, run, seed, status, step, steps, reason, hyperparameters.
    """
    columns = ["arm", "stage", "run", "seed", "status", "step", "steps", "reason", "hyperparameters"]
    failed = run.runs().filter(pl.col("status").is_in(FAILED)).select(columns)
    arms = [{"arm": arm, "stage": "confirmation", "status": "not confirmed", "reason": reason}
            for arm, reason in run.failures().items()]  # fmt: skip
    return pl.concat([failed, pl.DataFrame(arms, schema=failed.schema, orient="row")])


def progress_table(run: Run) -> pl.DataFrame:
    """How far each arm is, one row an arm and stage.

    Columns: arm, stage, planned, done, failed, pruned, running, left (runs that have not ended), share (of the planned
    steps, runs that ended early count as whole), seconds_left (training time on one worker; null while unknown).
    """
    schema = {"arm": pl.String, "stage": pl.String, "planned": pl.Int64, "done": pl.Int64, "failed": pl.Int64,
              "pruned": pl.Int64, "running": pl.Int64, "left": pl.Int64, "share": pl.Float64,
              "seconds_left": pl.Float64}  # fmt: skip
    held, unconfirmed, seeds = run.runs(), run.failures(), len(run.seeds)
    trials = run.total // len(run.arms) - seeds if run.arms else 0
    rows = []
    for arm in run.arms:
        mine = held.filter(pl.col("arm") == arm)
        whole = _seconds_per_run(mine) or _seconds_per_run(held)
        for stage, planned in (("tuning", trials), ("confirmation", 0 if arm in unconfirmed else seeds)):
            these = mine.filter(pl.col("stage") == stage)
            number = these["status"].is_in(ENDED).sum()
            going = these.filter(~pl.col("status").is_in(ENDED))
            parts = [row["step"] / row["steps"] for row in going.iter_rows(named=True) if row["steps"]]
            left = max(planned - number, 0)
            rows.append({
                "arm": arm, "stage": stage, "planned": planned, "done": (these["status"] == "done").sum(),
                "failed": these["status"].is_in(("diverged", "out_of_memory", "crashed")).sum(),
                "pruned": (these["status"] == "pruned").sum(), "running": (these["status"] == "running").sum(),
                "left": left, "share": min((number + sum(parts)) / planned, 1.0) if planned else 1.0,
                "seconds_left": 0.0 if not left else None if whole is None else whole * max(left - sum(parts), 0.0),
            })  # fmt: skip
    return pl.DataFrame(rows, schema=schema, orient="row")


def _seconds_per_run(held: pl.DataFrame) -> float | None:
    """Training time of a whole run, as far as the ones seen tell."""
    rates = held.filter(pl.col("step") > 0).select(pl.col("seconds") / pl.col("step") * pl.col("steps")).to_series()
    return float(np.median(rates.to_numpy())) if len(rates) else None


def state(run: Run) -> Mapping[str, Any]:
    """How the whole ablation stands: ``word``, ``ended`` of ``planned`` runs, ``share``, ``seconds_left`` or None."""
    if not Path(run.folder).exists():
        return {"word": "gone", "ended": 0, "planned": run.total, "share": 0.0, "seconds_left": None}
    table, workers = progress_table(run), len(run.workers())
    planned, left = int(table["planned"].sum()), int(table["left"].sum())
    word = "finished" if run.finished else "running" if workers else "not running"
    share = float((table["share"] * table["planned"]).sum()) / planned if planned else 0.0
    each = table["seconds_left"]
    known = word == "running" and each.null_count() == 0
    return {
        "word": word, "ended": planned - left, "planned": planned,
        "share": 1.0 if run.finished else share,
        "seconds_left": float(each.sum()) / min(workers, max(left, 1)) if known else None,
    }  # fmt: skip
