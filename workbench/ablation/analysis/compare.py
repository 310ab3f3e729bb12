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

from workbench.ablation.analysis.power import values_of
from workbench.ablation.analysis.scaling import PairedLaw, ScalingLaw, fit_paired_law, fit_scaling_law
from workbench.ablation.design import Candidate, Series, series
from workbench.ablation.verdict.ranking import ranks
from workbench.config import ConfigError

if TYPE_CHECKING:
    from workbench.ablation.run import AblationRun

__all__ = ["Comparison", "X", "compare", "rank_stability"]

X = {"flops": "training_flops", "parameters": "non_embedding", "tokens": "tokens"}
"""Variable of a scaling law -> column of the cost table."""


TIES = "Ranks count the arms that are shown to be better; arms of one rank (=) are not shown to differ."
BUDGET_NOTED = 0.1
"""Share of a difference from which on the part that the budget's residual explains is written out."""


def rank_stability(table: pl.DataFrame) -> list[str]:
    """Whether the order of arms is the same in every two ablations, in sentences.

    Only pairs of arms of different rank in both ablations are compared: the values of arms that tie say nothing about
    their order. The order depends on scale if such a pair changes places.

    Args:
        table: columns ablation, arm, rank, in order.
    """
    sentences = []
    names = table["ablation"].unique(maintain_order=True).to_list()
    for a, b in itertools.combinations(names, 2):
        one, two = (dict(table.filter(pl.col("ablation") == name).select("arm", "rank").iter_rows()) for name in (a, b))
        shared = [arm for arm in one if one[arm] is not None and two.get(arm) is not None]
        if len(shared) < 2:
            sentences.append(f"{a} and {b} share fewer than two arms that finished.")
            continue
        pairs = list(itertools.combinations(shared, 2))
        ordered = [
            (x, y) if one[x] < one[y] else (y, x) for x, y in pairs if one[x] != one[y] and two[x] != two[y]
        ]  # the better one in the first ablation goes first
        changed = [f"{x} before {y}" for x, y in ordered if two[x] > two[y]]
        if changed:
            finding = f"the order depends on scale: {', '.join(changed)} in {a}, the other way round in {b}"
        elif not ordered:
            finding = "no order to compare, because no two arms are shown to differ in both"
        elif len(ordered) == len(pairs):
            finding = "the order of all arms is the same"
        else:
            finding = "the order is the same as far as both show one; other arms tie"
        sentences.append(f"{a} and {b}: {finding} ({len(ordered)} of {len(pairs)} pairs of arms).")
    return sentences


