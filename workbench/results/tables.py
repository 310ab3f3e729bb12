"""Tables over the runs of an ablation, or of several."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import polars as pl

from workbench.files import read_json, read_jsonl, replacing, stamp
from workbench.results.record import RunRecord, read_environment, read_result, read_state
from workbench.results.scores import SCORE_SCHEMA
from workbench.results.store import RunFolder, decided
from workbench.results.wall_time import WallTime
from workbench.status import ENDED, Stage, Status

KEY_SCHEMA: dict[str, Any] = {"arm": pl.String, "stage": pl.String, "run": pl.String, "seed": pl.Int64}
"""Columns that identify a run."""
RUN_SCHEMA: dict[str, Any] = {
    **KEY_SCHEMA,
    "status": pl.String,
    "step": pl.Int64,
    "steps": pl.Int64,
    "tokens": pl.Int64,
    "target_tokens": pl.Int64,
    "seconds": pl.Float64,
    "wall_seconds": pl.Float64,
    "seconds_left": pl.Float64,
    "loss": pl.Float64,
    "metric": pl.String,
    "selection_value": pl.Float64,
    "report_value": pl.Float64,
    "tokens_per_second": pl.Float64,
    "parameters": pl.Int64,
    "flops": pl.Float64,
    "hyperparameters": pl.String,
    "paths": pl.String,
    "selected": pl.Boolean,
    "reason": pl.String,
    "code": pl.String,
    "machine": pl.String,
    "earlier_outcomes": pl.String,
    "failed_suites": pl.String,
    "folder": pl.String,
}
POINT_SCHEMA: dict[str, Any] = {
    "step": pl.Int64,
    "tokens": pl.Int64,
    "flops": pl.Float64,
    "seconds": pl.Float64,
    "loss": pl.Float64,
    "learning_rate": pl.Float64,
    "gradient_norm": pl.Float64,
    "gradient_rms_min": pl.Float64,
    "gradient_rms_median": pl.Float64,
    "gradient_rms_max": pl.Float64,
    "tokens_per_second": pl.Float64,
    "flops_per_second": pl.Float64,
    "memory_bytes": pl.Float64,
    "selection_value": pl.Float64,
    "skipped": pl.Int64,
    "rolled_back": pl.Int64,
    "undone": pl.Int64,
    "step_seconds": pl.Float64,
    "rank_imbalance": pl.Float64,
    "waiting": pl.Float64,
    "budget": pl.Float64,
    "coverage_lost": pl.Float64,
}
"""Columns of one run's logged points.

