"""The tables behind the figures: what a figure shows can be read, sorted and exported as numbers.

Each takes a run (:class:`workbench.ablation.run.AblationRun`) or a snapshot of it, and returns a frame with
the same columns whether or not there is anything to show yet.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import polars as pl

from workbench.ablation.analysis.diagnostics import (
    best_of_table as best_of_table,
)  # one of the tables that figures draw
from workbench.config import ConfigError
from workbench.dashboards.snapshot import snapshot_of
from workbench.dashboards.view import RunView
from workbench.status import ENDED, FAILED

if TYPE_CHECKING:
    from workbench.ablation.analysis.compare import ScalingLaw

XAxis: TypeAlias = Literal["tokens", "flops", "seconds"]
YAxis: TypeAlias = Literal["loss", "selection_value"]
Spent: TypeAlias = Literal["training_flops", "non_embedding", "active", "cache_bytes", "measured_rate"]
"""What a frontier weighs quality against."""

POINTS = 300
"""At most this many points a curve, however long the run."""


def curve_table(
    run: RunView,
    x: XAxis = "tokens",
    y: YAxis = "loss",
    stage: Literal["confirmation", "tuning"] = "confirmation",
    smoothing: float = 0.0,
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
        smoothing: weight of the points before in a running mean of each run, 0 (none) to below 1.

    Raises:
        ConfigError: when ``smoothing`` is no such weight.
    """
    if not 0 <= smoothing < 1:
        raise ConfigError.at("smoothing", got=smoothing, expected="0 (none) to below 1")
    schema = {
        "arm": pl.String,
        "stage": pl.String,
        x: pl.Float64,
        "mean": pl.Float64,
        "low": pl.Float64,
        "high": pl.Float64,
        "runs": pl.Int64,
    }
    held: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    for line in run.lines():
        along, up = line.points.line(x, y)
        if len(along):
            held.setdefault((line.arm, line.stage), []).append((along, smoothed(up, smoothing)))
    frames = []
    for arm in run.arms:
        shown = stage if (arm, stage) in held else "tuning"
        if (arm, shown) in held:
            band = _band(held[arm, shown], x)
            frames.append(band.select(pl.lit(arm).alias("arm"), pl.lit(shown).alias("stage"), pl.all()))
    return pl.concat(frames).cast(schema) if frames else pl.DataFrame(schema=schema)  # type: ignore[arg-type]


def smoothed(values: np.ndarray, weight: float) -> np.ndarray:
    """Running mean in which each value counts ``weight`` times as much as the one after it."""
    if not weight:
        return values
    from scipy.signal import lfilter

    return lfilter([1 - weight], [1, -weight], values) / (1 - weight ** np.arange(1, len(values) + 1))


def thinned(values: np.ndarray, points: int = POINTS) -> np.ndarray:
    """At most so many of the values, evenly spread, the first and the last among them."""
    return values if len(values) <= points else values[np.linspace(0, len(values) - 1, points).round().astype(int)]


def _band(lines: list[tuple[np.ndarray, np.ndarray]], x: str) -> pl.DataFrame:
    """Mean, smallest and largest value over runs on a common grid."""
    first, last = min(along[0] for along, _ in lines), max(along[-1] for along, _ in lines)
    grid = np.linspace(first, last, POINTS)
    if all(len(along) <= POINTS for along, _ in lines):
        exact = np.unique(np.concatenate([along for along, _ in lines]))
        grid = exact if len(exact) <= POINTS else grid
    values = np.stack([np.interp(grid, along, up, left=np.nan, right=np.nan) for along, up in lines])
    runs = np.isfinite(values).sum(0)
    grid, values, runs = grid[runs > 0], values[:, runs > 0], runs[runs > 0]
    return pl.DataFrame(
        {
            x: grid,
            "mean": np.nanmean(values, 0),
            "low": np.nanmin(values, 0),
            "high": np.nanmax(values, 0),
            "runs": runs,
        }
    )


def effect_table(run: RunView) -> pl.DataFrame:
    """The verdict, one row an arm, or no row while there is none.

    Columns: the fields of :class:`workbench.ablation.verdict.judge.ArmVerdict`.
    """
    from workbench.ablation.verdict.judge import Verdict

    table = (run.verdict() or Verdict(run.baseline, (), None, 0.05, None, None)).table()
    return table.filter(pl.col("arm").is_in(run.arms))


