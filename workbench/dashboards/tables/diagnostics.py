"""Diagnostics that layers logged during training."""

from __future__ import annotations

import polars as pl

from workbench.dashboards import style
from workbench.dashboards.snapshot import Snapshot

UNITS = {
    "half_life": "tokens",
    "selected_distance": "tokens",
    "index_recall": "share of the tokens with the most attention",
    "index_mass": "share of the attention",
    "index_divergence": "nats",
    "norm": "length",
    "violation": "share of an even load",
    "entropy": "nats",
    "gate": "share",
    "experts": "experts per token",
    "below_epsilon": "share",
}
"""Part of a diagnostic's name -> its unit; all others are plain numbers."""


def diagnostic_table(run: Snapshot) -> pl.DataFrame:
    """Layer diagnostics over training, the mean over an arm's confirmation runs (over its repeats, or else its
    tuning trials, while it has no confirmation run).

    Columns: arm, step, layer, name, index (position in a vector such as the load of every expert, else null), value,
    runs.
    """
    first_stage = pl.col("stage") == pl.col("stage").min().over(
        "arm"
    )  # "confirmation" sorts before "repeat" and "tuning"
    return (
        run.diagnostics()
        .filter(first_stage & pl.col("value").is_not_null())
        .group_by("arm", "step", "layer", "name", "index")
        .agg(value=pl.col("value").mean(), runs=pl.len().cast(pl.Int64))
        .sort("arm", "name", "layer", "step", "index")
    )


def diagnostic_names(run: Snapshot) -> list[str]:
    """The names of all logged diagnostics."""
    return run.unfiltered.diagnostics()["name"].unique().sort().to_list()


def diagnostic_title(name: str) -> str:
    """Title of an axis along a diagnostic."""
    unit = next((unit for part, unit in UNITS.items() if part in name), "value")
    return f"{style.label(name.replace('_', ' '))} ({unit})"
