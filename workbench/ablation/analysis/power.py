"""How many seeds a question needs, given a pilot's noise (exact power of the t-test). Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from workbench.ablation.verdict.statistics import (
    POWER,
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

__all__ = ["Pilot", "SeedPlan", "pilot_of", "plan_seeds", "values_of"]

MIN_PILOT_SEEDS = 8
"""With fewer seeds the noise estimate is unreliable: its 95 % interval reaches beyond twice the estimate."""


@dataclass(frozen=True)
class Pilot:
    """The noise of a metric over seeds, in its unit."""

    sd: float
    """Standard deviation over seeds within an arm, pooled over the arms."""
    df: int
    """Degrees of freedom it is estimated from."""
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
    for_effect: int | None
    """Seeds that show the smallest difference of interest with 80 % power."""
    for_margin: int | None
    """Seeds that show equivalence within the margin when there is no difference, with 80 % power."""

    @property
    def seeds(self) -> int | None:
        """Seeds proposed: enough for both; None if neither was declared."""
        needed = [n for n in (self.for_effect, self.for_margin) if n is not None]
        return max(needed) if needed else None

    def table(self) -> pl.DataFrame:
        """Columns: seeds; detectable (difference shown with 80 % power, in the unit of the metric)."""
        counts = sorted({3, 4, 5, 6, 8, 10, 12, 16, 20, *([self.seeds] if self.seeds else [])})
        alpha, sd = self.alpha / self.family, self.pilot.sd_difference
        detectable = [sd * detectable_difference(n, alpha, POWER) for n in counts]
        return pl.DataFrame({"seeds": counts, "detectable": detectable})

    def sentences(self) -> list[str]:
        """The plan in words."""
        pilot, unit = self.pilot, self.unit
        basis = f"{pilot.df} degrees of freedom" if pilot.df else "assumed"
        rho = "rho unknown, assumed 0" if pilot.rho is None else f"rho {pilot.rho:+.2f}"
        lines = [
            f"Noise: sd over seeds {pilot.sd:.2g} {unit} ({basis}), {rho}, "
            f"sd of paired differences {pilot.sd_difference:.2g}."
        ]
        if pilot.floor is not None:
            lines[0] += (
                f" Noise floor of the baseline: {pilot.floor.sd:.2g} "
                f"(95 % interval {pilot.floor.low:.2g} to {pilot.floor.high:.2g})."
            )
        if 0 < pilot.df < MIN_PILOT_SEEDS - 1:
            lines.append(
                f"With fewer than {MIN_PILOT_SEEDS} pilot seeds the noise estimate is unreliable: run a longer pilot."
            )
        level = f"alpha {self.alpha:g} over {self.family} arm(s)"
        if self.for_effect is not None:
            lines.append(
                f"To show {self.effect:g} {unit} with {POWER:.0%} power at {level}: {self.for_effect} paired seeds."
            )
        if self.for_margin is not None:
            lines.append(
                f"To show equivalence within ±{self.margin:g} {unit} if there is no difference: "
                f"{self.for_margin} paired seeds."
            )
        if self.seeds is None:
            lines.append(
                "Declare protocol.effect (smallest difference of interest) or a margin to get a number of seeds."
            )
        return lines


def pilot_of(values: Mapping[str, Mapping[int, float]], baseline: str) -> Pilot:
    """The noise in a pilot's values.

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
    rhos, differences = [], []
    for arm, by_seed in values.items():
        shared = sorted(set(by_seed) & set(base))
        if arm == baseline or len(shared) < 3:
            continue
        a, b = (np.array([side[seed] for seed in shared]) for side in (by_seed, base))
        rhos.append(paired_correlation(a, b))
        differences.append(a - b)
    rho = float(np.mean([r for r in rhos if math.isfinite(r)])) if any(map(math.isfinite, rhos)) else None
    paired, paired_df = pooled_sd(differences) if differences else (math.nan, 0)
    sd_difference = paired if paired_df and paired > 0 else sd * math.sqrt(2 * (1 - (rho or 0.0)))
    floor = noise_floor(list(base.values())) if len(base) > 1 else None
    return Pilot(sd, df, rho, sd_difference, floor)


def values_of(runs: Sequence[AblationRun]) -> dict[str, dict[int, float]]:
    """Arm -> seed -> what confirmation runs measured, over several earlier ablations."""
    values: dict[str, dict[int, float]] = {}
    for run in runs:
        done = (pl.col("stage") == Stage.CONFIRMATION) & (pl.col("status") == Status.DONE)
        rows: Any = run.runs().filter(done).select("arm", "seed", "report_value").iter_rows()
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