def recall_table(run: RunView, *labels: str) -> pl.DataFrame:
    """How many of the report examples' answers are right, by what the examples are labelled with.

    Columns: arm; the ``labels`` under their names; accuracy (1 − Σ errors / Σ answers, the mean over confirmation runs),
    low and high (the smallest and the largest of a run); runs; answers (in one run). No row where no confirmation run has
    ended, or where examples carry no such labels.

    Args:
        run: the run.
        labels: columns of the runs' report.parquet, such as ``pairs``, ``length`` or ``depth`` (per cent).
    """
    schema: dict[str, Any] = {
        "arm": pl.String,
        **dict.fromkeys(labels, pl.Float64),
        "accuracy": pl.Float64,
        "low": pl.Float64,
        "high": pl.Float64,
        "runs": pl.Int64,
        "answers": pl.Int64,
    }
    frames = []
    for arm, _, frame in run.reports():
        if {"errors", "answers", *labels} <= set(frame.columns):
            sums = frame.group_by(*labels, maintain_order=True).agg(pl.col("errors", "answers").sum())
            frames.append(
                sums.select(
                    arm=pl.lit(arm),
                    answers="answers",
                    accuracy=1 - pl.col("errors") / pl.col("answers"),
                    **{label: pl.col(label).cast(pl.Float64) for label in labels},
                )
            )
    if not frames:
        return pl.DataFrame(schema=schema)
    accuracy = pl.col("accuracy")
    table = (
        pl.concat(frames)
        .group_by("arm", *labels, maintain_order=True)
        .agg(
            accuracy=accuracy.mean(),
            low=accuracy.min(),
            high=accuracy.max(),
            runs=pl.len(),
            answers=pl.col("answers").first(),
        )
    )
    order = pl.col("arm").replace_strict({arm: i for i, arm in enumerate(run.arms)}, default=None)
    return table.sort(order, *labels).select(*schema).cast(schema)  # type: ignore[arg-type]


def tuning_table(run: RunView) -> pl.DataFrame:
    """One row a trial and hyperparameter.

    Columns: arm, run, hyperparameter, value (numbers), word (other values as text), selection_value, status, selected.
    """
    schema = {
        "arm": pl.String,
        "run": pl.String,
        "hyperparameter": pl.String,
        "value": pl.Float64,
        "word": pl.String,
        "selection_value": pl.Float64,
        "status": pl.String,
        "selected": pl.Boolean,
    }
    rows = []
    for trial in run.runs().filter(pl.col("stage") == "tuning").iter_rows(named=True):
        for name, value in json.loads(trial["hyperparameters"] or "{}").items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            rows.append(
                {
                    **{key: trial[key] for key in ("arm", "run", "selection_value", "status", "selected")},
                    "hyperparameter": name,
                    "value": float(value) if number else None,
                    "word": None if number else value if isinstance(value, str) else json.dumps(value),
                }
            )
    return pl.DataFrame(rows, schema=schema, orient="row")


FEWEST = 6
"""Finished trials that an arm needs for importances."""
RESAMPLES = 100


def importance_table(run: RunView) -> pl.DataFrame:
    """How much each hyperparameter mattered in each arm's tuning: Optuna's PED-ANOVA (Watanabe et al. 2023), shares of 1,
    with the middle 90 % over a bootstrap of the trials (seeded: the same trials give the same numbers).

    Columns: arm, hyperparameter, importance, low, high, trials. Arms with fewer than 6 finished trials have no row.
    """
    schema = {
        "arm": pl.String,
        "hyperparameter": pl.String,
        "importance": pl.Float64,
        "low": pl.Float64,
        "high": pl.Float64,
        "trials": pl.Int64,
    }
    rows = []
    for arm in run.arms:
        mine = run.runs().filter((pl.col("arm") == arm) & (pl.col("stage") == "tuning") & (pl.col("status") == "done"))
        trials = [
            (json.loads(row["hyperparameters"]), row["selection_value"])
            for row in mine.iter_rows(named=True)
            if row["selection_value"] is not None
        ]
        names = sorted({name for values, _ in trials for name in values})
        if len(trials) < FEWEST or not names:
            continue
        value, draws = _importances(trials, names), np.random.default_rng(0)
        many = np.array(
            [
                _importances([trials[i] for i in draws.integers(0, len(trials), len(trials))], names)
                for _ in range(RESAMPLES)
            ]
        )
        low, high = np.nanquantile(many, (0.05, 0.95), axis=0)
        rows += [(arm, name, *map(float, numbers), len(trials)) for name, *numbers in zip(names, value, low, high)]
    return pl.DataFrame(rows, schema=schema, orient="row")


