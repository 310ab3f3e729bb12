"""Tables over the runs of one ablation, or of all, or of some that stand by themselves."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl

from workbench.config import ConfigError
from workbench.files import read_json, read_jsonl
from workbench.metric import Metric
from workbench.results.store import RunFolder

RUN_SCHEMA: dict[str, Any] = {
    "arm": pl.String, "stage": pl.String, "run": pl.String, "seed": pl.Int64, "status": pl.String, "step": pl.Int64,
    "steps": pl.Int64, "tokens": pl.Int64, "target_tokens": pl.Int64, "seconds": pl.Float64,
    "seconds_left": pl.Float64, "loss": pl.Float64, "metric": pl.String, "selection_value": pl.Float64,
    "report_value": pl.Float64, "tokens_per_second": pl.Float64, "parameters": pl.Int64, "flops": pl.Float64, "hyperparameters": pl.String,
    "paths": pl.String,
    "selected": pl.Boolean, "reason": pl.String, "folder": pl.String,
}  # fmt: skip
CURVE_SCHEMA: dict[str, Any] = {
    "arm": pl.String, "stage": pl.String, "run": pl.String, "seed": pl.Int64, "step": pl.Int64, "tokens": pl.Int64,
    "flops": pl.Float64, "seconds": pl.Float64, "loss": pl.Float64, "learning_rate": pl.Float64,
    "gradient_norm": pl.Float64, "tokens_per_second": pl.Float64, "selection_value": pl.Float64,
}  # fmt: skip
DIAGNOSTICS_SCHEMA: dict[str, Any] = {
    "arm": pl.String, "stage": pl.String, "run": pl.String, "seed": pl.Int64, "step": pl.Int64, "layer": pl.Int64,
    "name": pl.String, "index": pl.Int64, "value": pl.Float64,
}  # fmt: skip


@lru_cache(maxsize=4096)
def _metrics(path: str, size: int, changed: int) -> list[dict[str, Any]]:
    return read_jsonl(Path(path))


def _cached_metrics(folder: RunFolder, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    path = folder.path / name
    try:
        stat = path.stat()
    except OSError:
        return []
    return _metrics(str(path), stat.st_size, stat.st_mtime_ns)


def _folders(ablation: Path) -> list[RunFolder]:
    folders = [RunFolder(path.parent) for path in sorted(ablation.glob("runs/*/run.json"))]
    return [folder for folder in folders if "metric" in folder.about()]  # earlier versions knew bits per byte only


def runs(ablation: str | Path) -> pl.DataFrame:
    """One row a training run of the ablation in folder ``ablation``; columns in ``RUN_SCHEMA``.

    Tokens count training tokens; seconds count training only (no start-up, no evaluation); loss is nats per token;
    selection_value and report_value are in the unit that metric names; flops are training FLOPs spent; paths are the
    implementations that operations took.
    """
    ablation = Path(ablation)
    chosen = read_json(ablation / "selection.json")
    rows = []
    for folder in _folders(ablation):
        about, result, state = folder.about(), folder.result(), folder.status()
        metrics = _cached_metrics(folder)
        last = metrics[-1] if metrics else {}
        evaluated = [row["selection_value"] for row in metrics if row.get("selection_value") is not None]
        steps, step, seconds = about["steps"], last.get("step", 0), last.get("seconds", 0.0)
        left = seconds / step * (steps - step) if step and state["status"] == "running" else None
        rows.append({
            "arm": about["arm"], "stage": about["stage"], "run": folder.path.name, "seed": about["seed"],
            "status": state["status"], "step": step, "steps": steps, "tokens": last.get("tokens", 0),
            "target_tokens": about["tokens"], "seconds": seconds, "seconds_left": left, "loss": last.get("loss"),
            "metric": about["metric"]["unit"],
            "selection_value": result.get("selection_value", evaluated[-1] if evaluated else None),
            "report_value": result.get("report_value"), "tokens_per_second": last.get("tokens_per_second"),
            "parameters": about["parameters"], "flops": last.get("flops", 0.0),
            "hyperparameters": json.dumps(about["hyperparameters"]),
            "paths": json.dumps(folder.environment().get("paths", {})),
            "selected": about["stage"] == "tuning" and chosen.get(about["arm"], {}).get("run") == folder.path.name,
            "reason": state.get("reason"), "folder": str(folder.path),
        })  # fmt: skip
    return pl.DataFrame(rows, schema=RUN_SCHEMA, orient="row")


def curves(ablation: str | Path) -> pl.DataFrame:
    """Every recorded point of every run of one ablation; columns in ``CURVE_SCHEMA``."""
    return _curves(_folders(Path(ablation)))


def _curves(folders: Iterable[RunFolder]) -> pl.DataFrame:
    rows = []
    for folder in folders:
        about = folder.about()
        key = {"arm": about["arm"], "stage": about["stage"], "run": folder.path.name, "seed": about["seed"]}
        rows += [
            {**key, **{name: row.get(name) for name in CURVE_SCHEMA if name not in key}}
            for row in _cached_metrics(folder)
        ]
    return pl.DataFrame(rows, schema=CURVE_SCHEMA, orient="row")


def diagnostics(ablation: str | Path) -> pl.DataFrame:
    """What layers said about themselves in every run of one ablation; columns in ``DIAGNOSTICS_SCHEMA``.

    Long form, one row a number; index counts the numbers of a vector (the load of every expert), else it is null.
    """
    return _diagnostics(_folders(Path(ablation)))


def _diagnostics(folders: Iterable[RunFolder]) -> pl.DataFrame:
    rows = []
    for folder in folders:
        about = folder.about()
        key = {"arm": about["arm"], "stage": about["stage"], "run": folder.path.name, "seed": about["seed"]}
        for row in _cached_metrics(folder, "diagnostics.jsonl"):
            key |= {"step": row["step"], "layer": row["layer"]}
            for name, value in row["values"].items():
                numbers = enumerate(value) if isinstance(value, list) else [(None, value)]
                rows += [{**key, "name": name, "index": index, "value": number} for index, number in numbers]
    return pl.DataFrame(rows, schema=DIAGNOSTICS_SCHEMA, orient="row")


class SingleRuns:
    """Runs of `workbench train` side by side, each an arm of its own, for :func:`workbench.dashboards.loss_curves`.

    Args:
        folders: folders of runs; their names are what they are called.

    Raises:
        ConfigError: when a folder is no run, or their metrics differ.
    """

    def __init__(self, *folders: str | Path):
        self._folders = [RunFolder(Path(folder).absolute()) for folder in folders]
        for folder in self._folders:
            if "metric" not in folder.about():
                raise ConfigError.at("folders", got=str(folder.path), expected="the folder of a run",
                                     do="Runs of `workbench train` are in results/runs.")  # fmt: skip
        metrics = [Metric(**folder.about()["metric"]) for folder in self._folders]
        if len(set(metrics)) != 1:
            raise ConfigError.at("folders", got=f"runs measured in {', '.join(sorted({m.unit for m in metrics})) or 'nothing'}",
                                 expected="at least one run, all measured alike")  # fmt: skip
        self.metric = metrics[0]
        self.arms = [folder.path.name for folder in self._folders]
        self.baseline = self.arms[0]

    def curves(self) -> pl.DataFrame:
        """Every recorded point; columns in ``CURVE_SCHEMA``."""
        return _curves(self._folders).with_columns(pl.col("run").alias("arm"))

    def diagnostics(self) -> pl.DataFrame:
        """What layers said about themselves; columns in ``DIAGNOSTICS_SCHEMA``."""
        return _diagnostics(self._folders).with_columns(pl.col("run").alias("arm"))


def table(results: str | Path = "results") -> pl.DataFrame:
    """One row a run over all ablations below ``results``, with the ablation's name in front."""
    frames = [
        runs(path.parent).insert_column(0, pl.lit(path.parent.name).alias("ablation"))
        for path in sorted(Path(results).glob("*/ablation.json"))
    ]
    frames = [frame for frame in frames if len(frame)]
    return pl.concat(frames) if frames else pl.DataFrame(schema={"ablation": pl.String, **RUN_SCHEMA})
