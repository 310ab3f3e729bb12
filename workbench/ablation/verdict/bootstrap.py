"""The crossed bootstrap over seeds and clusters of documents.

Legend: S seeds, D documents, R bootstrap replicates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from workbench.ablation.verdict.statistics import finite_array, ratio_of_sums, require_between, widening

__all__ = ["Bootstrap", "crossed_bootstrap"]

WIDENED_BELOW = 20
"""Percentile intervals over fewer seeds than this are too short and are widened."""


@dataclass(frozen=True)
class Bootstrap:
    """Mean difference with its crossed-bootstrap interval, in the unit of the metric."""

    mean: float
    error: float
    """Standard deviation over the replicates, not widened."""
    low: float
    high: float


def crossed_bootstrap(
    arm_SD: ArrayLike,
    baseline_SD: ArrayLike,
    sizes_D: ArrayLike,
    clusters_D: ArrayLike | None = None,
    *,
    replicates: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Bootstrap:
    """Interval of the mean over seeds of the metric's (arm − baseline), seeds and clusters of documents both resampled.

    All seeds see the same documents, so the two factors are crossed (Owen 2007, "The pigeonhole bootstrap"): each
    replicate draws S seeds and D documents with replacement, once, and recomputes with their multiplicities w and v

        mean over s, weighted by w_s, of  Σ_d v_d (arm_sd − baseline_sd) / Σ_d v_d sizes_d.

    Documents that are near-duplicates of one another are one unit: whole clusters are drawn (Miller 2024,
    arXiv:2411.00640), and D is the number of clusters.

    For seed effects, document effects and interaction of variances σ_s², σ_d², σ_i² its variance is about
    σ_s²/S + σ_d²/D + 3 σ_i²/(S·D): never too small, and too large only in the last, usually smallest, term.

    Percentile intervals over few units are too short. Below n = 20 seeds or clusters, whichever are fewer, both ends
    are moved away from the estimate by √(n/(n − 1)) · t(n − 1) / z (ours; it repairs the seed part exactly for normal
    noise and is generous to the document part). One seed gives an infinite interval. One cluster leaves only the seeds
    to vary.

    Args:
        arm_SD: (S, D), amounts per seed and document.
        baseline_SD: (S, D), the same seeds and documents.
        sizes_D: (D,), sizes of the documents, positive.
        clusters_D: (D,), documents of one number are drawn together. Default: one cluster per document.
        replicates: number of draws R. Time grows with R · D, memory does not: draws are made in blocks.
        level: nominal coverage.
        seed: of the draws; the same seed draws the same seeds and documents for every arm.
    """
    arm_SD, baseline_SD = finite_array(arm_SD, "arm_SD", 2), finite_array(baseline_SD, "baseline_SD", 2)
    if arm_SD.shape != baseline_SD.shape:
        raise ValueError(f"arm_SD: got shape {arm_SD.shape}; expected the baseline's, {baseline_SD.shape}.")
    require_between(level, "level")
    estimate = float(ratio_of_sums(arm_SD - baseline_SD, sizes_D).mean())
    seeds, documents = arm_SD.shape
    # One matrix product per block gives the resampled sums of every seed's differences and of the sizes.
    columns_DC = np.vstack([arm_SD - baseline_SD, np.asarray(sizes_D, np.float64)]).T
    if clusters_D is not None:
        number_D = np.unique(np.asarray(clusters_D), return_inverse=True)[1]
        if number_D.shape != (documents,):
            raise ValueError(
                f"clusters_D: got shape {number_D.shape}; expected ({documents},), one number per document."
            )
        documents = int(number_D.max()) + 1
        summed = np.zeros((documents, columns_DC.shape[1]))
        np.add.at(summed, number_D, columns_DC)
        columns_DC = summed
    generator = np.random.default_rng(seed)
    weights_RS = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=replicates) / seeds
    statistic_R = np.empty(replicates)
    block = max(1, 2**20 // documents)
    for start in range(0, replicates, block):
        rows = slice(start, min(start + block, replicates))
        size = rows.stop - rows.start
        drawn = generator.integers(documents, size=(size, documents)) + documents * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * documents).reshape(size, documents)
        sums = counts.astype(np.float64) @ columns_DC
        statistic_R[rows] = (weights_RS[rows] * sums[:, :-1]).sum(1) / sums[:, -1]
    low, high = np.quantile(statistic_R, [(1 - level) / 2, (1 + level) / 2])
    error = float(statistic_R.std())
    if seeds == 1:
        return Bootstrap(estimate, error, -math.inf, math.inf)
    units = min(seeds, documents) if documents > 1 else seeds
    factor = widening(units, level) if units < WIDENED_BELOW else 1.0
    return Bootstrap(
        estimate, error, float(estimate - factor * (estimate - low)), float(estimate + factor * (high - estimate))
    )
