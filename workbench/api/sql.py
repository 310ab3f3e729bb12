"""SQL over all results: one SELECT in the dialect of polars, read only."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from workbench.api.answers import Query, plain_rows
from workbench.config import ConfigError
from workbench.results.tables import EVALUATION_SCHEMA, RUN_SCHEMA, SCORES_SCHEMA

if TYPE_CHECKING:
    from workbench.ablation.run import AblationRun

__all__ = ["TABLES", "query", "select"]

ABLATION_SCHEMA: dict[str, Any] = {
    "ablation": pl.String,
    "question": pl.String,
    "baseline": pl.String,
    "arms": pl.Int64,
    "metric": pl.String,
    "seeds": pl.Int64,
    "finished": pl.Boolean,
    "archived": pl.Boolean,
    "created": pl.String,
    "code": pl.String,
    "device": pl.String,
    "identity": pl.String,
    "tags": pl.List(pl.String),
    "folder": pl.String,
}
VERDICT_SCHEMA: dict[str, Any] = {
    "ablation": pl.String,
    "arm": pl.String,
    "name": pl.String,
    "verdict": pl.String,
    "value": pl.Float64,
    "value_sd": pl.Float64,
    "difference": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "p": pl.Float64,
    "p_holm": pl.Float64,
    "seeds": pl.Int64,
    "failed": pl.Int64,
    "metric": pl.String,
    "exploratory": pl.String,
    "sentence": pl.String,
}
"""One row per arm; ``name`` is its display name, ``exploratory`` is null of a confirmation."""


def query(text: str, results: str | Path = "results") -> Query:
    """The rows of a SELECT over all ablations below ``results``; see :func:`select`."""
    frame = select(text, results)
    return Query(columns=frame.columns, rows=plain_rows(frame))


def select(text: str, results: str | Path = "results") -> pl.DataFrame:
    """The rows of a SELECT over all ablations below ``results``.

    Its tables are :data:`TABLES`, each with a column ``ablation``, the name of the folder. Values of the report split
    are left out until they may be read, as everywhere. Folders that cannot be read are left out.

    Args:
        text: one SELECT, or WITH … SELECT, in the dialect of polars.
        results: folder of all results, or of archives.

    Raises:
        ConfigError: if the text is no such statement, or polars cannot execute it.
    """
    statement = text.strip().rstrip(";")
    if not re.match(r"(select|with)\b", statement, re.IGNORECASE) or ";" in _without_strings(statement):
        raise ConfigError.at("query", got=text, expected="one SELECT statement", do=_HELP)
    if found := re.search(r"\b(read|scan)_\w+\s*\(", _without_strings(statement), re.IGNORECASE):
        raise ConfigError.at("query", got=found[0], expected="the tables of the results; files are not read", do=_HELP)
    if not Path(results).is_dir():
        raise ConfigError.at("results", got=str(results), expected="a folder of results")
    words = {word.lower() for word in re.findall(r"\w+", statement)}
    frames = {name: _table(name, Path(results)) for name in TABLES if name in words}  # verdicts take time
    try:
        return pl.SQLContext(frames=frames, eager=True).execute(statement)
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError.at("query", got=reason, expected="a statement that polars can execute", do=_HELP) from None


def _without_strings(statement: str) -> str:
    return re.sub(r"'[^']*'", "''", statement)


def _table(name: str, results: Path) -> pl.DataFrame:
    schema, read = TABLES[name]
    frames = [frame for frame in _frames(results, read) if len(frame)]
    return pl.concat(frames, how="diagonal_relaxed") if frames else pl.DataFrame(schema=schema)


def _frames(results: Path, read: Callable[[AblationRun], pl.DataFrame]) -> Iterator[pl.DataFrame]:
    from workbench.ablation.run import AblationRun

    for path in sorted(results.glob("*/ablation.json")):
        try:
            frame = read(AblationRun(path.parent))
        except ConfigError:
            continue
        yield frame.select(pl.lit(path.parent.name).alias("ablation"), pl.all().exclude("ablation"))


def _ablation(run: AblationRun) -> pl.DataFrame:
    where = run.provenance()
    row = {
        "ablation": run.folder.name,
        "question": run.question,
        "baseline": run.baseline,
        "arms": len(run.arms),
        "metric": run.metric.unit,
        "seeds": len(run.seeds),
        "finished": run.finished,
        "archived": run.archived,
        **{name: where.get(name) for name in ("created", "code", "device")},
        "identity": run.identity,
        "tags": run.notes().tags,
        "folder": str(run.folder),
    }
    return pl.DataFrame([row], schema=ABLATION_SCHEMA)


def _verdict(run: AblationRun) -> pl.DataFrame:
    verdict = run.verdict()
    if verdict is None:
        return pl.DataFrame(schema=VERDICT_SCHEMA)
    about = {"ablation": run.folder.name, "metric": verdict.unit, "exploratory": verdict.exploratory}
    frame = verdict.table().with_columns(pl.lit(value, pl.String).alias(name) for name, value in about.items())
    return frame.with_columns(name=pl.col("arm").replace(run.names)).select(list(VERDICT_SCHEMA))


KEY = {"ablation": pl.String}
TABLES: dict[str, tuple[dict[str, Any], Callable[[AblationRun], pl.DataFrame]]] = {
    "ablations": (ABLATION_SCHEMA, _ablation),
    "verdicts": (VERDICT_SCHEMA, _verdict),
    "runs": (KEY | RUN_SCHEMA, lambda run: run.runs()),
    "evaluations": (KEY | EVALUATION_SCHEMA, lambda run: run.evaluations()),
    "scores": (KEY | SCORES_SCHEMA, lambda run: run.scores()),
}
"""Table -> its columns, and how it is read from one ablation. ``scores`` has further columns, labels of documents;
archives have no ``evaluations``."""
_HELP = (
    f"Tables: {', '.join(TABLES)}. Example: select arm, avg(report_value) from runs where ablation = 'quickstart' "
    "group by arm"
)