@dataclass(frozen=True)
class Comparison:
    """Ablations side by side."""

    table: pl.DataFrame
    """Columns: ablation (its folder's path if two have one name), arm, x, value, difference, verdict, rank
    (:func:`workbench.ablation.verdict.ranking.ranks`), baseline_x, budget (the part of the difference that the
    baseline's law gives the arm for another x than the baseline's; null without a law)."""
    laws: Mapping[str, ScalingLaw]
    """Arm -> its law, for arms that finished at three distinct x or more."""
    paired: Mapping[str, PairedLaw]
    """Arm -> the law of its paired difference to the baseline over the baseline's x, for arms that share seeds with it
    in at least four ablations."""
    x: str
    at: float | None
    unit: str
    baseline: str
    notes: tuple[str, ...] = ()
    """Arms without a law, and why."""
    left_out: tuple[str, ...] = ()
    """Ablations and arms that were given and are not compared, and why."""

    def __str__(self) -> str:
        lines = [f"{'ablation':24s} {'arm':20s} {self.x:>12s} {self.unit:>16s} {'difference':>11s}  rank  verdict"]
        shared = self.table.group_by("ablation", "rank").len().filter(pl.col("len") > 1)
        ties = set(shared.select("ablation", "rank").iter_rows())
        for r in self.table.iter_rows(named=True):
            rank = "–" if r["rank"] is None else f"{r['rank']}{'=' * ((r['ablation'], r['rank']) in ties)}"
            value, difference = (
                ("–" if v is None else f"{v:{f}}") for v, f in ((r["value"], ".4f"), (r["difference"], "+.4f"))
            )
            lines.append(
                f"{r['ablation']:24s} {r['arm']:20s} {r['x']:12.4g} {value:>16s} {difference:>11s}  "
                f"{rank:>4}  {r['verdict']}"
            )
        lines += ["", *([TIES] if ties else []), *rank_stability(self.table)]
        for arm, law in self.laws.items():
            sentence = f"{arm}: {law.describe(self.x, self.unit)}"
            if self.at is not None:
                extrapolated, low, high = law.at(self.at)
                span = "" if low is None else f" ({low:.4f} to {high:.4f})"
                sentence += f"; extrapolated to {self.at:g}: {extrapolated:.4f}{span}"
            lines.append(f"{sentence}.")
        for arm, paired in self.paired.items():
            lines.append(self._paired(arm, paired))
        left_out = [f"Left out: {sentence}" for sentence in self.left_out]
        return "\n".join([*lines, *self._budgets(), *self.notes, *left_out])

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

    What is no size of the first one (:func:`workbench.ablation.design.series`) is left out, with the reason.

    Args:
        runs: the ablations.
        x: variable of the scaling laws: flops, parameters or tokens.
        at: x to extrapolate the laws to.

    Raises:
        ConfigError: if fewer than two ablations are sizes of the first one.
    """
    if x not in X:
        raise ConfigError.at("x", got=x, expected=" or ".join(X))
    ambiguous = len({run.name for run in runs}) < len(runs)
    names = [str(run.folder) if ambiguous else run.name for run in runs]
    verdicts = [run.verdict() if run.finished else None for run in runs]
    costs = [dict(run.cost().select("arm", pl.col(X[x]).cast(pl.Float64)).iter_rows()) for run in runs]
    candidates = [
        Candidate(name, run.design, verdict is not None, cost)
        for name, run, verdict, cost in zip(names, runs, verdicts, costs)
    ]
    joined = series(candidates[0], candidates[1:]) if candidates else Series((), ())
    baseline = runs[0].baseline if runs else ""
    arms, left_out = list(joined.arms), list(joined.left_out)
    for i, run in enumerate(runs):
        if arms[i] and (run.baseline != baseline or baseline not in arms[i]):
            against = f"compared with {run.baseline}, not with {baseline}"
            left_out.append(f"{names[i]}: {against if run.baseline != baseline else 'its baseline is left out'}.")
            arms[i] = ()
    if sum(map(bool, arms)) < 2:
        raise ConfigError.at(
            "folders",
            got=f"{len(runs)} ablation(s), of which {sum(map(bool, arms))} can be compared",
            expected="at least two sizes of the same arms on the same data",
            do=" ".join(left_out),
        )
    rows: list[dict[str, Any]] = []
    seeds: dict[str, dict[float, list[float]]] = {}
    pairs: dict[str, dict[float, tuple[list[float], list[float]]]] = {}
    for name, run, verdict, cost, included in zip(names, runs, verdicts, costs, arms):
        if verdict is None or not included:
            continue
        ranked = ranks(verdict)
        for r in verdict.rows:
            if r.arm in included:
                rows.append(
                    {
                        "ablation": name,
                        "arm": r.arm,
                        "x": cost[r.arm],
                        "value": r.value,
                        "difference": r.difference,
                        "verdict": r.verdict,
                        "rank": ranked[r.arm],
                        "baseline_x": cost[baseline],
                    }
                )
        by_arm = {arm: by_seed for arm, by_seed in values_of([run]).items() if arm in included}
        base = by_arm.get(baseline, {})
        for arm, by_seed in by_arm.items():
            seeds.setdefault(arm, {}).setdefault(cost[arm], []).extend(by_seed.values())
            shared = sorted(set(by_seed) & set(base)) if arm != baseline else []
            if shared:
                one, other = pairs.setdefault(arm, {}).setdefault(cost[baseline], ([], []))
                one += [by_seed[seed] for seed in shared]
                other += [base[seed] for seed in shared]
    table = pl.DataFrame(rows, infer_schema_length=None).sort("x", maintain_order=True)
    first = {name: i for i, name in enumerate(table["ablation"].unique(maintain_order=True))}
    table = table.sort(pl.col("ablation").replace_strict(first), maintain_order=True)
    laws, notes = {}, []
    for arm, points in seeds.items():
        try:
            laws[arm] = fit_scaling_law(points)
        except ValueError as error:  # fewer than three sizes; a solved task has zero loss
            notes.append(f"{arm}: no law; {error}")
    paired = {}
    for arm, by_size in pairs.items():
        try:
            paired[arm] = fit_paired_law(by_size)
        except ValueError:  # fewer than four sizes, or zero loss, which is noted above
            continue
    table = table.with_columns(budget=pl.Series(_budget_part(table, laws.get(baseline)), dtype=pl.Float64))
    unit = runs[0].metric.unit
    return Comparison(table, laws, paired, x, at, unit, baseline, tuple(notes), tuple(left_out))


def _budget_part(table: pl.DataFrame, law: ScalingLaw | None) -> list[float | None]:
    """The difference that the baseline's law gives each row for its x."""
    if law is None:
        return [None] * len(table)
    return [law.at(x)[0] - law.at(baseline_x)[0] for x, baseline_x in table.select("x", "baseline_x").iter_rows()]
