"""How many seeds a question needs, given a pilot's noise and its uncertainty. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from scipy import special

from workbench.ablation.verdict.statistics import (
    POWER,
    Floats,
    NoiseFloor,
    detectable_difference,
    equivalence_power,
    noise_floor,
    paired_correlation,
    pooled_sd,
    power_of,
    seeds_for_equivalence,
    seeds_needed,
)
from workbench.results.tables import confirmed

if TYPE_CHECKING:
    from workbench.ablation.run import AblationRun

__all__ = ["MIN_SEEDS", "Pilot", "PlannedSeeds", "SeedPlan", "expected_power", "pilot_of", "plan_seeds", "values_of"]

MIN_SEEDS = 5
"""Fewest seeds that a plan proposes (our choice): one more than the fewest with which a verdict claims a difference, so
that one failed seed does not end the ablation without a conclusion."""
MIN_PILOT_SEEDS = 8
"""With fewer paired seeds the sd is unreliable: its 95 % interval reaches beyond twice the estimate."""
ASSURANCE = 0.9
"""Share of pilots whose cautious plan has at least the planned power."""
QUANTILES = 199
"""Points of the integral over the sd."""


@dataclass(frozen=True)
class Pilot:
    """The noise of a metric over seeds, in its unit."""

    sd: float
    """Standard deviation over seeds within an arm, pooled over the arms."""
    df: float
    """Degrees of freedom of ``sd_difference``, which the number of seeds follows from; 0 if it is assumed."""
    rho: float | None
    """Correlation of an arm with the baseline over paired seeds, the mean over arms; None if unknown."""
    sd_difference: float
    """Standard deviation of paired differences: measured if two arms share seeds, else √(2 (1 − rho)) · sd (rho 0 if
    unknown, which is cautious)."""
    floor: NoiseFloor | None = None
    """Noise floor of the baseline alone, with its interval."""

    @classmethod
    def assumed(cls, sd: float, rho: float = 0.0) -> Pilot:
        """A pilot that was not run, from given numbers.

        Raises:
            ValueError: if ``sd`` is not positive, or ``rho`` not between −1 and 1.
        """
        if not sd > 0 or not -1 <= rho < 1:
            raise ValueError(f"sd, rho: got {sd}, {rho}; expected sd > 0 and −1 ≤ rho < 1.")
        return cls(sd, 0, rho, sd * math.sqrt(2 * (1 - rho)))

    def sds(self, shares: Floats) -> Floats:
        """Quantiles of the true sd of paired differences, given the estimate, (Q,).

        sd · √(df / χ²(df)): the fiducial distribution of a normal sample's sd, which is also its posterior under the
        prior 1/σ (Box & Tiao 1973, section 2.3). All are equal if the sd is assumed.

        Args:
            shares: (Q,) probabilities.
        """
        if not self.df:
            return np.full(len(shares), self.sd_difference)
        return self.sd_difference * np.sqrt(self.df / special.chdtri(self.df, shares))


@dataclass(frozen=True)
class PlannedSeeds:
    """Seeds for one aim, and their power."""

    seeds: int
    """Fewest paired seeds, at least ``MIN_SEEDS``, with 80 % power if the true sd is the estimate."""
    power: float
    """Power of these seeds if the true sd is the estimate."""
    expected: float
    """Mean power of these seeds over the sd's uncertainty: the mean over pilots."""
    assured: int
    """Seeds with 80 % power in 9 of 10 pilots: enough for the sd's 90 % upper bound."""