def _importances(trials: list[tuple[dict[str, Any], float]], names: list[str]) -> list[float]:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    spaces: dict[str, BaseDistribution] = {}
    for name in names:
        seen = [values[name] for values, _ in trials]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in seen):
            if min(seen) == max(seen):
                continue
            spaces[name] = FloatDistribution(min(seen), max(seen), log=min(seen) > 0 and max(seen) / min(seen) > 5)
        else:
            spaces[name] = CategoricalDistribution(sorted(set(seen), key=str))
    study = optuna.create_study()
    for values, value in trials:
        study.add_trial(
            optuna.trial.create_trial(params={name: values[name] for name in spaces}, distributions=spaces, value=value)
        )
    found = (
        {}
        if not spaces or len({value for _, value in trials}) < 2
        else (optuna.importance.PedAnovaImportanceEvaluator(evaluate_on_local=False).evaluate(study))
    )
    total = sum(found.values())
    return [found.get(name, 0.0) / total if total else float("nan") for name in names]


def frontier_table(run: RunView, x: Spent = "training_flops") -> pl.DataFrame:
    """Quality against what it costs, one row an arm.

    Columns: arm; ``x`` under its name (of the cost table); value (mean of the report value over confirmation runs), low and
    high (their smallest and largest); runs; stage (``tuning``: the chosen trial's selection value stands in while no
    confirmation run is done); best (no arm is at least as good and at least as cheap). Arms without a number have no row.

    Args:
        run: the run.
        x: ``training_flops``, ``non_embedding``, ``active`` (parameters), ``cache_bytes`` (decode state), which are better
            small, or ``measured_rate`` (training tokens a second), better large.
    """
    if x not in get_args(Spent):
        raise ConfigError.at("x", got=x, expected=f"one of {', '.join(get_args(Spent))}")
    schema = {
        "arm": pl.String,
        x: pl.Float64,
        "value": pl.Float64,
        "low": pl.Float64,
        "high": pl.Float64,
        "runs": pl.Int64,
        "stage": pl.String,
        "best": pl.Boolean,
    }
    costs: dict[str, Any] = {row["arm"]: row.get(x) for row in cost_table(run).iter_rows(named=True)}
    rows: list[list[Any]] = []
    for arm in run.arms:
        found = _quality(run.runs().filter(pl.col("arm") == arm))
        if found is not None and costs.get(arm) is not None:
            rows.append([arm, float(costs[arm]), *found])
    sign = -1 if x == "measured_rate" else 1
    for row in rows:
        worse = any(
            sign * other[1] <= sign * row[1] and other[2] <= row[2] and (other[1] != row[1] or other[2] != row[2])
            for other in rows
        )
        row.append(not worse)
    return pl.DataFrame(rows, schema=schema, orient="row")


def _confirmed(mine: pl.DataFrame) -> pl.Series:
    """The report value of every confirmation run that is done."""
    return mine.filter((pl.col("status") == "done") & (pl.col("stage") == "confirmation"))["report_value"].drop_nulls()


def _quality(mine: pl.DataFrame) -> tuple[float, float, float, int, str] | None:
    """Mean, smallest and largest value of an arm, over how many runs of which stage."""
    done = _confirmed(mine)
    if len(done):
        return done.mean(), done.min(), done.max(), len(done), "confirmation"  # type: ignore[return-value]
    chosen = mine.filter(pl.col("stage") == "tuning").filter(pl.col("selection_value").is_finite())
    chosen = chosen.filter(pl.col("selected")) if chosen["selected"].any() else chosen.sort("selection_value").head(1)
    if not len(chosen):
        return None
    value = chosen["selection_value"][0]
    return value, value, value, 1, "tuning"


def overview_table(results: str | Path) -> pl.DataFrame:
    """The ablations below ``results``, the latest first.

    Columns: ablation, question, state (finished, running, not running), ended, planned (runs), arms, verdict (in short),
    created, folder.
    """
    columns = ["ablation", "question", "state", "ended", "planned", "arms", "verdict", "created", "folder"]
    rows = []
    for path in Path(results).glob("*/ablation.json"):
        try:
            run = snapshot_of(path.parent)
            stands, verdict = state(run), run.verdict() if run.finished else None
        except (ConfigError, KeyError, OSError, TypeError) as error:  # of an earlier version, or deleted this moment
            rows.append(
                (path.parent.name, "", f"cannot be read ({type(error).__name__})", 0, 0, 0, "", "", str(path.parent))
            )
            continue
        said = ", ".join(f"{row.arm} {row.verdict}" for row in verdict.rows[1:]) if verdict else ""
        rows.append(
            (
                run.name,
                run.question,
                stands["word"],
                stands["ended"],
                stands["planned"],
                len(run.arms),
                said,
                run.provenance().get("created", ""),
                str(run.folder),
            )
        )
    schema: dict[str, Any] = {name: pl.Int64 if name in ("ended", "planned", "arms") else pl.String for name in columns}
    return pl.DataFrame(rows, schema=schema, orient="row").sort("created", descending=True)


