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

from workbench.ablation.analysis.power import values_of
from workbench.ablation.analysis.scaling import PairedLaw, ScalingLaw, fit_paired_law, fit_scaling_law
from workbench.config import ConfigError

if TYPE_CHECKING:
    from workbench.ablation.run import AblationRun

__all__ = ["Comparison", "X", "compare", "rank_stability"]

X = {"flops": "training_flops", "parameters": "non_embedding", "tokens": "tokens"}
"""Variable of a scaling law -> column of the cost table."""


BUDGET_NOTED = 0.1
"""Share of a difference from which on the part that the budget's residual explains is written out."""


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
    value, 1 is best), budget (the part of the difference that the baseline's law gives the arm for another x than the
    baseline's; null without a law)."""
    laws: Mapping[str, ScalingLaw]
    """Arm -> its law, for arms that finished in at least two ablations with different x."""
    paired: Mapping[str, PairedLaw]
    """Arm -> the law of its paired difference to the baseline over the baseline's x, for arms that share seeds with it
    in at least four ablations."""
    x: str
    at: float | None
    unit: str
    baseline: str
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
        for arm, paired in self.paired.items():
            lines.append(self._paired(arm, paired))
        return "\n".join([*lines, *self._budgets(), *self.notes])

    def _paired(self, arm: str, law: PairedLaw) -> str:
        """The difference over sizes in words."""
        sizes = self.table.filter(pl.col("arm") == self.baseline)["x"]
        smallest, largest = (law.at(float(x or 0.0)).value for x in (sizes.min(), sizes.max()))  # type: ignore[arg-type]
        sentence = (
            f"{arm} − {self.baseline}, difference of laws over {law.points} sizes ({', '.join(law.fits)}): "
            f"{smallest:+.4f} {self.unit} at the smallest, {largest:+.4f} at the largest"
        )
        if self.at is not None:
            at = law.at(self.at)
            interval = "no interval because a size has one seed"
            if at.low is not None:
                interval = f"95 % prediction interval {at.low:+.4f} to {at.high:+.4f}"
            sentence += f"; predicted at {self.at:g}: {at.value:+.4f} ({interval})"
        return f"{sentence}."

    def _budgets(self) -> list[str]:
        """What arms gain or lose by another x than the baseline's."""
        rows = self.table.filter(pl.col("budget").abs() > BUDGET_NOTED * pl.col("difference").abs())
        return [
            f"{row['arm']} in {row['ablation']}: {row['x']:.4g} {self.x} against {row['baseline_x']:.4g} of "
            f"{self.baseline}; by its law that alone is {row['budget']:+.4f} of the difference of "
            f"{row['difference']:+.4f}."
            for row in rows.iter_rows(named=True)
        ]


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
    pairs: dict[str, dict[float, tuple[list[float], list[float]]]] = {}
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
                    "baseline_x": float(costs[run.baseline]),
                }
            )
        by_arm = values_of([run])
        base = by_arm.get(run.baseline, {})
        for arm, by_seed in by_arm.items():
            seeds.setdefault(arm, {}).setdefault(float(costs[arm]), []).extend(by_seed.values())
            shared = sorted(set(by_seed) & set(base)) if arm != run.baseline else []
            if shared:
                one, other = pairs.setdefault(arm, {}).setdefault(float(costs[run.baseline]), ([], []))
                one += [by_seed[seed] for seed in shared]
                other += [base[seed] for seed in shared]
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
    paired = {}
    for arm, by_size in pairs.items():
        try:
            paired[arm] = fit_paired_law(by_size)
        except ValueError:  # fewer than four sizes, or zero loss, which is noted above
            continue
    baseline = runs[0].baseline
    table = table.with_columns(budget=pl.Series(_budget_part(table, laws.get(baseline)), dtype=pl.Float64))
    return Comparison(table, laws, paired, x, at, runs[0].metric.unit, baseline, tuple(notes))


def _budget_part(table: pl.DataFrame, law: ScalingLaw | None) -> list[float | None]:
    """The difference that the baseline's law gives each row for its x."""
    if law is None:
        return [None] * len(table)
    return [law.at(x)[0] - law.at(baseline_x)[0] for x, baseline_x in table.select("x", "baseline_x").iter_rows()]