@dataclass(frozen=True)
class SeedPlan:
    """Seeds per arm, and what they could show."""

    pilot: Pilot
    unit: str
    alpha: float
    family: int
    """Arms beside the baseline; Holm's strictest threshold, alpha / family, is planned for."""
    effect: float | None
    margin: float | None
    for_effect: PlannedSeeds | None
    """Seeds that show the smallest difference of interest."""
    for_margin: PlannedSeeds | None
    """Seeds that show equivalence within the margin when there is no difference."""
    upper: float | None = None
    """Largest possible difference, if the metric is bounded."""

    @property
    def seeds(self) -> int | None:
        """Seeds proposed: enough for both; None if neither was declared."""
        needed = [aim.seeds for aim in (self.for_effect, self.for_margin) if aim is not None]
        return max(needed) if needed else None

    def table(self) -> pl.DataFrame:
        """Columns: seeds; detectable (difference shown with 80 % power if the sd is as estimated, in the unit of the
        metric; null where the metric has no room for it); power (expected power for the declared effect; null without
        one)."""
        aims = [aim for aim in (self.for_effect, self.for_margin) if aim is not None]
        counts = sorted({5, 6, 8, 10, 12, 16, 20, *(n for aim in aims for n in (aim.seeds, aim.assured) if n < 1_000)})
        alpha, sd = self.alpha / self.family, self.pilot.sd_difference
        detectable = [sd * detectable_difference(n, alpha, POWER) for n in counts]
        if self.upper is not None:
            detectable = [value if value <= self.upper else None for value in detectable]  # type: ignore[misc]
        power = [None if self.effect is None else expected_power(n, self.effect, self.pilot, alpha) for n in counts]
        columns = {"seeds": counts, "detectable": detectable, "power": power}
        return pl.DataFrame(columns, schema={"seeds": pl.Int64, "detectable": pl.Float64, "power": pl.Float64})

    def sentences(self) -> list[str]:
        """The plan in words."""
        unit = self.unit
        lines = [self._noise()]
        if 0 < self.pilot.df < MIN_PILOT_SEEDS - 1:
            low, high = self.pilot.sds(np.array([0.025, 0.975]))
            lines.append(
                f"With fewer than {MIN_PILOT_SEEDS} paired pilot seeds the noise estimate is unreliable (95 % interval "
                f"of the sd {low:.2g} to {high:.2g}): run a longer pilot."
            )
        level = f"alpha {self.alpha:g} over {self.family} arm(s)"
        if self.effect is not None:
            aim = f"To show {self.effect:g} {unit} at {level}"
            if self.for_effect is None:
                lines.append(f"{aim}: impossible, a difference of {unit} is at most {self.upper:g}.")
            else:
                lines.append(f"{aim}: {self._aim(self.for_effect)}.")
        if self.for_margin is not None:
            aim = f"To show equivalence within ±{self.margin:g} {unit} if there is no difference"
            lines.append(f"{aim}: {self._aim(self.for_margin)}.")
        if self.effect is None and self.margin is None:
            lines.append(
                "Declare protocol.effect (smallest difference of interest) or a margin to get a number of seeds."
            )
        return lines

    def _noise(self) -> str:
        pilot = self.pilot
        basis = f"{pilot.df:.3g} degrees of freedom" if pilot.df else "assumed"
        rho = "rho unknown, assumed 0" if pilot.rho is None else f"rho {pilot.rho:+.2f}"
        line = (
            f"Noise: sd of paired differences {pilot.sd_difference:.2g} {self.unit} ({basis}); sd over seeds "
            f"{pilot.sd:.2g}, {rho}."
        )
        if pilot.floor is not None:
            line += (
                f" Noise floor of the baseline: {pilot.floor.sd:.2g} "
                f"(95 % interval {pilot.floor.low:.2g} to {pilot.floor.high:.2g})."
            )
        return line

    def _aim(self, aim: PlannedSeeds) -> str:
        power = math.floor(100 * aim.power + 0.5)
        if not self.pilot.df:
            return f"{aim.seeds} paired seeds, {power} % power if the sd is as assumed"
        assured = (
            "" if aim.assured <= aim.seeds else f"; {aim.assured:,} seeds give {100 * POWER:.0f} % in 9 of 10 pilots"
        )
        return (
            f"{aim.seeds:,} paired seeds, {power} % power if the sd is as estimated, {100 * aim.expected:.0f} % "
            f"expected{assured}"
        )


def expected_power(seeds: int, effect: float, pilot: Pilot, alpha: float = 0.05) -> float:
    """Power of the paired t-test, averaged over the uncertainty of the sd that the pilot leaves (its "assurance",
    O'Hagan, Stevens & Campbell 2005; with the effect fixed).

    The mean of :func:`workbench.ablation.verdict.statistics.power_of` over the quantiles of ``Pilot.sds`` by the
    midpoint rule.

    Args:
        seeds: paired seeds.
        effect: true difference, in the unit of the metric.
        pilot: the noise.
        alpha: level of the test.
    """
    return _averaged(lambda sd: power_of(seeds, effect / sd, alpha), pilot)


def _averaged(power: Callable[[float], float], pilot: Pilot) -> float:
    """The mean of ``power(sd)`` over the quantiles of the sd."""
    sds = pilot.sds((np.arange(QUANTILES) + 0.5) / QUANTILES) if pilot.df else [pilot.sd_difference]
    return float(np.mean([power(sd) for sd in sds]))