def scaling_table(run: RunView, x: Literal["non_embedding", "training_flops"] = "non_embedding") -> pl.DataFrame:
    """The arms of ``run`` at every size there is: its own, and those of the ablations beside it with arms of these names,
    the same metric and data of the same sort.

    Columns: arm, ablation, ``x`` under its name, value, low, high, runs, stage (as in :func:`frontier_table`), values (the
    report value of every confirmation run that is done).
    """
    schema: dict[str, Any] = {
        "arm": pl.String,
        "ablation": pl.String,
        x: pl.Float64,
        "value": pl.Float64,
        "low": pl.Float64,
        "high": pl.Float64,
        "runs": pl.Int64,
        "stage": pl.String,
        "values": pl.List(pl.Float64),
    }
    rows = []
    for path in sorted(Path(run.folder).parent.glob("*/ablation.json")):
        try:
            other = run if path.parent == Path(run.folder) else snapshot_of(path.parent)
            views = [each.views for each in (other, run)]  # tasks label their examples differently
            alike = other.metric == run.metric and views[0] == views[1]
            if not alike or not set(other.arms) & set(run.arms):
                continue
            table, runs = frontier_table(other, x), other.runs()
        except (ConfigError, KeyError, OSError, TypeError):
            continue
        rows += [
            (
                row["arm"],
                other.name,
                row[x],
                row["value"],
                row["low"],
                row["high"],
                row["runs"],
                row["stage"],
                _confirmed(runs.filter(pl.col("arm") == row["arm"])).to_list(),
            )
            for row in table.iter_rows(named=True)
            if row["arm"] in run.arms
        ]
    order = pl.col("arm").replace_strict({arm: i for i, arm in enumerate(run.arms)}, default=None)
    return pl.DataFrame(rows, schema=schema, orient="row").sort(order, x)


SIZES = 3
"""Sizes from which on a scaling law is drawn (ours): through two of them one always goes."""


def scaling_laws(table: pl.DataFrame, x: str = "non_embedding") -> dict[str, ScalingLaw]:
    """The law of each arm of a :func:`scaling_table` that has confirmation runs, with losses above zero, at :data:`SIZES`
    sizes or more: :func:`workbench.ablation.analysis.compare.fit_scaling_law`."""
    held: dict[str, dict[float, list[float]]] = {}
    for arm, place, values in table.select("arm", x, "values").iter_rows():
        held.setdefault(arm, {}).setdefault(place, []).extend(v for v in values if 0 < v < math.inf)
    places = {arm: tuple((p, tuple(v)) for p, v in mine.items() if p > 0 and v) for arm, mine in held.items()}
    return {arm: _law(mine) for arm, mine in places.items() if len(mine) >= SIZES}


@lru_cache(maxsize=256)
def _law(places: tuple[tuple[float, tuple[float, ...]], ...]) -> ScalingLaw:
    """Kept, since a live view asks again and again, and every fit is one of hundreds of replicates."""
    from workbench.ablation.analysis.compare import fit_scaling_law

    return fit_scaling_law(dict(places))


def state_table(run: RunView) -> pl.DataFrame:
    """Recall against what decoding keeps: :func:`recall_table` by ``pairs``, with cache_bytes of each arm."""
    held = run.cost()
    table = recall_table(run, "pairs")
    if "cache_bytes" not in held.columns:
        return table.with_columns(cache_bytes=pl.lit(None, pl.Float64))
    return table.join(
        held.select("arm", pl.col("cache_bytes").cast(pl.Float64)), on="arm", how="left", maintain_order="left"
    )


def diagnostic_table(run: RunView) -> pl.DataFrame:
    """What layers told of themselves while training, the mean over an arm's confirmation runs (its tuning runs where
    there are none yet).

    Columns: arm, step, layer, name, index (place in a vector such as the load of every expert, else null), value, runs.
    """
    held = run.diagnostics()
    first = pl.col("stage") == pl.col("stage").min().over("arm")  # confirmation before tuning
    return (
        held.filter(first & pl.col("value").is_not_null())
        .group_by("arm", "step", "layer", "name", "index")
        .agg(value=pl.col("value").mean(), runs=pl.len().cast(pl.Int64))
        .sort("arm", "name", "layer", "step", "index")
    )


