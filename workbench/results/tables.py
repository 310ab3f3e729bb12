"""Tables over the runs of one ablation, or of all, or of some that stand by themselves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import polars as pl

from workbench.files import read_json, read_jsonl, stamp
from workbench.results.store import RunFolder
from workbench.status import ENDED, Stage, Status

RUN_SCHEMA: dict[str, Any] = {
    "arm": pl.String,
    "stage": pl.String,
    "run": pl.String,
    "seed": pl.Int64,
    "status": pl.String,
    "step": pl.Int64,
    "steps": pl.Int64,
    "tokens": pl.Int64,
    "target_tokens": pl.Int64,
    "seconds": pl.Float64,
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
    "folder": pl.String,
}
CURVE_SCHEMA: dict[str, Any] = {
    "arm": pl.String,
    "stage": pl.String,
    "run": pl.String,
    "seed": pl.Int64,
    "step": pl.Int64,
    "tokens": pl.Int64,
    "flops": pl.Float64,
    "seconds": pl.Float64,
    "loss": pl.Float64,
    "learning_rate": pl.Float64,
    "gradient_norm": pl.Float64,
    "tokens_per_second": pl.Float64,
    "selection_value": pl.Float64,
}
DIAGNOSTICS_SCHEMA: dict[str, Any] = {
    "arm": pl.String,
    "stage": pl.String,
    "run": pl.String,
    "seed": pl.Int64,
    "step": pl.Int64,
    "layer": pl.Int64,
    "name": pl.String,
    "index": pl.Int64,
    "value": pl.Float64,
}


POINT_SCHEMA = {name: kind for name, kind in CURVE_SCHEMA.items() if name not in ("arm", "stage", "run", "seed")}
"""Columns of one run's own points."""

T = TypeVar("T")
_kept: dict[str, tuple[tuple[int, int], Any]] = {}
"""File -> its size and time when it was read, and what was in it. A file that has not changed is not read twice."""


def _keep(folder: RunFolder, name: str, read: Callable[[Path], T]) -> T | None:
    """What ``read`` makes of the file ``name``, remembered until the file changes; None where there is none."""
    path = f"{folder.path}/{name}"
    now, held = stamp(path), _kept.get(path)
    if now is None:
        _kept.pop(path, None)
        return None
    if held is None or held[0] != now:
        held = _kept[path] = now, read(Path(path))
    return held[1]


