"""How many seeds a question needs, from a pilot's noise: exact t-power, before the ablation is launched. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from workbench.ablation.verdict.statistics import (
    NoiseFloor,
    detectable_difference,
    noise_floor,
    paired_correlation,
    pooled_sd,
    seeds_for_equivalence,
    seeds_needed,
)
from workbench.status import Stage, Status

if TYPE_CHECKING:
    from workbench.ablation.run import AblationRun

__all__ = ["POWER", "Pilot", "SeedPlan", "pilot_of", "plan_seeds"]

POWER = 0.8
"""Power that is planned for."""
FEW = 8
"""Below so many seeds a standard deviation is hardly known: its 95 % interval reaches beyond twice the estimate."""


@dataclass(frozen=True)
class Pilot:
    """The noise of a metric over seeds, in its unit."""

    sd: float
    """Standard deviation over seeds within an arm, pooled over the arms."""
    df: int
    """Degrees of freedom it is estimated from."""
    rho: float | None
    """Correlation of an arm with the baseline over paired seeds, the mean over arms; None where it is not known."""
    sd_difference: float
    """Standard deviation of paired differences: measured where two arms share seeds, else √(2 (1 − rho)) · sd (rho 0 where
    unknown, which is cautious)."""
    floor: NoiseFloor | None = None
    """Noise floor of the baseline alone, with its interval."""

    @classmethod
    def assumed(cls, sd: float, rho: float = 0.0) -> Pilot:
        """A pilot that was not run: numbers from elsewhere."""
        if not sd > 0 or not -1 <= rho < 1:
            raise ValueError(f"sd, rho: got {sd}, {rho}; expected sd > 0 and −1 ≤ rho < 1.")
        return cls(sd, 0, rho, sd * math.sqrt(2 * (1 - rho)))


@dataclass(frozen=True)
class SeedPlan:
    """Seeds an arm, and what they could show."""

    pilot: Pilot
    unit: str
    alpha: float
    family: int
    """Arms beside the baseline; Holm's strictest threshold, alpha / family, is planned for."""
    effect: float | None
    margin: float | None
    for_effect: int | None
    """Seeds that show the smallest difference of interest with 80 % power."""
    for_margin: int | None
    """Seeds that show equivalence within the margin when there is no difference, with 80 % power."""

    @property
    def seeds(self) -> int | None:
        """Seeds proposed: enough for both; None where nothing was declared."""
        needed = [n for n in (self.for_effect, self.for_margin) if n is not None]
        return max(needed) if needed else None

    def table(self) -> pl.DataFrame:
        """Columns: seeds; detectable (difference shown with 80 % power, in the unit of the metric)."""
        counts = sorted({3, 4, 5, 6, 8, 10, 12, 16, 20, *([self.seeds] if self.seeds else [])})
        able = [self.pilot.sd_difference * detectable_difference(n, self.alpha / self.family, POWER) for n in counts]
        return pl.DataFrame({"seeds": counts, "detectable": able})

    def sentences(self) -> list[str]:
        """The plan in words."""
        pilot, unit = self.pilot, self.unit
        known = f"{pilot.df} degrees of freedom" if pilot.df else "assumed"
        rho = "rho not known, taken as 0" if pilot.rho is None else f"rho {pilot.rho:+.2f}"
        lines = [
            f"Noise: sd over seeds {pilot.sd:.2g} {unit} ({known}), {rho}, sd of paired differences {pilot.sd_difference:.2g}."
        ]
        if pilot.floor is not None:
            lines[0] += (
                f" Noise floor of the baseline: {pilot.floor.sd:.2g} (95 % interval {pilot.floor.low:.2g} to {pilot.floor.high:.2g})."
            )
        if 0 < pilot.df < FEW - 1:
            lines.append(
                f"Fewer than {FEW} seeds: the noise is hardly known; run a longer pilot before believing a plan."
            )
        level = f"alpha {self.alpha:g} over {self.family} arm(s)"
        if self.for_effect is not None:
            lines.append(
                f"To show {self.effect:g} {unit} with {POWER:.0%} power at {level}: {self.for_effect} paired seeds."
            )
        if self.for_margin is not None:
            lines.append(
                f"To show equivalence within ±{self.margin:g} {unit} where there is no difference: {self.for_margin} paired seeds."
            )
        if self.seeds is None:
            lines.append(
                "Declare protocol.effect (smallest difference of interest) or a margin to have a number proposed."
            )
        return lines


def pilot_of(values: Mapping[str, Mapping[int, float]], baseline: str) -> Pilot:
    """The noise in a pilot's values.

    Args:
        values: arm -> seed -> metric; the arms may have different seeds.
        baseline: the arm that others are paired with.

    Raises:
        ValueError: when no arm has two seeds.
    """
    groups = {arm: np.array(list(held.values())) for arm, held in values.items() if len(held)}
    sd, df = pooled_sd(list(groups.values()))
    if not df or not sd > 0:
        raise ValueError(
            f"pilot: got {sum(map(len, values.values()))} value(s) without any spread; expected at least two seeds of an arm."
        )
    base = values.get(baseline, {})
    rhos, differences = [], []
    for arm, held in values.items():
        shared = sorted(set(held) & set(base))
        if arm == baseline or len(shared) < 3:
            continue
        a, b = (np.array([side[seed] for seed in shared]) for side in (held, base))
        rhos.append(paired_correlation(a, b))
        differences.append(a - b)
    rho = float(np.mean([r for r in rhos if math.isfinite(r)])) if any(map(math.isfinite, rhos)) else None
    paired, paired_df = pooled_sd(differences) if differences else (math.nan, 0)
    sd_difference = paired if paired_df and paired > 0 else sd * math.sqrt(2 * (1 - (rho or 0.0)))
    floor = noise_floor(list(base.values())) if len(base) > 1 else None
    return Pilot(sd, df, rho, sd_difference, floor)


def values_of(runs: Sequence[AblationRun]) -> dict[str, dict[int, float]]:
    """Arm -> seed -> what confirmation runs measured, of earlier ablations taken together."""
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        done = (pl.col("stage") == Stage.CONFIRMATION) & (pl.col("status") == Status.DONE)
        rows: Any = run.runs().filter(done).select("arm", "seed", "report_value").iter_rows()
        for arm, seed, value in rows:
            found.setdefault(arm, {})[seed] = value
    return found


def plan_seeds(
    pilot: Pilot,
    *,
    arms: int,
    alpha: float = 0.05,
    effect: float | None = None,
    margin: float | None = None,
    unit: str = "bits per byte",
) -> SeedPlan:
    """Seeds for a question.

    Args:
        pilot: the noise.
        arms: arms beside the baseline.
        alpha: family-wise error rate.
        effect: smallest difference of interest, in the unit of the metric.
        margin: equivalence margin.
    """
    family, sd = max(1, arms), pilot.sd_difference
    for_effect = None if effect is None else seeds_needed(effect / sd, alpha / family, POWER)
    for_margin = None if margin is None else seeds_for_equivalence(margin / sd, alpha, POWER)
    return SeedPlan(pilot, unit, alpha, family, effect, margin, for_effect, for_margin)