def pilot_of(values: Mapping[str, Mapping[int, float]], baseline: str) -> Pilot:
    """The noise in a pilot's values.

    Differences of several arms to one baseline are correlated, so their pooled variance has fewer degrees of freedom
    than the sum over the k arms: that sum is divided by Σ r² / k, r the estimated correlations between the arms'
    differences (Satterthwaite 1946, for equal variances).

    Args:
        values: arm -> seed -> metric; the arms may have different seeds.
        baseline: the arm that others are paired with.

    Raises:
        ValueError: if no arm has two seeds.
    """
    groups = {arm: np.array(list(by_seed.values())) for arm, by_seed in values.items() if len(by_seed)}
    sd, df = pooled_sd(list(groups.values()))
    if not df or not sd > 0:
        raise ValueError(
            f"pilot: got {sum(map(len, values.values()))} value(s) without any spread; "
            "expected at least two seeds of an arm."
        )
    base = values.get(baseline, {})
    floor = noise_floor(list(base.values())) if len(base) > 1 else None
    rhos, differences = [], []
    for arm, by_seed in values.items():
        shared = sorted(set(by_seed) & set(base))
        if arm == baseline or len(shared) < 3:
            continue
        a, b = (np.array([side[seed] for seed in shared]) for side in (by_seed, base))
        rhos.append(paired_correlation(a, b))
        differences.append(dict(zip(shared, a - b)))
    rho = float(np.mean([r for r in rhos if math.isfinite(r)])) if any(map(math.isfinite, rhos)) else None
    paired, paired_df = pooled_sd([list(by_seed.values()) for by_seed in differences])
    if not paired_df or not paired > 0:
        return Pilot(sd, df, rho, sd * math.sqrt(2 * (1 - (rho or 0.0))), floor)
    return Pilot(sd, paired_df / _mean_overlap(differences), rho, paired, floor)


def _mean_overlap(differences: Sequence[Mapping[int, float]]) -> float:
    """Σ r² / k over pairs of the k arms' differences, an arm with itself included: 1 if they are independent, k if they
    are the same."""
    total = 0.0
    for one in differences:
        for other in differences:
            shared = sorted(set(one) & set(other))
            r = paired_correlation([one[s] for s in shared], [other[s] for s in shared]) if shared else 0.0
            total += 1.0 if one is other else (0.0 if math.isnan(r) else r**2)
    return total / len(differences)


def values_of(runs: Sequence[AblationRun]) -> dict[str, dict[int, float]]:
    """Arm -> seed -> what confirmation runs measured, over several earlier ablations."""
    values: dict[str, dict[int, float]] = {}
    for run in runs:
        rows: Any = confirmed(run.runs()).select("arm", "seed", "report_value").iter_rows()
        for arm, seed, value in rows:
            values.setdefault(arm, {})[seed] = value
    return values


def plan_seeds(
    pilot: Pilot,
    *,
    arms: int,
    alpha: float = 0.05,
    effect: float | None = None,
    margin: float | None = None,
    unit: str = "bits per byte",
    upper: float | None = None,
) -> SeedPlan:
    """Seeds for a question.

    Args:
        pilot: the noise.
        arms: arms beside the baseline.
        alpha: family-wise error rate.
        effect: smallest difference of interest, in the unit of the metric.
        margin: equivalence margin.
        unit: of the metric.
        upper: largest possible value of a metric that is bounded by it and zero (1 for an error rate), and so its
            largest possible difference.
    """
    family = max(1, arms)
    level = alpha / family
    high = float(pilot.sds(np.array([ASSURANCE]))[0])

    def aim(
        size: float | None, needed: Callable[[float, float, float], int], power: Callable[[int, float, float], float]
    ) -> PlannedSeeds | None:
        if size is None or (upper is not None and size > upper):
            return None
        seeds = max(MIN_SEEDS, needed(size / pilot.sd_difference, level, POWER))
        return PlannedSeeds(
            seeds=seeds,
            power=power(seeds, size / pilot.sd_difference, level),
            expected=_averaged(lambda sd: power(seeds, size / sd, level), pilot),
            assured=max(MIN_SEEDS, needed(size / high, level, POWER)),
        )

    return SeedPlan(
        pilot,
        unit,
        alpha,
        family,
        effect,
        margin,
        aim(effect, seeds_needed, power_of),
        aim(margin, seeds_for_equivalence, equivalence_power),
        upper,
    )