class Points:
    """The recorded points of one run.

    Args:
        frame: columns in ``POINT_SCHEMA``.
    """

    def __init__(self, frame: pl.DataFrame):
        self.frame = frame
        self.last: dict[str, Any] = frame.row(-1, named=True) if len(frame) else {}
        evaluated = frame["selection_value"].drop_nulls()
        self.selection_value: float | None = evaluated[-1] if len(evaluated) else None
        self._lines: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def read(cls, path: Path) -> Points:
        """From metrics.jsonl; a torn last line is left out."""
        try:
            content = path.read_bytes()
            frame = pl.read_ndjson(content[: content.rfind(b"\n") + 1], schema=POINT_SCHEMA)
        except FileNotFoundError:
            frame = pl.DataFrame(schema=POINT_SCHEMA)
        except pl.exceptions.PolarsError:  # NaN, which JSON does not know but Python writes
            rows = [{name: row.get(name) for name in POINT_SCHEMA} for row in read_jsonl(path)]
            frame = pl.DataFrame(rows, schema=POINT_SCHEMA, orient="row")
        return cls(frame)

    def line(self, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
        """Two columns as increasing ``x`` and its ``y``: null and NaN points are no points, the last of equal ``x`` counts."""
        if (x, y) not in self._lines:
            held = self.frame.select(pl.col(x, y).cast(pl.Float64)).drop_nulls()
            along, up = held[x].to_numpy(), held[y].to_numpy()
            good = np.isfinite(along) & np.isfinite(up)
            along, up = along[good], up[good]
            if len(along) and (np.diff(along) <= 0).any():
                along, last = np.unique(along[::-1], return_index=True)
                up = up[::-1][last]
            self._lines[x, y] = along, up
        return self._lines[x, y]


@cache
def _no_points() -> Points:
    # not at import: trials are forked from a process that has imported this, and polars' threads do not live through a fork
    return Points(pl.DataFrame(schema=POINT_SCHEMA))


class Line(NamedTuple):
    """A run and its points."""

    arm: str
    stage: str
    run: str
    seed: int
    points: Points


def _points(folder: RunFolder) -> Points:
    return _keep(folder, "metrics.jsonl", Points.read) or _no_points()


def _about(path: Path) -> dict[str, Any]:
    """What tables need of run.json; most of it is the configuration."""
    about = read_json(path)
    wanted = ("arm", "stage", "seed", "steps", "tokens", "metric", "parameters", "hyperparameters")
    if "metric" not in about:  # earlier versions knew bits per byte only
        return {}
    return {
        **{name: about.get(name) for name in wanted},
        "hyperparameters": json.dumps(about.get("hyperparameters", {})),
    }


def _paths(path: Path) -> str:
    return json.dumps(read_json(path).get("paths", {}))


def _status(folder: RunFolder) -> dict[str, Any]:
    state = _keep(folder, "status.json", read_json) or {"status": Status.WAITING}
    return (
        folder.status() if state.get("status") == Status.RUNNING else state
    )  # whether somebody runs it is not in the file


class _Seen(NamedTuple):
    """A run as it was last read."""

    stamp: tuple[int, int] | None
    """Of status.json."""
    row: dict[str, Any]
    line: Line


_ended: dict[str, _Seen] = {}
"""Folder -> its run, of runs that ended: they are asked for their status alone, since nothing else of them changes without it."""


def _seen(path: str) -> _Seen | None:
    """The run in folder ``path``, None where there is none."""
    now, held = stamp(f"{path}/status.json"), _ended.get(path)
    if held is not None and held.stamp == now:
        return held
    folder = RunFolder(path)
    about = _keep(folder, "run.json", _about)
    if not about:
        return None
    state, points = _status(folder), _points(folder)
    result = _keep(folder, "result.json", read_json) or {}
    last, steps = points.last, about["steps"]
    step, seconds = last.get("step", 0), last.get("seconds", 0.0)
    left = seconds / step * (steps - step) if step and state["status"] == Status.RUNNING else None
    row = {
        "arm": about["arm"],
        "stage": about["stage"],
        "run": folder.path.name,
        "seed": about["seed"],
        "status": state["status"],
        "step": step,
        "steps": steps,
        "tokens": last.get("tokens", 0),
        "target_tokens": about["tokens"],
        "seconds": seconds,
        "seconds_left": left,
        "loss": last.get("loss"),
        "metric": about["metric"]["unit"],
        "selection_value": result.get("selection_value", points.selection_value),
        "report_value": result.get("report_value"),
        "tokens_per_second": last.get("tokens_per_second"),
        "parameters": about["parameters"],
        "flops": last.get("flops", 0.0),
        "hyperparameters": about["hyperparameters"],
        "paths": _keep(folder, "environment.json", _paths) or "{}",
        "selected": False,
        "reason": state.get("reason"),
        "folder": path,
    }
    seen = _Seen(now, row, Line(about["arm"], about["stage"], folder.path.name, about["seed"], points))
    _ended.pop(path, None)
    if state["status"] in ENDED:
        _ended[path] = seen
    return seen


def _each(ablation: str | Path) -> list[_Seen]:
    """Every run of the ablation in folder ``ablation``."""
    root = f"{ablation}/runs"
    try:
        names = sorted(os.listdir(root))
    except OSError:
        return []
    return [seen for name in names if (seen := _seen(f"{root}/{name}")) is not None]


def runs(ablation: str | Path) -> pl.DataFrame:
    """One row a training run of the ablation in folder ``ablation``; columns in ``RUN_SCHEMA``.

    Tokens count training tokens; seconds count training only (no start-up, no evaluation); loss is nats per token;
    selection_value and report_value are in the unit that metric names; flops are training FLOPs spent; paths are the
    implementations that operations took.
    """
    chosen = read_json(Path(ablation) / "selection.json")
    rows = []
    for row in (seen.row for seen in _each(ablation)):
        selected = row["stage"] == Stage.TUNING and chosen.get(row["arm"], {}).get("run") == row["run"]
        rows.append({**row, "selected": True} if selected else row)
    return pl.DataFrame(rows, schema=RUN_SCHEMA, orient="row")


def lines(ablation: str | Path) -> list[Line]:
    """Every run of one ablation with its recorded points."""
    return [seen.line for seen in _each(ablation)]


def curves(ablation: str | Path) -> pl.DataFrame:
    """Every recorded point of every run of one ablation; columns in ``CURVE_SCHEMA``."""
    return frame_of(lines(ablation))


def frame_of(lines: Iterable[Line]) -> pl.DataFrame:
    """Lines as one table; columns in ``CURVE_SCHEMA``."""
    frames = [
        line.points.frame.select(
            pl.lit(line.arm).alias("arm"),
            pl.lit(line.stage).alias("stage"),
            pl.lit(line.run).alias("run"),
            pl.lit(line.seed).cast(pl.Int64).alias("seed"),
            pl.all(),
        )
        for line in lines
        if len(line.points.frame)
    ]
    return pl.concat(frames) if frames else pl.DataFrame(schema=CURVE_SCHEMA)


def _diagnostics(path: Path) -> pl.DataFrame:
    rows = []
    for row in read_jsonl(path):
        for name, value in row["values"].items():
            numbers = enumerate(value) if isinstance(value, list) else [(None, value)]
            rows += [(row["step"], row["layer"], name, index, number) for index, number in numbers]
    own = {name: DIAGNOSTICS_SCHEMA[name] for name in ("step", "layer", "name", "index", "value")}
    return pl.DataFrame(rows, schema=own, orient="row")


def diagnostics(ablation: str | Path) -> pl.DataFrame:
    """What layers said about themselves in every run of one ablation; columns in ``DIAGNOSTICS_SCHEMA``.

    Long form, one row a number; index counts the numbers of a vector (the load of every expert), else it is null.
    """
    return _diagnosed((seen.line, RunFolder(seen.row["folder"])) for seen in _each(ablation))


def _diagnosed(runs: Iterable[tuple[Line, RunFolder]]) -> pl.DataFrame:
    frames = []
    for line, folder in runs:
        held = _keep(folder, "diagnostics.jsonl", _diagnostics)
        if held is not None and len(held):
            key = {"arm": line.arm, "stage": line.stage, "run": line.run, "seed": line.seed}
            frames.append(
                held.select(
                    *(pl.lit(value).cast(DIAGNOSTICS_SCHEMA[name]).alias(name) for name, value in key.items()), pl.all()
                )
            )
    return pl.concat(frames) if frames else pl.DataFrame(schema=DIAGNOSTICS_SCHEMA)


def table(results: str | Path = "results") -> pl.DataFrame:
    """One row a run over all ablations below ``results``, with the ablation's name in front."""
    frames = [
        runs(path.parent).insert_column(0, pl.lit(path.parent.name).alias("ablation"))
        for path in sorted(Path(results).glob("*/ablation.json"))
    ]
    frames = [frame for frame in frames if len(frame)]
    return pl.concat(frames) if frames else pl.DataFrame(schema={"ablation": pl.String, **RUN_SCHEMA})
