"""Ablations of the same arms at several sizes or horizons: whether the order holds, and scaling laws.

Imports no torch. Runs that share a trunk (`workbench branch`) are correlated over horizons: they count as one seed, so
nothing here adds seeds up over ablations.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl
from scipy import stats

from workbench.ablation.analysis.scaling import ScalingLaw, fit_scaling_law
from workbench.config import ConfigError
from workbench.status import Stage, Status

if TYPE_CHECKING:
    from workbench.ablation.run import AblationRun

__all__ = ["Comparison", "X", "compare", "rank_stability"]

X = {"flops": "training_flops", "parameters": "non_embedding", "tokens": "tokens"}
"""Variable of a scaling law -> column of the cost table."""


def rank_stability(table: pl.DataFrame) -> list[str]:
    """Whether the order of arms holds between every two ablations, in sentences.

    The order is that of the values; it depends on scale if a difference that both ablations show changes its sign.

    Args:
        table: columns ablation, arm, value, verdict, in order.
    """
    sentences = []
    names = table["ablation"].unique(maintain_order=True).to_list()
    for a, b in itertools.combinations(names, 2):
        one, two = (
            {r["arm"]: r for r in table.filter(pl.col("ablation") == name).iter_rows(named=True)} for name in (a, b)
        )
        shared = [arm for arm in one if arm in two and one[arm]["value"] is not None and two[arm]["value"] is not None]
        if len(shared) < 2:
            sentences.append(f"{a} and {b} share fewer than two arms that finished.")
            continue
        opposed = [arm for arm in shared if {one[arm]["verdict"], two[arm]["verdict"]} == {"better", "worse"}]
        tau = stats.kendalltau([one[arm]["value"] for arm in shared], [two[arm]["value"] for arm in shared]).statistic
        if opposed:
            finding = f"the order depends on scale: {', '.join(opposed)} is better in one and worse in the other"
        elif tau == 1:
            finding = "the order of all arms is the same"
        else:
            finding = "the order of the values differs, by no difference that both show"
        sentences.append(f"{a} and {b}: {finding} (Kendall's tau {tau:+.2f} over {len(shared)} arms).")
    return sentences


@dataclass(frozen=True)
class Comparison:
    """Ablations side by side."""

    table: pl.DataFrame
    """Columns: ablation (its folder's path if two have one name), arm, x, value, difference, verdict, rank (of the
    value, 1 is best)."""
    laws: Mapping[str, ScalingLaw]
    """Arm -> its law, for arms that finished in at least two ablations with different x."""
    x: str
    at: float | None
    unit: str
    notes: tuple[str, ...] = ()
    """Arms without a law, and why."""

    def __str__(self) -> str:
        lines = [f"{'ablation':24s} {'arm':20s} {self.x:>12s} {self.unit:>16s} {'difference':>11s}  rank  verdict"]
        for r in self.table.iter_rows(named=True):
            value, difference = (
                ("–" if v is None else f"{v:{f}}") for v, f in ((r["value"], ".4f"), (r["difference"], "+.4f"))
            )
            lines.append(
                f"{r['ablation']:24s} {r['arm']:20s} {r['x']:12.4g} {value:>16s} {difference:>11s}  "
                f"{r['rank'] or '–':>4}  {r['verdict']}"
            )
        lines += ["", *rank_stability(self.table)]
        for arm, law in self.laws.items():
            sentence = f"{arm}: {law.describe(self.x, self.unit)}"
            if self.at is not None:
                extrapolated, low, high = law.at(self.at)
                span = "" if low is None else f" ({low:.4f} to {high:.4f})"
                sentence += f"; extrapolated to {self.at:g}: {extrapolated:.4f}{span}"
            lines.append(f"{sentence}.")
        lines += self.notes
        return "\n".join(lines)


def compare(runs: Sequence[AblationRun], x: str = "flops", at: float | None = None) -> Comparison:
    """Compare finished ablations of the same arms, smallest first.

    Args:
        runs: the ablations.
        x: variable of the scaling laws: flops, parameters or tokens.
        at: x to extrapolate the laws to.

    Raises:
        ConfigError: if one is not finished, their metrics or baselines differ, or there is only one.
    """
    if x not in X:
        raise ConfigError.at("x", got=x, expected=" or ".join(X))
    if len(runs) < 2 or len({run.metric for run in runs}) != 1:
        raise ConfigError.at(
            "folders",
            got=f"{len(runs)} ablation(s) in {', '.join(sorted({r.metric.unit for r in runs}))}",
            expected="at least two, in one metric",
        )
    if len(baselines := sorted({run.baseline for run in runs})) > 1:
        raise ConfigError.at(
            "folders",
            got=f"ablations against {', '.join(baselines)}",
            expected="one baseline in all",
            do="Differences to different arms cannot be compared.",
        )
    ambiguous = len({run.name for run in runs}) < len(runs)
    rows: list[dict[str, Any]] = []
    seeds: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        verdict = run.verdict()
        if verdict is None:
            raise ConfigError.at(
                "folders", got=f"{run.name}, whose confirmation runs are missing", expected="finished ablations"
            )
        costs = {row["arm"]: row[X[x]] for row in run.cost().iter_rows(named=True)}
        order = sorted((r for r in verdict.rows if r.value is not None), key=lambda r: r.value or 0.0)
        ranks = {r.arm: number + 1 for number, r in enumerate(order)}
        for r in verdict.rows:
            rows.append(
                {
                    "ablation": str(run.folder) if ambiguous else run.name,
                    "arm": r.arm,
                    "x": float(costs[r.arm]),
                    "value": r.value,
                    "difference": r.difference,
                    "verdict": r.verdict,
                    "rank": ranks.get(r.arm),
                }
            )
        done = (pl.col("stage") == Stage.CONFIRMATION) & (pl.col("status") == Status.DONE)
        for arm, value in run.runs().filter(done).select("arm", "report_value").iter_rows():
            seeds.setdefault(arm, {}).setdefault(float(costs[arm]), []).append(value)
    table = pl.DataFrame(rows, infer_schema_length=None).sort("x", maintain_order=True)
    first = {name: i for i, name in enumerate(table["ablation"].unique(maintain_order=True))}
    table = table.sort(pl.col("ablation").replace_strict(first), maintain_order=True)
    laws, notes = {}, []
    for arm, points in seeds.items():
        if len(points) > 1:
            try:
                laws[arm] = fit_scaling_law(points)
            except ValueError as error:  # a solved task has zero loss
                notes.append(f"{arm}: no law. {error}")
    return Comparison(table, laws, x, at, runs[0].metric.unit, tuple(notes))