def cost_table(run: RunView) -> pl.DataFrame:
    """What each arm was said to cost before launch, and what it took.

    The columns of ``run.cost()``, then: measured_seconds (median training time of a finished run), measured_rate
    (median of its last tokens a second), spent_seconds and spent_flops (all runs, failed ones included).
    """
    done = pl.col("status") == "done"
    took = (
        run.runs()
        .group_by("arm")
        .agg(
            measured_seconds=pl.col("seconds").filter(done).median(),
            measured_rate=pl.col("tokens_per_second").filter(done).median(),
            spent_seconds=pl.col("seconds").sum(),
            spent_flops=pl.col("flops").sum(),
        )
    )
    said = run.cost()
    return said.join(took, on="arm", how="left", maintain_order="left") if "arm" in said.columns else took


def failure_table(run: RunView) -> pl.DataFrame:
    """Runs that failed, with the reason, and arms that therefore were not confirmed.

    Columns: arm, stage, run, seed, status, step, steps, reason, hyperparameters.
    """
    columns = ["arm", "stage", "run", "seed", "status", "step", "steps", "reason", "hyperparameters"]
    failed = run.runs().filter(pl.col("status").is_in(FAILED)).select(columns)
    arms = [
        {"arm": arm, "stage": "confirmation", "status": "not confirmed", "reason": reason}
        for arm, reason in run.failures().items()
    ]
    return pl.concat([failed, pl.DataFrame(arms, schema=failed.schema, orient="row")])


def progress_table(run: RunView) -> pl.DataFrame:
    """How far each arm is, one row an arm and stage.

    Columns: arm, stage, planned, done, failed, pruned, running, left (runs that have not ended), share (of the planned
    steps, runs that ended early count as whole; null where none is planned), seconds_left (training time on one worker; null
    while unknown).
    """
    schema = {
        "arm": pl.String,
        "stage": pl.String,
        "planned": pl.Int64,
        "done": pl.Int64,
        "failed": pl.Int64,
        "pruned": pl.Int64,
        "running": pl.Int64,
        "left": pl.Int64,
        "share": pl.Float64,
        "seconds_left": pl.Float64,
    }
    unconfirmed, seeds, trials = run.failures(), len(run.seeds), run.tuning_trials
    held: dict[tuple[str, str], list[tuple[str, float]]] = {}
    took: dict[str, list[float]] = {}
    for arm, stage, status, step, steps, seconds in (
        run.runs().select("arm", "stage", "status", "step", "steps", "seconds").iter_rows()
    ):
        held.setdefault((arm, stage), []).append((status, (step or 0) / steps if steps else 0.0))
        if step and seconds is not None:
            took.setdefault(arm, []).append(seconds / step * steps)
    every = [seconds for mine in took.values() for seconds in mine]
    rows = []
    for arm in run.arms:
        known = took.get(arm) or every
        whole = float(np.median(known)) if known else None  # training time of a run, as far as the ones seen tell
        for stage, planned in (("tuning", trials), ("confirmation", 0 if arm in unconfirmed else seeds)):
            these = held.get((arm, stage), [])
            count = Counter(status for status, _ in these)
            number = sum(count[status] for status in ENDED)
            begun = sum(part for status, part in these if status not in ENDED)
            left = max(planned - number, 0)
            rows.append(
                {
                    "arm": arm,
                    "stage": stage,
                    "planned": planned,
                    "done": count["done"],
                    "failed": count["diverged"] + count["out_of_memory"] + count["crashed"],
                    "pruned": count["pruned"],
                    "running": count["running"],
                    "left": left,
                    "share": min((number + begun) / planned, 1.0) if planned else None,
                    "seconds_left": 0.0 if not left else None if whole is None else whole * max(left - begun, 0.0),
                }
            )
    return pl.DataFrame(rows, schema=schema, orient="row")


def state(run: RunView) -> Mapping[str, Any]:
    """How the whole ablation stands: ``word``, ``ended`` of ``planned`` runs, ``share``, ``seconds_left`` or None."""
    if not run.exists:
        return {"word": "gone", "ended": 0, "planned": run.total, "share": 0.0, "seconds_left": None}
    table, workers = progress_table(run), len(run.workers())
    planned, left = int(table["planned"].sum()), int(table["left"].sum())
    word = "finished" if run.finished else "running" if workers else "not running"
    share = float((table["share"] * table["planned"]).sum()) / planned if planned else 0.0
    each = table["seconds_left"]
    known = word == "running" and each.null_count() == 0
    return {
        "word": word,
        "ended": planned - left,
        "planned": planned,
        "share": 1.0 if run.finished else share,
        "seconds_left": float(each.sum()) / min(workers, max(left, 1)) if known else None,
    }