loss: the mean over the steps since the point before; gradient_rms: root mean square of a parameter's gradient, over
parameters; memory_bytes: the largest so far, of the device (CUDA) or of the process, of the fullest of several ranks.
Null where they do not apply: what guards have done so far (skipped, rolled_back, undone), times of ranks
(:class:`workbench.training.rank_times.RankTimes`), blocks per query that a budget tuner chose, and the coverage that
they lose."""
CURVE_SCHEMA: dict[str, Any] = {**KEY_SCHEMA, **POINT_SCHEMA}
EVALUATION_SCHEMA: dict[str, Any] = {
    **KEY_SCHEMA,
    "step": pl.Int64,
    "split": pl.String,
    "suite": pl.String,
    "task": pl.String,
    "metric": pl.String,
    "value": pl.Float64,
    "n": pl.Int64,
}
SCORES_SCHEMA: dict[str, Any] = {**KEY_SCHEMA, **SCORE_SCHEMA}
"""Columns of every table of scores; labels of documents follow."""
DIAGNOSTICS_SCHEMA: dict[str, Any] = {
    **KEY_SCHEMA,
    "step": pl.Int64,
    "layer": pl.Int64,
    "name": pl.String,
    "index": pl.Int64,
    "value": pl.Float64,
}

ENDED_RUNS = "ended.parquet"
"""File in the folder of an ablation (:func:`write_ended`)."""
ENDED_VERSION = "1"
"""To be increased when a column of ``RUN_SCHEMA`` or ``POINT_SCHEMA`` gets another meaning: earlier copies are not read
then."""

T = TypeVar("T")
_contents: dict[str, tuple[tuple[int, int], Any]] = {}
"""File -> its size and time of change when it was read, and the parsed content."""


def _cached(folder: RunFolder | Path, name: str, read: Callable[[Path], T]) -> T | None:
    """The content of file ``name``, parsed again only after a change; None if there is no such file."""
    path = f"{folder.path if isinstance(folder, RunFolder) else folder}/{name}"
    current, entry = stamp(path), _contents.get(path)
    if current is None:
        _contents.pop(path, None)
        return None
    if entry is None or entry[0] != current:
        entry = _contents[path] = current, read(Path(path))
    return entry[1]


class Points:
    """The logged points of one run.

    Args:
        frame: columns in ``POINT_SCHEMA``.
    """

    def __init__(self, frame: pl.DataFrame):
        self.frame = frame
        self._lines: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def read(cls, path: Path) -> Points:
        """From metrics.jsonl, without a torn last line."""
        try:
            content = path.read_bytes()
            frame = pl.read_ndjson(content[: content.rfind(b"\n") + 1], schema=POINT_SCHEMA)
        except FileNotFoundError:
            frame = pl.DataFrame(schema=POINT_SCHEMA)
        except pl.exceptions.PolarsError:  # NaN, which Python's json module writes although JSON does not define it
            rows = [{name: _number(row.get(name)) for name in POINT_SCHEMA} for row in read_jsonl(path)]
            frame = pl.DataFrame(rows, schema=POINT_SCHEMA, orient="row", strict=False)
        return cls(frame)

    @cached_property
    def last(self) -> dict[str, Any]:
        """The newest point; empty before the first one."""
        return self.frame.row(-1, named=True) if len(self.frame) else {}

    @cached_property
    def selection_value(self) -> float | None:
        """The newest value on the selection split."""
        evaluated = self.frame["selection_value"].drop_nulls()
        return evaluated[-1] if len(evaluated) else None

    @cached_property
    def recorded(self) -> frozenset[str]:
        """The columns that hold any value."""
        counts = self.frame.null_count().row(0, named=True)
        return frozenset(name for name, nulls in counts.items() if nulls < len(self.frame))

    def line(self, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
        """Two columns as strictly increasing ``x`` and ``y``.

        Null and non-finite points are dropped; of points with equal ``x`` the last one counts. A loss is the mean over
        the steps since the point before; where those are fewer than usual (at an evaluation, at the end), points are
        joined, weighted by their tokens.
        """
        if (x, y) not in self._lines:
            frame = _even_windows(self.frame) if y == "loss" else self.frame
            points = frame.select(pl.col(x, y).cast(pl.Float64)).drop_nulls()
            xs, ys = points[x].to_numpy(), points[y].to_numpy()
            finite = np.isfinite(xs) & np.isfinite(ys)
            xs, ys = xs[finite], ys[finite]
            if len(xs) and (np.diff(xs) <= 0).any():
                xs, last = np.unique(xs[::-1], return_index=True)
                ys = ys[::-1][last]
            self._lines[x, y] = xs, ys
        return self._lines[x, y]


SHORT = 0.75
"""A window of less than this share of the usual one (the upper quartile) is joined to a neighbour."""


def _even_windows(frame: pl.DataFrame) -> pl.DataFrame:
    """Points whose losses are means over about equally many tokens."""
    frame = frame.filter(pl.col("loss").is_finite())
    if len(frame) < 3 or frame["tokens"].null_count():
        return frame
    ends = frame["tokens"].to_numpy().astype(np.float64)
    sizes = np.diff(ends, prepend=0.0)
    usual = np.quantile(sizes, 0.75)
    if not (sizes < SHORT * usual).any() or (sizes <= 0).any():  # even; or one of a run that has gone back
        return frame
    window, sums = np.empty(len(sizes), np.int64), 0.0
    number = 0
    for i, size in enumerate(sizes):
        window[i], sums = number, sums + size
        if sums >= SHORT * usual:
            number, sums = number + 1, 0.0
    if sums and number:
        window[window == number] = number - 1  # the short rest at the end
    return _joined_windows(frame, window, sizes)


def _joined_windows(frame: pl.DataFrame, window: np.ndarray, sizes: np.ndarray) -> pl.DataFrame:
    """The last point of every window, with the mean loss over it.

    Args:
        frame: points in order.
        window: number of each point's window, increasing.
        sizes: tokens since the point before.
    """
    weighted = frame.with_columns(_window=pl.Series(window), _tokens=pl.Series(sizes))
    is_whole = pl.col("loss").null_count() == 0  # of a loss that is not finite there is no mean
    mean = pl.when(is_whole).then((pl.col("loss") * pl.col("_tokens")).sum() / pl.col("_tokens").sum())
    others = [name for name in frame.columns if name != "loss"]
    joined = weighted.group_by("_window", maintain_order=True).agg(mean.alias("loss"), pl.col(others).last())
    return joined.select(frame.columns)


def thinned(frame: pl.DataFrame, points: int) -> pl.DataFrame:
    """At most ``points`` points of one run, evenly over its length, beside those with an evaluation, all of which stay.

    A loss is the mean over the tokens since the point before.
    """
    if len(frame) <= points:
        return frame
    evaluated = frame["selection_value"].is_not_null().to_numpy()
    free = max(2, points - int(evaluated.sum()))
    kept = np.union1d(np.flatnonzero(evaluated), np.linspace(0, len(frame) - 1, free).round().astype(int))
    sizes = np.diff(
        frame["tokens"].fill_null(strategy="forward").fill_null(0).to_numpy().astype(np.float64), prepend=0.0
    )
    window = np.searchsorted(kept, np.arange(len(frame)))
    return _joined_windows(frame, window, np.maximum(sizes, 1.0))


def confirmed(runs: pl.DataFrame) -> pl.DataFrame:
    """The confirmation runs that are done."""
    return runs.filter((pl.col("stage") == Stage.CONFIRMATION) & (pl.col("status") == Status.DONE))


@cache
def _no_points() -> Points:
    # not at import: trials are forked from a process that has imported this module, and polars' threads do not survive
    return Points(pl.DataFrame(schema=POINT_SCHEMA))


def points_of(folder: RunFolder) -> Points:
    """The logged points of one run."""
    return _cached(folder, "metrics.jsonl", Points.read) or _no_points()


class Line(NamedTuple):
    """A run and its points."""

    arm: str
    stage: str
    run: str
    seed: int
    points: Points


def _record(path: Path) -> RunRecord | None:
    """The record without its configuration, which is most of it and stays out of the cache."""
    record = RunRecord.read(read_json(path))
    return record and record.model_copy(update={"config": {}})


def _codes(environment: dict[str, Any]) -> str | None:
    codes = environment.get("codes") or [environment.get("code")]
    return " → ".join(filter(None, codes)) or None


def _machine(environment: dict[str, Any]) -> str | None:
    libraries = environment.get("libraries")
    torch = libraries.get("torch") if isinstance(libraries, dict) else None
    return ", torch ".join(str(part) for part in (environment.get("device"), torch) if part) or None


class _Events(NamedTuple):
    """What tables read of ``events.jsonl``."""

    wall_time: WallTime = WallTime()
    earlier_outcomes: str | None = None
    failed_suites: str | None = None

    @classmethod
    def read(cls, path: Path) -> _Events:
        events = read_jsonl(path)
        reopened = [event for event in events if event.get("event") == "reopened"]
        outcomes = ([str(event[name]) for name in ("was", "reason") if event.get(name)] for event in reopened)
        failed: dict[str, str] = {}
        for event in events:
            if event.get("event") == "suite_failed":
                failed[str(event.get("suite"))] = str(event.get("reason"))
            elif event.get("event") == "suite_measured":
                failed.pop(str(event.get("suite")), None)
        return cls(
            WallTime.of(events),
            "; ".join(map(": ".join, outcomes)) or None,
            "; ".join(map(": ".join, failed.items())) or None,
        )


def _number(value: Any) -> int | float | None:
    """A number of a log line; None for anything else and for integers beyond 64 bits, which only a damaged line has."""
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else None
    return value if isinstance(value, float) else None


def _of_kind(value: Any, kind: Any) -> Any:
    """A value of a log line for a column of this kind; None for another type, which only a damaged line has."""
    return (value if isinstance(value, str) else None) if kind == pl.String else _number(value)


def _outcome(folder: RunFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    """Status and result; the latter is written first, so it is read last."""
    state = _cached(folder, "status.json", read_state) or {"status": Status.WAITING}
    result = _cached(folder, "result.json", read_result)
    if not result and state["status"] == Status.RUNNING:  # whether the process is alive is not in the file
        state = folder.status()
        result = _cached(folder, "result.json", read_result)
    return decided(state, result or {}), result or {}


class _Run(NamedTuple):
    """A run as it was last read."""

    stamp: tuple[int, int] | None
    """Size and time of change of status.json."""
    row: dict[str, Any]
    line: Line


_ended: dict[str, _Run] = {}
"""Folder -> run, of runs that ended: nothing in them changes without a change of status.json."""


def _run(path: str) -> _Run | None:
    """The run in folder ``path``; None if there is none."""
    current, ended = stamp(f"{path}/status.json"), _ended.get(path)
    if ended is not None and ended.stamp == current:
        return ended
    folder = RunFolder(path)
    record = _cached(folder, "run.json", _record)
    if record is None:
        return None
    state, result = _outcome(folder)
    points = points_of(folder)
    environment = _cached(folder, "environment.json", read_environment) or {}
    step, seconds = points.last.get("step", 0), points.last.get("seconds", 0.0)
    is_running = state["status"] == Status.RUNNING
    events = _cached(folder, "events.jsonl", _Events.read) or _Events()
    wall = events.wall_time.seconds(time.time() if is_running else None) - events.wall_time.lost
    row = {
        "arm": record.arm,
        "stage": record.stage,
        "run": folder.path.name,
        "seed": record.seed,
        "status": state["status"],
        "step": step,
        "steps": record.steps,
        "tokens": points.last.get("tokens", 0),
        "target_tokens": record.tokens,
        "seconds": seconds,
        "wall_seconds": wall or None,
        "seconds_left": seconds_left(step, record.steps, seconds, wall - events.wall_time.startup)
        if is_running
        else None,
        "loss": points.last.get("loss"),
        "metric": record.metric.unit,
        "selection_value": result.get("selection_value", points.selection_value),
        "report_value": result.get("report_value"),
        "tokens_per_second": points.last.get("tokens_per_second"),
        "parameters": record.parameters,
        "flops": points.last.get("flops", 0.0),
        "hyperparameters": json.dumps(record.hyperparameters),
        "paths": json.dumps(environment.get("paths", {})),
        "selected": False,
        "reason": state.get("reason"),
        "code": _codes(environment),
        "machine": _machine(environment),
        "earlier_outcomes": events.earlier_outcomes,
        "failed_suites": events.failed_suites,
        "folder": path,
    }
    run = _Run(current, row, Line(record.arm, record.stage, folder.path.name, record.seed, points))
    _ended.pop(path, None)
    if state["status"] in ENDED:
        _ended[path] = run
    return run


def run_row(folder: RunFolder) -> dict[str, Any]:
    """The row of one run; columns in ``RUN_SCHEMA``.

    Raises:
        ConfigError: if this is not the folder of a run.
    """
    folder.record()  # the error that says so
    run = _run(str(folder.path))
    assert run is not None
    return run.row


def seconds_left(step: int, steps: int, training: float, wall: float) -> float | None:
    """Time that a run still needs for its steps and the evaluations between them; None before its first line.

    Args:
        step: steps done.
        steps: of the run.
        training: training time so far, in seconds.
        wall: wall time since the first step, evaluations included, in seconds.
    """
    return max(training, wall) / step * (steps - step) if step else None


def write_ended(ablation: str | Path) -> None:
    """Write the rows and points of ended runs into one file of folder ``ablation``, which is read many times faster
    than the files of its runs.

    It is a copy: a run that is not in it, or of which a file has changed since, is read from its folder. Where it
    cannot be written (a full disk), there is none.
    """
    runs = [run for run in _runs(ablation) if run.stamp and run.row["status"] in ENDED]
    if not runs:
        return
    frame = frame_of(run.line for run in runs).select(list(POINT_SCHEMA))
    rows = [
        {"stamps": [run.stamp, *_stamps(run.row["folder"])[1:]], "points": len(run.line.points.frame), **run.row}
        for run in runs
    ]
    with contextlib.suppress(OSError, pl.exceptions.PolarsError), replacing(Path(ablation) / ENDED_RUNS) as temporary:
        frame.write_parquet(temporary, metadata={"version": ENDED_VERSION, "runs": json.dumps(rows)})


def _stamps(folder: str) -> list[tuple[int, int] | None]:
    """Size and time of change of the files that a row and its points are read from, status.json first."""
    names = ("status.json", "run.json", "result.json", "environment.json", "events.jsonl", "metrics.jsonl")
    return [stamp(f"{folder}/{name}") for name in names]


def _read_ended(path: Path) -> None:
    """Take what the file of ended runs knows; nothing from a damaged file, or one of another version."""
    try:
        metadata = pl.read_parquet_metadata(path)
        if metadata["version"] != ENDED_VERSION:
            return
        rows = json.loads(metadata["runs"])
        frame = pl.read_parquet(path, glob=False)
    except (OSError, KeyError, ValueError, pl.exceptions.PolarsError):
        return
    known = {"stamps", "points", *RUN_SCHEMA}
    if frame.schema != POINT_SCHEMA or not isinstance(rows, list):
        return
    if any(not isinstance(row, dict) or row.keys() != known for row in rows):
        return
    if sum(row["points"] for row in rows) != len(frame):
        return
    end = 0
    for row in rows:
        begin, end = end, end + row.pop("points")
        folder = row["folder"] = f"{path.parent}/runs/{row['run']}"
        before, now = row.pop("stamps"), _stamps(folder)
        if before == [found and list(found) for found in now]:  # JSON has no tuples
            points = Points(frame.slice(begin, end - begin))
            line = Line(row["arm"], row["stage"], row["run"], row["seed"], points)
            _ended.setdefault(folder, _Run(now[0], row, line))


def _runs(ablation: str | Path) -> list[_Run]:
    """Every run of the ablation in folder ``ablation``."""
    root = f"{Path(ablation)}/runs"
    try:
        names = sorted(os.listdir(root))
    except OSError:
        return []
    _cached(Path(ablation), ENDED_RUNS, _read_ended)
    return [run for name in names if (run := _run(f"{root}/{name}")) is not None]


def runs(ablation: str | Path) -> pl.DataFrame:
    """One row per run of the ablation in folder ``ablation``; columns in ``RUN_SCHEMA``.

    tokens: training tokens so far; seconds: training time (without start-up and evaluation); wall_seconds: time of its
    processes, start-up and evaluation included, without those whose work was lost (null in archives of earlier
    versions); seconds_left: until the last
    step and evaluation of a running run; loss: nats per token;
    metric: unit of the primary metric; selection_value, report_value: its value on the selection split (last
    evaluation) and on the report split, from the table of evaluations; flops: training FLOPs so far; paths: the backend
    that each operation used; code: versions of the code that trained it (several if it was resumed by another one);
    machine: the device and the version of torch that it was last started with;
    earlier_outcomes: how it ended before it was run again; failed_suites: evaluation suites that could not measure
    something at its end, with the reason.
    """
    selection = read_json(Path(ablation) / "selection.json")
    rows = []
    for row in (run.row for run in _runs(ablation)):
        choice = selection.get(row["arm"])
        selected = row["stage"] == Stage.TUNING and isinstance(choice, dict) and choice.get("run") == row["run"]
        rows.append({**row, "selected": True} if selected else row)
    return pl.DataFrame(rows, schema=RUN_SCHEMA, orient="row")


def failed_suites(runs: pl.DataFrame) -> list[str]:
    """Sentences about the suites of ``runs`` (columns as of :func:`runs`) that could not measure something."""
    failed = runs.drop_nulls("failed_suites").group_by("failed_suites", maintain_order=True).len().rows()
    of = f"of {len(runs)} runs"
    return [f"Suites could not measure something in {count} {of}: {what.rstrip('.')}." for what, count in failed]


def lines(ablation: str | Path) -> list[Line]:
    """Every run of one ablation with its logged points."""
    return [run.line for run in _runs(ablation)]


def curves(ablation: str | Path) -> pl.DataFrame:
    """Every logged point of every run of one ablation; columns in ``CURVE_SCHEMA``."""
    return frame_of(lines(ablation))


def frame_of(lines: Iterable[Line]) -> pl.DataFrame:
    """Lines as one table; columns in ``CURVE_SCHEMA``."""
    return _joined(((line, line.points.frame) for line in lines), CURVE_SCHEMA)


def evaluations(ablation: str | Path) -> pl.DataFrame:
    """The long table of evaluations of every run of one ablation; columns in ``EVALUATION_SCHEMA``.

    metric: unit of the metric; n: documents or examples behind the value.
    """
    folders = ((run.line, RunFolder(run.row["folder"])) for run in _runs(ablation))
    return _joined(
        ((line, _cached(folder, "evaluations.jsonl", _evaluations)) for line, folder in folders), EVALUATION_SCHEMA
    )


def evaluations_of(folder: RunFolder) -> pl.DataFrame:
    """The table of evaluations of one run, report values included; columns in ``EVALUATION_SCHEMA`` without those of
    ``KEY_SCHEMA``."""
    found = _cached(folder, "evaluations.jsonl", _evaluations)
    return _no_evaluations() if found is None else found.drop_nulls("step")


def _no_evaluations() -> pl.DataFrame:
    return pl.DataFrame(schema={name: kind for name, kind in EVALUATION_SCHEMA.items() if name not in KEY_SCHEMA})


def _evaluations(path: Path) -> pl.DataFrame:
    schema = _no_evaluations().schema
    rows = [{name: _of_kind(row.get(name), kind) for name, kind in schema.items()} for row in read_jsonl(path)]
    return pl.DataFrame(rows, schema=schema, orient="row", strict=False)


def scores(ablation: str | Path) -> pl.DataFrame:
    """What evaluation suites measured of every run of one ablation; columns in ``SCORES_SCHEMA``, then the labels of
    documents.

    A row with a document is one document; one without is all documents of the task together.
    """
    return scores_of((run.line, RunFolder(run.row["folder"])) for run in _runs(ablation))


def scores_of(runs: Iterable[tuple[Line, RunFolder]]) -> pl.DataFrame:
    """What evaluation suites measured of some runs; columns in ``SCORES_SCHEMA``, then the labels of documents."""
    return _joined(((line, folder.scores()) for line, folder in runs), SCORES_SCHEMA)


def diagnostics(ablation: str | Path) -> pl.DataFrame:
    """Layer diagnostics of every run of one ablation; columns in ``DIAGNOSTICS_SCHEMA``.

    Long form, one row per number; index numbers the entries of a vector (the load of every expert), null for scalars.
    """
    return diagnostics_of((run.line, RunFolder(run.row["folder"])) for run in _runs(ablation))


def diagnostics_of(runs: Iterable[tuple[Line, RunFolder]]) -> pl.DataFrame:
    """Layer diagnostics of some runs; columns in ``DIAGNOSTICS_SCHEMA``."""
    return _joined(
        ((line, _cached(folder, "diagnostics.jsonl", _diagnostics)) for line, folder in runs), DIAGNOSTICS_SCHEMA
    )


def _diagnostics(path: Path) -> pl.DataFrame:
    rows = []
    for row in read_jsonl(path):
        step, layer, values = row.get("step"), row.get("layer"), row.get("values")
        if _number(step) is None or _number(layer) is None or not isinstance(values, dict):
            continue
        for name, value in values.items():
            numbers = enumerate(value) if isinstance(value, list) else [(None, value)]
            rows += [(step, layer, name, index, _number(number)) for index, number in numbers]
    schema = {name: kind for name, kind in DIAGNOSTICS_SCHEMA.items() if name not in KEY_SCHEMA}
    return pl.DataFrame(rows, schema=schema, orient="row", strict=False)


def _joined(frames: Iterable[tuple[Line, pl.DataFrame | None]], schema: dict[str, Any]) -> pl.DataFrame:
    """Frames of single runs below one another, with the columns of ``KEY_SCHEMA`` in front."""
    keyed = [
        frame.select(*(pl.lit(getattr(line, name), kind).alias(name) for name, kind in KEY_SCHEMA.items()), pl.all())
        for line, frame in frames
        if frame is not None and len(frame)
    ]
    return pl.concat(keyed, how="diagonal_relaxed") if keyed else pl.DataFrame(schema=schema)
