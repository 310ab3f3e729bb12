"""What the noise of a measurement consists of: initial weights, data order, everything else, documents.

A crossed design trains every combination of a few seeds of each component (`workbench components`). Its variance is
decomposed by the analysis of variance of a balanced crossed random-effects model (Searle, Casella and McCulloch 1992,
"Variance components", chapter 4); intervals are generalised confidence intervals (Weerahandi 1993). Imports no torch.

Legend: I, J, K seeds of initial weights, data order, everything else; C clusters of documents; D documents; R draws.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from workbench.ablation.spec.protocol import Components
from workbench.ablation.verdict.statistics import Floats, ratio_of_sums
from workbench.metric import Metric
from workbench.seeding import COMPONENTS

__all__ = ["LABELS", "Estimate", "Term", "component_table", "sentences", "variance_terms"]

Term = frozenset[int]
"""Factors (axes of the table of values) whose interaction is meant; one factor is a main effect."""
LABELS = {
    "init": "initial weights",
    "order": "data order",
    "other": "everything else",
    "combination": "their combination",
    "documents": "documents",
}
"""Component -> how sentences name it. The combination is what only a particular set of seeds has: every interaction,
and whatever a run does not repeat with equal seeds."""
DRAWS = 4_000
COMPONENT_SCHEMA = {
    "quantity": pl.String,
    "component": pl.String,
    "levels": pl.Int64,
    "sd": pl.Float64,
    "sd_low": pl.Float64,
    "sd_high": pl.Float64,
    "share": pl.Float64,
    "share_low": pl.Float64,
    "share_high": pl.Float64,
    "share_with_documents": pl.Float64,
}


@dataclass(frozen=True)
class Estimate:
    """The variance that one term contributes to a single value."""

    variance: float
    """Unbiased, so it may be negative."""
    draws_R: Floats
    """(R,), generalised pivotal quantities of it."""

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.variance + other.variance, self.draws_R + other.draws_R)


def variance_terms(
    values: Floats, degrees: Mapping[Term, float] = {}, draws: int = DRAWS, seed: int = 0
) -> dict[Term, Estimate]:
    """Variance of every main effect and interaction of a balanced crossed design with one value in each cell.

    With mean squares MS_U = SS_U / df_U of every set of factors U and E[MS_U] = Σ over V ⊇ U of σ²_V · (number of
    cells) / Π_{f ∈ V} levels_f, inclusion–exclusion gives the unbiased

        σ²_U = Σ over V ⊇ U of (−1)^|V \\ U| MS_V / Π_{f ∉ U} levels_f.

    For normal effects SS_U / E[MS_U] is chi-square with df_U degrees of freedom, independent over U; replacing each
    MS_U by SS_U / χ² draws the generalised pivotal quantity. The term of all factors includes the residual.

    Args:
        values: one axis per factor, at least two levels each.
        degrees: term -> degrees of freedom for its chi-square, where they are not df_U.
        draws: R.
        seed: of the draws.

    Examples:
        >>> terms = variance_terms(np.array([[1.0, 2.0], [3.0, 4.0]]))  # rows differ by 2, columns by 1, no interaction
        >>> [round(terms[frozenset(term)].variance, 3) for term in ([0], [1], [0, 1])]
        [2.0, 0.5, 0.0]
    """
    random, shape = np.random.default_rng(seed), values.shape
    mean_squares: dict[Term, Estimate] = {}
    for term in _terms(values.ndim):
        effects, df = values, 1
        for factor, levels in enumerate(shape):
            means = effects.mean(factor, keepdims=True)
            effects = effects - means if factor in term else np.broadcast_to(means, effects.shape)
            df *= levels - 1 if factor in term else 1
        square, chi_df = float((effects**2).sum()) / df, degrees.get(term, df)
        mean_squares[term] = Estimate(square, square * chi_df / random.chisquare(chi_df, draws))
    terms = {}
    for term in mean_squares:
        cells = np.prod([levels for factor, levels in enumerate(shape) if factor not in term])
        above = [(other, (-1) ** len(other - term)) for other in mean_squares if other >= term]
        variance = sum(sign * mean_squares[other].variance for other, sign in above) / cells
        draws_R = sum(sign * mean_squares[other].draws_R for other, sign in above) / cells
        terms[term] = Estimate(float(variance), np.asarray(draws_R))
    return terms


def _terms(factors: int) -> Iterator[Term]:
    for size in range(1, factors + 1):
        yield from map(frozenset, itertools.combinations(range(factors), size))


def component_table(run: Any) -> pl.DataFrame:
    """Variance components of each arm's value, and of each arm's paired difference to the baseline.

    Columns:

    - quantity: an arm, or "arm − baseline"
    - component: init, order, other, combination, documents; of those that vary
    - levels: seeds of the component, runs (combination), clusters (documents)
    - sd, sd_low, sd_high: what the component adds to one run's value, in the metric's unit, with its 95 % interval;
      documents: to the value of all clusters, common to every run
    - share, share_low, share_high: share of the variance between runs, negative estimates taken as 0; null for
      documents and where runs do not differ
    - share_with_documents: share of the variance of a run's value on a fresh sample of documents

    Of a design with failed runs the largest complete part counts: seeds are left out, those with most failures first.
    Empty while runs are missing, or if the ablation crosses no seeds.

    Args:
        run: any kind of run (:class:`workbench.dashboards.view.RunView`).
    """
    rows = []
    for quantity, values_IJK, clusters_IJKC in _quantities(run):
        rows += _rows(quantity, values_IJK, clusters_IJKC)
    return pl.DataFrame(rows, schema=COMPONENT_SCHEMA, orient="row")


def sentences(table: pl.DataFrame, unit: str) -> list[str]:
    """A :func:`component_table` in words, one sentence per quantity.

    Args:
        unit: of the metric.
    """
    lines = []
    for (quantity,), rows in table.group_by("quantity", maintain_order=True):
        between = rows.filter(pl.col("component") != "documents").sort("share", descending=True)
        if between["share"].null_count():
            lines.append(f"{quantity}: the runs do not differ; the seeds do not reach what is measured.")
            continue
        parts = [
            f"{LABELS[row['component']]} {100 * row['share']:.0f} % "
            f"({100 * row['share_low']:.0f} to {100 * row['share_high']:.0f})"
            for row in between.iter_rows(named=True)
        ]
        total = math.hypot(*between["sd"])
        line = f"{quantity}: sd over runs {total:.2g} {unit}, of its variance {', '.join(parts)}"
        for row in rows.filter(pl.col("component") == "documents").iter_rows(named=True):
            line += (
                f"; a fresh sample of {row['levels']} clusters of documents adds sd {row['sd']:.2g} "
                f"({row['sd_low']:.2g} to {row['sd_high']:.2g}), common to all runs"
            )
        lines.append(f"{line}.")
    return lines


def _rows(quantity: str, values_IJK: Floats, clusters_IJKC: Floats) -> list[tuple[object, ...]]:
    varied = [axis for axis, levels in enumerate(values_IJK.shape) if levels > 1]
    between: dict[str, tuple[int, Estimate]] = {}
    for term, estimate in variance_terms(np.squeeze(values_IJK)).items():
        if len(term) == 1:
            axis = varied[next(iter(term))]
            between[COMPONENTS[axis]] = values_IJK.shape[axis], estimate
        else:
            before = between.get("combination")
            between["combination"] = values_IJK.size, before[1] + estimate if before else estimate
    components = {**between, **_documents(clusters_IJKC)}
    positive = {name: max(0.0, estimate.variance) for name, (_, estimate) in components.items()}
    draws = {name: np.maximum(0.0, estimate.draws_R) for name, (_, estimate) in components.items()}
    total, total_R = sum(positive[name] for name in between), np.sum([draws[name] for name in between], 0)
    everything = sum(positive.values())
    rows: list[tuple[object, ...]] = []
    for name, (levels, _) in components.items():
        sd_low, sd_high = np.sqrt(np.quantile(draws[name], (0.025, 0.975)))
        shares: list[float | None] = [None, None, None]
        if name in between and total > 0:
            share_R = draws[name] / np.where(total_R > 0, total_R, 1)
            shares = [positive[name] / total, *map(float, np.quantile(share_R, (0.025, 0.975)))]
        with_documents = positive[name] / everything if everything > 0 else None
        sd = float(np.sqrt(positive[name]))
        rows.append((quantity, name, levels, sd, float(sd_low), float(sd_high), *shares, with_documents))
    return rows


def _documents(clusters_IJKC: Floats) -> dict[str, tuple[int, Estimate]]:
    """The variance that a sample of C clusters gives the mean over them, common to every run.

    Per-document losses have heavy tails: the chi-square of the clusters' mean square has 2 / (2 / (C − 1) + κ / C)
    degrees of freedom, κ the excess kurtosis (from the variance of a sample variance; never more than C − 1).
    """
    clusters = clusters_IJKC.shape[-1]
    if clusters < 2:
        return {}
    mean_C = clusters_IJKC.mean((0, 1, 2))
    centred_C = mean_C - mean_C.mean()
    square = (centred_C**2).mean()
    kurtosis = max(0.0, float((centred_C**4).mean() / square**2) - 3) if square > 0 else 0.0
    varied = np.squeeze(clusters_IJKC)
    term = frozenset([varied.ndim - 1])
    estimate = variance_terms(varied, {term: 2 / (2 / (clusters - 1) + kurtosis / clusters)})[term]
    return {"documents": (clusters, Estimate(estimate.variance / clusters, estimate.draws_R / clusters))}


def _quantities(run: Any) -> Iterator[tuple[str, Floats, Floats]]:
    """Name, values (I, J, K) and values per cluster (I, J, K, C) of each quantity, of a complete design."""
    components = run.components
    if components is None:
        return
    measured = _measured(run)
    if not run.finished and any(len(measured.get(arm, {})) < len(run.seeds) for arm in run.arms):
        return
    for arm in run.arms:
        for base in (None,) if arm == run.baseline else (None, run.baseline):
            of_arm, of_base = measured.get(arm, {}), measured.get(base or arm, {})
            numbers = complete_design(components, [run.seeds.index(seed) for seed in of_arm if seed in of_base])
            if numbers is None:
                continue
            values, clusters = [], []
            for seed in (run.seeds[number] for number in numbers.flat):
                amounts_D, sizes_D, clusters_D = of_arm[seed]
                amounts_D = amounts_D if base is None else amounts_D - of_base[seed][0]
                values.append(ratio_of_sums(amounts_D[None], sizes_D)[0])
                clusters.append(_by_cluster(amounts_D, sizes_D, clusters_D))
            values_IJK = np.array(values).reshape(numbers.shape)
            yield (arm if base is None else f"{arm} − {base}"), values_IJK, np.reshape(clusters, (*numbers.shape, -1))


def complete_design(components: Components, numbers: Sequence[int]) -> np.ndarray | None:
    """The largest part of a crossed design that the runs ``numbers`` complete, found by leaving out the seed with the
    largest share of missing runs until none is missing.

    Returns:
        (I, J, K), run numbers; None if no component has two seeds left.
    """
    grid = np.arange(components.runs).reshape(components.shape)
    missing = ~np.isin(grid, list(numbers))
    while missing.any():
        if max(grid.shape) == 1:
            return None
        shares = [
            (missing.mean(tuple(other for other in range(3) if other != axis))[level], axis, level)
            for axis in range(3)
            if grid.shape[axis] > 1
            for level in range(grid.shape[axis])
        ]
        _, axis, level = max(shares, key=lambda entry: entry[0])
        grid, missing = np.delete(grid, level, axis), np.delete(missing, level, axis)
    return grid if max(grid.shape) > 1 else None


def _measured(run: Any) -> dict[str, dict[int, tuple[Floats, Floats, np.ndarray]]]:
    """Arm -> seed -> amounts, sizes and clusters of the documents, (D,) each."""
    metric: Metric = run.metric
    measured: dict[str, dict[int, tuple[Floats, Floats, np.ndarray]]] = {}
    for arm, seed, report in run.reports():
        amounts_D = metric.scale * report[metric.numerator].to_numpy().astype(np.float64)
        sizes_D = report[metric.denominator].to_numpy().astype(np.float64)
        is_clustered = "cluster" in report.columns and not report["cluster"].null_count()
        clusters_D = report["cluster"].to_numpy() if is_clustered else np.arange(len(report))
        measured.setdefault(arm, {})[seed] = amounts_D, sizes_D, clusters_D
    return measured


def _by_cluster(amounts_D: Floats, sizes_D: Floats, clusters_D: np.ndarray) -> Floats:
    """(C,), linearised contributions whose mean is the metric (Cochran 1977, section 6.13).

    With R = Σ amounts / Σ sizes they are R + C · Σ over the cluster of (amounts − R · sizes) / Σ sizes.
    """
    ratio = amounts_D.sum() / sizes_D.sum()
    _, index_D = np.unique(clusters_D, return_inverse=True)
    residual_C = np.bincount(index_D, amounts_D - ratio * sizes_D)
    return np.asarray(ratio + len(residual_C) * residual_C / sizes_D.sum())
