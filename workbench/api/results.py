"""Functions that read results, and what is installed."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from workbench.api.answers import Comparison, Doctor, Ledger, RunTable, Variant, Variants, plain, plain_rows
from workbench.config import ConfigError, nearest, require

if TYPE_CHECKING:
    import polars as pl

    from workbench.metric import Metric
    from workbench.registry import Registry

Row = dict[str, Any]

__all__ = ["Listed", "compare", "described", "doctor", "ledger", "listing", "run_table", "table", "variants"]


def variants(name: str | None = None) -> Variants:
    """Registered mixers, feed-forwards, embeddings, residuals, decoding policies, data sources, corpora, evaluation
    suites and launchers.

    Args:
        name: those of this name only.

    Raises:
        ConfigError: if nothing has that name.
    """
    from workbench.ablation.spec.launch import launchers
    from workbench.contract import embeddings, feedforwards, mixers, residuals
    from workbench.data import sources
    from workbench.data.corpora import corpora
    from workbench.decoding.policy import policies
    from workbench.evaluation.suites import suites

    registries: list[Registry[Any]] = [
        *(mixers, feedforwards, embeddings, residuals),
        *(policies, sources, corpora, suites, launchers),
    ]
    names = {each for registry in registries for each in registry}
    known = name is None or name in names
    do = "" if known else nearest(name, names)
    require(known, "name", got=name, expected="something that `workbench variants` lists", do=do)
    return Variants(
        variants=[described(registry, each) for registry in registries for each in registry if name in (None, each)]
    )


def described(registry: Registry[Any], name: str) -> Variant:
    """One registered class: what its file says about it, and its settings."""
    cls = registry[name]
    capabilities = getattr(cls, "capabilities", None)
    documentation = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or cls.__doc__ or "")
    paper = re.search(r"arXiv (\d{4}\.\d{4,5})", documentation.partition("\n\n")[0])
    fields = [
        {
            "name": field,
            "default": None if info.is_required() else plain(info.get_default(call_default_factory=True)),
            "description": info.description or "",
        }
        for field, info in cls.Config.model_fields.items()
        if field != "kind"
    ]
    return Variant(
        kind=registry.noun,
        name=name,
        description=(cls.__doc__ or "").strip().splitlines()[0],
        paper=paper[1] if paper else "",
        settings=[field["name"] for field in fields],
        capabilities=[word for word in ("causal", "segments", "decode") if getattr(capabilities, word, False)],
        documentation=documentation,
        fields=fields,
        source=str(inspect.getsourcefile(cls)),
    )


def doctor() -> Doctor:
    """This machine: versions, device, plug-ins, space, and what is missing for what."""
    from workbench.api.machine import checks
    from workbench.contract import feedforwards, mixers
    from workbench.environment import environment
    from workbench.registry import broken_plugins

    where = environment()
    libraries = where.pop("libraries")
    found = [*mixers, *feedforwards]  # loads plug-ins, broken ones too
    return Doctor(
        environment={name: str(value) for name, value in {**where, **libraries, "cores": os.cpu_count()}.items()},
        variants=found,
        free_disk_gb=shutil.disk_usage(".").free / 1e9,
        broken_plugins=dict(broken_plugins),
        checks=checks(broken_plugins),
    )


class Listed(NamedTuple):
    """The rows of one ablation."""

    folder: Path
    metric: Metric
    state: str
    """How far it is, in one line."""
    arms: list[Row]
    """One row per arm (:func:`workbench.results.listing.arm_rows`)."""
    runs: list[Row]
    """One row per run (:func:`workbench.results.listing.run_rows`)."""
    records: pl.DataFrame
    """The runs of ``runs`` with every column of :data:`workbench.results.tables.RUN_SCHEMA`."""


def listing(
    results: str | Path = "results", names: Sequence[str] = (), where: str = "", by_run: bool = False
) -> list[Listed]:
    """Arms and runs of ablations, those without any left out.

    Args:
        results: folder of all results.
        names: of ablations in it, or paths of ablations, of archives, or of folders of them; default all in it.
        where: which rows (:mod:`workbench.results.filters`).
        by_run: whether ``where`` chooses runs; else it chooses arms, with all their runs.

    Raises:
        ConfigError: for an unknown name, or a mistake in the filter.
    """
    import polars as pl

    from workbench.ablation.run import AblationRun, ablation_folders, named_ablations
    from workbench.results.filters import Filter
    from workbench.results.listing import arm_rows, columns_of, run_rows

    found: list[Listed] = []
    for folder in named_ablations(names, results) if names else ablation_folders(results):
        try:
            run = AblationRun(folder)
        except ConfigError:
            if names:
                raise
            continue
        frame = run.runs()
        if not len(frame):
            continue
        state = f"archive, {len(frame)} runs" if run.archived else f"{len(frame)} of {run.total} runs"
        listed = Listed(folder, run.metric, state, arm_rows(frame, run.arms), run_rows(frame, run.arms), frame)
        found.append(listed)
    if not where or not found:
        return found
    chosen = Filter.parse(where, columns_of(row for part in found for row in (part.runs if by_run else part.arms)))
    for i, part in enumerate(found):
        about = part.folder.name
        if by_run:
            runs = [row for row in part.runs if chosen.matches(row, about)]
            arms = part.arms
        else:
            arms = [row for row in part.arms if chosen.matches(row, about)]
            runs = [row for row in part.runs if row["arm"] in {arm["arm"] for arm in arms}]
        records = part.records.filter(pl.col("run").is_in([row["run"] for row in runs]))
        found[i] = part._replace(
            arms=[arm for arm in arms if arm["arm"] in {row["arm"] for row in runs}], runs=runs, records=records
        )
    return [part for part in found if part.runs]


def table(
    results: str | Path = "results", names: Sequence[str] = (), where: str = "", by_run: bool = False
) -> RunTable:
    """Runs of ablations, with the columns of :data:`workbench.results.tables.RUN_SCHEMA`, and their arms; arguments as
    in :func:`listing`."""
    return run_table(listing(results, names, where, by_run))


def run_table(listed: Sequence[Listed]) -> RunTable:
    """What :func:`listing` has found as an answer."""
    return RunTable(
        rows=[{"ablation": part.folder.name, **row} for part in listed for row in plain_rows(part.records)],
        arms=[plain({"ablation": part.folder.name, **row}) for part in listed for row in part.arms],
    )


def compare(folders: Sequence[str | Path], x: str = "flops", at: float | None = None) -> Comparison:
    """Finished ablations of the same arms side by side: whether their order holds, and each arm's scaling law.

    Args:
        folders: of the ablations, smallest first.
        x: variable of the law: flops, parameters or tokens.
        at: where to extrapolate it to.

    Raises:
        ConfigError: if they cannot be compared.
    """
    from workbench.ablation.analysis.compare import compare as over_scales
    from workbench.ablation.run import AblationRun

    found = over_scales([AblationRun(folder) for folder in folders], x, at)
    return Comparison(
        baseline=found.baseline,
        metric=found.unit,
        x=found.x,
        table=plain_rows(found.table),
        laws={arm: law.describe(found.x, found.unit) for arm, law in found.laws.items()},
        text=str(found),
    )


def ledger(results: str | Path = "results") -> Ledger:
    """Who opened which report documents with which runs. The lines are not verified before
    :func:`workbench.ablation.analysis.looks.verify` has been called.
    """
    from workbench.ablation.analysis.looks import launch_table, opening_table
    from workbench.results.ledger import history

    return Ledger(
        launches=plain_rows(launch_table(results)),
        openings=plain_rows(opening_table(results)),
        lines=sum(len(part.hashes) for part in history(results).ledgers),
    )
