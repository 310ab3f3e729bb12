"""Functions that read results, and what is installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.api.answers import Comparison, Doctor, Ledger, Table, Variant, Variants, plain_rows

if TYPE_CHECKING:
    from workbench.registry import Registry

__all__ = ["compare", "doctor", "ledger", "table", "variants"]


def variants() -> Variants:
    """Registered mixers, feed-forwards, embeddings, residuals, decoding policies, data sources, corpora, launchers."""
    from workbench.ablation.spec.launch import launchers
    from workbench.contract import embeddings, feedforwards, mixers, residuals
    from workbench.data import sources
    from workbench.data.corpora import corpora
    from workbench.decoding.policy import policies

    registries: list[Registry[Any]] = [
        mixers,
        feedforwards,
        embeddings,
        residuals,
        policies,
        sources,
        corpora,
        launchers,
    ]
    return Variants(variants=[_variant(registry, name) for registry in registries for name in registry])


def _variant(registry: Registry[Any], name: str) -> Variant:
    cls = registry[name]
    capabilities = getattr(cls, "capabilities", None)
    return Variant(
        kind=registry.noun,
        name=name,
        description=(cls.__doc__ or "").strip().splitlines()[0],
        settings=[field for field in cls.Config.model_fields if field != "kind"],
        capabilities=[word for word in ("causal", "segments", "decode") if getattr(capabilities, word, False)],
    )


def doctor() -> Doctor:
    """This machine: versions, device, plug-ins, space."""
    from workbench.contract import feedforwards, mixers
    from workbench.environment import environment
    from workbench.registry import broken_plugins

    where = environment()
    libraries = where.pop("libraries")
    return Doctor(
        environment={name: str(value) for name, value in {**where, **libraries, "cores": os.cpu_count()}.items()},
        variants=[*mixers, *feedforwards],
        free_disk_gb=shutil.disk_usage(".").free / 1e9,
        broken_plugins=dict(broken_plugins),
    )


def table(results: str | Path = "results") -> Table:
    """All runs of all ablations, with the columns of :data:`workbench.results.tables.RUN_SCHEMA`."""
    from workbench.ablation.run import table as all_runs

    return Table(rows=plain_rows(all_runs(results)))


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
