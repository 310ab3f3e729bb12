"""The verdict as a table."""

from __future__ import annotations

import polars as pl

from workbench.dashboards.snapshot import Snapshot


def effect_table(run: Snapshot) -> pl.DataFrame:
    """The verdict, one row per arm; no row while there is no verdict.

    Columns: the fields of :class:`workbench.ablation.verdict.verdict.ArmVerdict`.
    """
    from workbench.ablation.verdict.verdict import Verdict

    table = (run.verdict() or Verdict(run.baseline, (), None, run.alpha, None, None)).table()
    return table.filter(pl.col("arm").is_in(run.arms))


def secondary_table(run: Snapshot) -> pl.DataFrame:
    """The verdict by secondary metrics, one row per metric and arm, in the declared order; no row where none is
    declared or there is no verdict.

    Columns: metric, unit, then the fields of :class:`workbench.ablation.verdict.verdict.ArmVerdict`.
    """
    from workbench.ablation.verdict.verdict import Verdict

    table = (run.verdict() or Verdict(run.baseline, (), None, run.alpha, None, None)).secondary_table()
    return table.filter(pl.col("arm").is_in(run.arms))
